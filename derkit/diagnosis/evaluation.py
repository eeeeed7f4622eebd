"""Clean and robust accuracy, the strong suite, AutoAttack, and the energies that an attack moves.

All attacks run with BatchNorm in eval mode, from an explicit generator, at the eps that is given.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from derkit import attacks, energy
from derkit.data import Split
from derkit.util import DerkitError, images_format, make_generator, pick

Attack = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def at_once(split: Split) -> int:
    """Images a batch: on a CPU, what stays in its cache is faster. (By the data's device: asking
    for GPUs when this is imported would bind a process to those that it sees then.)"""
    return 512 if split.images.is_cuda else 128


def float_batches(split: Split, model: nn.Module, batch_size: int = 0) -> Iterator[tuple]:
    """Unshuffled batches (x, y), with x in the model's dtype and memory format; 0: `at_once`."""
    layout = images_format(model)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    for x, y in split.batches(batch_size or at_once(split), dtype=dtype):
        yield x.contiguous(memory_format=layout), y


@torch.no_grad()
def predict(model: nn.Module, split: Split) -> Tensor:
    """Logits (N, K) in eval mode; the model's mode is restored."""
    with attacks.attack_mode(model, "eval"):
        return torch.cat([energy.upcast(model(x)) for x, _ in float_batches(split, model)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of correct predictions, in [0, 1]."""
    return (logits.argmax(1) == labels).double().mean().item()


def pgd_attack(eps: float, steps: int = 20, **options) -> Attack:
    """PGD with fixed settings, in the form that `attack_split` takes."""
    options = dict(eps=eps, steps=steps, check=False) | options
    return lambda model, x, y, rng: attacks.pgd(model, x, y, generator=rng, **options)


def fgsm_attack(eps: float, norm: str = "linf") -> Attack:
    """FGSM, in the form that `attack_split` takes; for 'l2' one step of length eps."""
    return pgd_attack(eps, 1, alpha=eps, random_start=False, norm=norm)


def attack_split(model: nn.Module, split: Split, attack: Attack, seed: int = 0) -> Tensor:
    """Logits (N, K) of x* over a split; the attack is called as (model, x, y, generator)."""
    rng, logits = make_generator(split.images.device, "evaluation", seed), []
    for x, y in float_batches(split, model):
        x_adv = attack(model, x, y, rng)
        with torch.no_grad(), attacks.attack_mode(model, "eval"):
            logits.append(energy.upcast(model(x_adv)))
    return torch.cat(logits)


def robust_accuracy(model: nn.Module, split: Split, eps: float, steps: int = 20, seed: int = 0,
                    **options) -> float:
    """Accuracy under PGD (options as in `derkit.attacks.pgd`); at eps 0 the clean accuracy."""
    logits = attack_split(model, split, pgd_attack(eps, steps, **options), seed)
    return accuracy(logits, split.labels)


def _survivors(model: nn.Module, split: Split, eps: float, suite: Sequence[dict],
               seed: tuple[str, int], norm: str) -> Tensor:
    """Per image, (N,) bool: is it right, and does it stay so under every attack of the suite (of
    options of pgd)? An image that has fallen is not attacked again."""
    attacks.check_eps(eps, norm)
    rng = make_generator(split.images.device, *seed)
    alive = predict(model, split).argmax(1) == split.labels
    for options in suite:
        attack = pgd_attack(eps, norm=norm, **options)
        for index in alive.nonzero().squeeze(1).split(at_once(split)):
            for x, y in float_batches(split.take(index), model):
                x_adv = attack(model, x, y, rng)
                with torch.no_grad(), attacks.attack_mode(model, "eval"):
                    alive[index] = model(x_adv).argmax(1) == y
    return alive


def strong_mask(model: nn.Module, split: Split, eps: float, steps: int = 50, restarts: int = 2,
                seed: int = 0, norm: str = "linf") -> Tensor:
    """Per image, (N,) bool: does it survive the clean prediction and the strong suite?

    PGD-20 on CE (alone up to twice too high near CO), then ``restarts`` x ``steps`` on the margin
    and on CE, with steps that shrink from 2 eps to 0 by a cosine, where any iterate counts."""
    hard = dict(steps=steps, restarts=restarts, decay=True, any_iterate=True)
    suite = [dict(steps=20), hard | dict(loss="margin"), hard | dict(loss="ce")]
    return _survivors(model, split, eps, suite, ("strong", seed), norm)


def strong_accuracy(model: nn.Module, split: Split, eps: float, **options) -> float:
    """Mean of `strong_mask`: the worst case per image over the strong suite."""
    return strong_mask(model, split, eps, **options).double().mean().item()


def pgd50_accuracy(model: nn.Module, split: Split, eps: float, steps: int = 50, restarts: int = 10,
                   alpha: float | None = None, seed: int = 0, norm: str = "linf") -> float:
    """PGD-50-10: the share of images that survive ``restarts`` runs of ``steps`` steps on CE, of
    size alpha, by default eps/4, which is the published 2/255 at eps 8/255."""
    suite = [dict(steps=steps, alpha=alpha)] * restarts
    return _survivors(model, split, eps, suite, ("pgd50", seed), norm).double().mean().item()


def check_autoattack(eps: float, classes: int) -> None:
    """Raise DerkitError where AutoAttack cannot run: pyautoattack is missing, eps is 0, or there
    are fewer than 4 classes, which its targeted DLR needs."""
    if eps == 0 or classes < 4:
        raise DerkitError(f"AutoAttack needs eps > 0 and at least 4 classes, found {eps:g} and "
                          f"{classes}: set autoattack_size=0, or use strong_accuracy.")
    if find_spec("pyautoattack") is None:
        raise DerkitError('AutoAttack needs pyautoattack: pip install "derkit[eval]", or set '
                          "autoattack_size=0.")


def autoattack_mask(model: nn.Module, split: Split, eps: float, norm: str = "linf",
                    seed: int = 0) -> Tensor:
    """Per image, (N,) bool: does it survive standard AutoAttack (arXiv 2003.01690), in the port
    `pyautoattack` (extra: eval)? Raises DerkitError as `check_autoattack` does."""
    port_norm = pick("norm", norm, {"linf": "Linf", "l2": "L2"})
    classes = predict(model, split.take(slice(1))).shape[1]
    check_autoattack(attacks.check_eps(eps, norm), classes)
    from pyautoattack import AutoAttack

    dtype, device = next(float_batches(split, model, 1))[0].dtype, split.images.device
    layout, size = images_format(model), at_once(split)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def forward(x: Tensor) -> Tensor:
        """Logits in float32, the port's precision, with weights that collect no gradients."""
        images = x.to(dtype).contiguous(memory_format=layout)
        return energy.upcast(torch.func.functional_call(model, weights, (images,))).float()

    fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with attacks.attack_mode(model, "eval"), fork:
        port = AutoAttack(forward, norm=port_norm, eps=eps, seed=seed, version="standard",
                          device=str(device))
        for part in (port.apgd_targeted, port.fab):
            part.n_target_classes = min(9, classes - 1)
        adv, _ = port.run_standard_evaluation(split.floats(), split.labels, batch_size=size)
        with torch.no_grad():
            return torch.cat([forward(x).argmax(1) for x in adv.split(size)]) == split.labels


def energy_summary(logits: Tensor, logits_adv: Tensor, labels: Tensor,
                   logits_start: Tensor | None = None) -> dict[str, float]:
    """Means of dE(x), dE(x, y), E(x), E(x*), and the share of AAEs (which lowered the loss from
    ``logits_start``, where the attack did not start at x itself)."""
    start = logits if logits_start is None else logits_start
    found = {"dE": energy.delta_energy(logits, logits_adv),
             "dEy": energy.delta_energy(logits, logits_adv, labels),
             "E": energy.marginal_energy(logits), "E_adv": energy.marginal_energy(logits_adv),
             "aae": energy.abnormal_mask(start, logits_adv, labels).double()}
    return {name: round(values.mean().item(), 6) for name, values in found.items()}


def gradient_cosine(model: nn.Module, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """cos(grad l(a), grad l(b)), (B,). Of x and x + r, r uniform in the ball: near 0 at CO
    (arXiv 2007.02617); of an attack's start and x*: PertAlign (arXiv 2606.00738)."""
    with attacks.attack_mode(model, "eval"):
        a, b = (attacks.input_gradient(model, z, lambda f: energy.cross_entropy(f, y))[0]
                for z in (a, b))
    return nn.functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=1e-20)

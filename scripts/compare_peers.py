"""The kit beside other packages on the same trained models: attacks, AutoAttack, distances of generated images.

    pip install -e ".[peers,eval]" && pip install --no-deps torchattacks
    python scripts/compare_peers.py                         # writes figures/records/peers.json

Three networks are trained by `derkit.train` on the bundled data: standard, by PGD, and by FGSM with DER. Every comparison is
over the same images, the same model in float64 and, where a start is drawn, the same number of steps. torchattacks pins an old
`requests`, which does not go with Jupyter: it is installed without its dependencies and left out where it is missing.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from derkit import TrainConfig, load_dataset, load_model, pgd, train
from derkit.attacks import fgsm
from derkit.data import Split
from derkit.evaluation import autoattack_mask, predict, strong_mask
from derkit.extractor import extractor_for
from derkit.metrics import fidelity
from derkit.records import write_json

PACKAGES = ("torchattacks", "foolbox", "pyautoattack", "torch-fidelity", "torchmetrics", "scikit-learn")
OUT = Path(__file__).resolve().parents[1] / "figures" / "records" / "peers.json"
SMALL = dict(width=6, train_size=2000, batch_size=32, epochs=6, eval_size=100, eval_steps=5, probe_size=16, final_size=100,
             final_steps=5, strong_size=0, probe_every=100, precision="fp64", device="cpu")  # fmt: skip
MODELS = {"standard": dict(method="standard", eps=0.1), "pgd": dict(method="pgd", steps=5, eps=0.1),
          "fgsm_der": dict(method="fgsm", regularizer="der", eps=0.1)}
EPS, EPS_L2, STEPS = 0.1, 1.5, 10


def peer(name: str):
    """A package, or None where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


def versions() -> dict[str, str | None]:
    """Installed versions of the kit's own base and of the peers."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("derkit", "torch", *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# ------------------------------------------------------------------------------------------------------------ attacks
def foolbox_margin(foolbox) -> type:
    """foolbox's own L_inf PGD loop on the CW margin."""

    class MarginPGD(foolbox.attacks.LinfPGD):
        def get_loss_fn(self, model, labels):
            def loss(x):
                logits, y = model(x).raw, labels.raw
                others = logits.masked_fill(nn.functional.one_hot(y, logits.shape[1]).bool(), -torch.inf).amax(1)
                return import_module("eagerpy").astensor((others - logits.gather(1, y[:, None]).squeeze(1)).sum())

            return loss

    return MarginPGD


def attack_pairs(model: nn.Module) -> list[dict]:
    """Rows (attack, norm, eps, peer, same start?, ours(x, y), theirs(x, y)) of attacks whose definitions match.

    torchattacks adds 1e-10 to the norm of a gradient that its mean over the batch has made small; it is set to 1e-30 here.
    It draws L_2 starts with a uniform radius, where the kit and foolbox draw them uniformly from the ball: that pair is
    recorded with ``same_definition`` false.
    """
    foolbox, torchattacks, rows = peer("foolbox"), peer("torchattacks"), []
    alpha, alpha_l2, generator = EPS / 4, EPS_L2 / 4, torch.Generator()

    def ours(norm: str, loss: str, start: bool):
        radius, step = (EPS, alpha) if norm == "linf" else (EPS_L2, alpha_l2)
        return lambda x, y: pgd(model, x, y, radius, alpha=step, steps=STEPS, norm=norm, loss=loss, random_start=start,
                                generator=generator.manual_seed(0))

    def add(attack: str, norm: str, name: str, start: bool, mine, theirs) -> None:
        eps = EPS if norm == "linf" else EPS_L2
        same = not (name == "torchattacks" and norm == "l2" and start)
        rows.append(dict(attack=attack, norm=norm, eps=eps, peer=name, random_start=start, same_definition=same, ours=mine, theirs=theirs))

    if torchattacks:
        add("FGSM", "linf", "torchattacks", False, lambda x, y: fgsm(model, x, y, EPS), torchattacks.FGSM(model, eps=EPS))
        for start in (False, True):
            add(f"PGD-{STEPS}", "linf", "torchattacks", start, ours("linf", "ce", start),
                torchattacks.PGD(model, eps=EPS, alpha=alpha, steps=STEPS, random_start=start))
            add(f"PGD-{STEPS}", "l2", "torchattacks", start, ours("l2", "ce", start),
                torchattacks.PGDL2(model, eps=EPS_L2, alpha=alpha_l2, steps=STEPS, random_start=start, eps_for_division=1e-30))
    if foolbox:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")

        def run(attack, eps):
            return lambda x, y: attack(wrapped, x, y, epsilons=eps)[1]

        add("FGSM", "linf", "foolbox", False, lambda x, y: fgsm(model, x, y, EPS), run(foolbox.attacks.FGSM(), EPS))
        for start in (False, True):
            options = dict(steps=STEPS, random_start=start)
            add(f"PGD-{STEPS}", "linf", "foolbox", start, ours("linf", "ce", start),
                run(foolbox.attacks.LinfPGD(abs_stepsize=alpha, **options), EPS))
            add(f"PGD-{STEPS} on the margin", "linf", "foolbox", start, ours("linf", "margin", start),
                run(foolbox_margin(foolbox)(abs_stepsize=alpha, **options), EPS))
            add(f"PGD-{STEPS}", "l2", "foolbox", start, ours("l2", "ce", start),
                run(foolbox.attacks.L2PGD(abs_stepsize=alpha_l2, **options), EPS_L2))
    return rows


def compare_attacks(model: nn.Module, split: Split, batch_size: int = 250) -> list[dict]:
    """One record per pair: robust accuracy of each; with the same start the largest difference of x* and the share of images
    within 1e-5. The model is compared in float64, so that rounding does not decide the sign of a gradient."""
    model, records = model.double().eval(), []
    for row in attack_pairs(model):
        torch.manual_seed(0)
        mine, theirs, far = [], [], []
        for x, y in split.batches(batch_size, dtype=torch.float64):
            a, b = row["ours"](x, y), row["theirs"](x, y).detach()
            for out, z in ((mine, a), (theirs, b)):
                with torch.no_grad():
                    out.append(model(z).argmax(1) == y)
            far.append((a - b).flatten(1).abs().amax(1))
        mine, theirs, far = (torch.cat(t) for t in (mine, theirs, far))
        about = {k: v for k, v in row.items() if k not in ("ours", "theirs")}
        record = about | dict(images=len(split), ours=_share(mine), theirs=_share(theirs))
        if not row["random_start"]:
            record |= dict(largest_difference=far.max().item(), equal_to_1e_5=_share(far <= 1e-5))
        records.append(record)
    return records


def compare_autoattack(model: nn.Module, split: Split, eps: float = EPS) -> dict:
    """Per image: who survives AutoAttack, and who our attacks. The images that only one side breaks are listed."""
    model, began = model.float().eval(), time.perf_counter()
    theirs = autoattack_mask(model, split, eps)
    seconds, x, y = time.perf_counter() - began, split.floats(), split.labels
    clean = predict(model, split).argmax(1) == y
    generator = torch.Generator()

    def survives(**options) -> Tensor:
        x_adv = pgd(model, x, y, eps, generator=generator.manual_seed(0), **options)
        with torch.no_grad():
            return clean & (model(x_adv).argmax(1) == y)

    ours = {"PGD-50-10": survives(steps=50, restarts=10), "margin PGD-50-10": survives(steps=50, restarts=10, loss="margin"),
            "strong": strong_mask(model, split, eps)}
    rows = {name: dict(accuracy=_share(mask), only_autoattack_breaks=_where(mask & ~theirs), only_ours_breaks=_where(theirs & ~mask))
            for name, mask in ours.items()}
    return dict(eps=eps, images=len(split), clean=_share(clean), autoattack=_share(theirs), seconds=round(seconds, 1), ours=rows)


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()


def _where(mask: Tensor) -> list[int]:
    return mask.nonzero().squeeze(1).tolist()


# ---------------------------------------------------------------------------------------------------------- distances
class _Features(nn.Module):
    """The shipped extractor as torchmetrics takes one: uint8 images -> features or logits."""

    def __init__(self, net: nn.Module, which: int) -> None:
        super().__init__()
        self.net, self.which, self.num_features = net, which, 72

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.float() / 255)[self.which].double()


def compare_distances(images: Tensor, real: Tensor) -> dict[str, dict[str, float]]:
    """CIS, CFD and CKD of `derkit.metrics.fidelity` beside torchmetrics with the same extractor. Below 1,000 images a
    kernel-distance subset is the whole set, so nothing is drawn."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    extractor = extractor_for("fashion_mini")
    ours = fidelity(images, real, extractor, cuda=False)
    features, logits = (_Features(extractor.net, i) for i in (0, 1))
    size = min(len(images), len(real))
    distances = {"CFD": FrechetInceptionDistance(feature=features),
                 "CKD": KernelInceptionDistance(feature=features, subsets=1, subset_size=size)}
    for metric in distances.values():
        metric.update(real, real=True)
        metric.update(images, real=False)
    score = InceptionScore(feature=logits, splits=1)
    score.update(images)
    theirs = {"CIS": score.compute()[0].item(), "CFD": distances["CFD"].compute().item(), "CKD": distances["CKD"].compute()[0].item()}
    return {name: dict(ours=ours[name], theirs=value) for name, value in theirs.items()}


def noisy(images: Tensor) -> Tensor:
    """uint8 images with noise of 20 grey levels: a set that is at some distance from the real one."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images.float() + 20 * noise).clamp(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------------------- main
def trained(options: dict, dataset) -> tuple[nn.Module, dict]:
    """A network trained by the kit, with its config and test accuracies."""
    config = TrainConfig.make("fashion_mini", **(SMALL | options))
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, dataset, folder=folder, verbose=False)
        return load_model(run.folder / "final.pt"), dict(config=config.as_dict(), final=run.final["last"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--images", type=int, default=1000, help="test images of the attacks")
    parser.add_argument("--autoattack", type=int, default=1000, help="test images of AutoAttack")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(train_size=SMALL["train_size"])
    record = dict(versions=versions(), data=dataset.name, data_sha256=dataset.sha256, seed=0, steps=STEPS, models={})
    for name, settings in MODELS.items():
        model, about = trained(settings, dataset)
        about["attacks"] = compare_attacks(model, dataset.test.take(slice(options.images)))
        for row in about["attacks"]:
            print(name, json.dumps(row), flush=True)
        about["autoattack"] = compare_autoattack(model, dataset.test.take(slice(options.autoattack)))
        print(name, json.dumps(about["autoattack"]), flush=True)
        record["models"][name] = about
    record["distances"] = compare_distances(noisy(dataset.train.images[:500]), dataset.test.images[:500])
    print(json.dumps(record["distances"]))
    write_json(options.out, record)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

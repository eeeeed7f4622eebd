"""What is measured after every epoch and at the end of a run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from derkit import attacks, energy, evaluation, losses
from derkit.config import TrainConfig
from derkit.data import Dataset, Split
from derkit.errors import DerkitError
from derkit.evaluation import make_generator


def _attacked(model: nn.Module, split: Split, config: TrainConfig, steps: int) -> tuple[Tensor, Tensor]:
    """Logits under FGSM and under PGD, at the config's eps and norm."""
    pair = evaluation.fgsm_attack(config.eps, config.norm), evaluation.pgd_attack(config.eps, steps, norm=config.norm)
    weak, hard = (evaluation.attack_split(model, split, attack)[1] for attack in pair)
    return weak, hard


def epoch_evaluation(model: nn.Module, dataset: Dataset, config: TrainConfig, epoch: int) -> dict[str, float]:
    """Clean, FGSM and PGD accuracy on validation and probe images, energies of the probe, linearity at some cadence."""
    out: dict[str, float] = {}
    parts = {"valid": dataset.valid.take(slice(config.eval_size)), "probe": dataset.train.take(slice(config.probe_size))}
    for name, split in parts.items():
        natural = evaluation.predict(model, split)
        weak, hard = _attacked(model, split, config, config.eval_steps)
        out |= {f"{name}_clean": evaluation.accuracy(natural, split.labels), f"{name}_fgsm": evaluation.accuracy(weak, split.labels),
                f"{name}_pgd": evaluation.accuracy(hard, split.labels),
                f"{name}_loss": energy.cross_entropy(natural, split.labels).mean().item(),
                f"{name}_pgd_loss": energy.cross_entropy(hard, split.labels).mean().item()}
        out |= {f"{name}_pgd_{k}": v for k, v in evaluation.energy_summary(natural, hard, split.labels).items()}
    probe = parts["probe"]
    x, y = next(evaluation.float_batches(probe, model, len(probe)))
    generator = make_generator(x.device, "probe", 0)
    used = config.change(attack_bn="eval") if config.method != "standard" else config.change(attack_bn="eval", method="fgsm")
    step = losses.Step(model, x, y, used, generator)
    x_adv, _, start = losses.METHODS[used.method].attack(step)
    with torch.no_grad(), attacks.attack_mode(model, "eval"):
        natural, logits = model(x), model(x_adv)
    out |= {f"probe_{k}": v for k, v in evaluation.energy_summary(natural, logits, y, start).items()}
    if epoch % config.probe_every == 0 or epoch == config.epochs:
        out["cos"] = evaluation.gradient_cosine(model, x, y, config.eps, generator, config.norm).mean().item()
        out["E_lin"] = evaluation.elle_linearity(model, x, y, config.eps, generator, config.norm).mean().item()
    return {k: round(v, 6) for k, v in out.items()}


def final_evaluation(model: nn.Module, dataset: Dataset, config: TrainConfig) -> dict[str, Any]:
    """Test accuracies: clean, FGSM, PGD (config.final_steps), strong, PGD-50-10, AutoAttack; with the numbers of images."""
    test = dataset.test.take(slice(config.final_size or None))
    natural = evaluation.predict(model, test)
    weak, hard = _attacked(model, test, config, config.final_steps)
    out = dict(clean=evaluation.accuracy(natural, test.labels), fgsm=evaluation.accuracy(weak, test.labels),
               pgd=evaluation.accuracy(hard, test.labels), pgd_steps=config.final_steps, images=len(test))
    out |= {k: v for k, v in evaluation.energy_summary(natural, hard, test.labels).items() if k in ("dE", "dEy", "aae")}
    if config.strong_size:
        part = dataset.test.take(slice(config.strong_size))
        strong = evaluation.strong_accuracy(model, part, config.eps, steps=50, norm=config.norm)
        out |= dict(strong=strong, strong_images=len(part))
    return {k: round(v, 6) for k, v in out.items()} | further_evaluation(model, dataset, config)


# ------------------------------------------------------------------------------------- PGD-50-10 and AutoAttack
def check_further(dataset: Dataset, config: TrainConfig) -> None:
    """Raise DerkitError where the AutoAttack that the config asks for cannot run: told before training, not after it."""
    if not config.autoattack_size:
        return
    if find_spec("pyautoattack") is None:
        raise DerkitError('autoattack_size needs the package pyautoattack: pip install "derkit[eval]", or set autoattack_size=0.')
    if config.eps == 0 or len(dataset.classes) < 4:
        raise DerkitError(f"AutoAttack needs eps > 0 and at least 4 classes, found {config.eps:g} and {len(dataset.classes)}: "
                          "set autoattack_size=0.")


def missing(known: dict[str, Any], dataset: Dataset, config: TrainConfig) -> list[str]:
    """Which of 'pgd50' and 'aa' the config asks for on more images than ``known`` results have."""
    sizes = {"pgd50": config.pgd50_size, "aa": config.autoattack_size}
    return [name for name, size in sizes.items() if min(size, len(dataset.test)) > known.get(f"{name}_images", 0)]


def further_evaluation(model: nn.Module, dataset: Dataset, config: TrainConfig, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """PGD-50-10 (`pgd50`, step size in `pgd50_alpha`) and AutoAttack (`aa`) on the first test images, as far as they are
    asked for and not ``known`` yet. Both in the weights' own precision, BatchNorm in eval mode."""
    out: dict[str, Any] = {}
    names = missing(known or {}, dataset, config)
    if "pgd50" in names:
        part = dataset.test.take(slice(config.pgd50_size))
        value = evaluation.pgd50_accuracy(model, part, config.eps, norm=config.norm)
        out |= dict(pgd50=round(value, 6), pgd50_images=len(part), pgd50_alpha=round(config.eps / 4, 6))
    if "aa" in names:
        part = dataset.test.take(slice(config.autoattack_size))
        record = evaluation.autoattack(model, part, config.eps, config.norm)
        out |= dict(aa=round(record["accuracy"], 6), aa_images=len(part), aa_package=f"{record['package']} {record['version']}")
    return out

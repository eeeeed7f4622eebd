"""What is measured after every epoch and at the end of a run."""

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from derkit import energy
from derkit.attacks import attack_mode, noise_in_ball
from derkit.config import TrainConfig
from derkit.data import Dataset, Split
from derkit.diagnosis import evaluation
from derkit.training.objectives import ELLE, Objective
from derkit.util import AUTO, make_generator


def _accuracies(model: nn.Module, split: Split, config: TrainConfig,
                steps: int) -> tuple[dict[str, float], Tensor, Tensor]:
    """Accuracy on images as they are, under FGSM and under PGD; logits of the first and last."""
    weak = evaluation.fgsm_attack(config.eps, config.norm)
    hard = evaluation.pgd_attack(config.eps, steps, norm=config.norm)
    logits = dict(clean=evaluation.predict(model, split))
    logits |= {name: evaluation.attack_split(model, split, attack)
               for name, attack in (("fgsm", weak), ("pgd", hard))}
    record = {name: evaluation.accuracy(f, split.labels) for name, f in logits.items()}
    return record, logits["clean"], logits["pgd"]


def _split_record(model: nn.Module, split: Split, config: TrainConfig) -> dict[str, float]:
    """Accuracies and losses, clean and attacked, and the energies that PGD moves."""
    record, natural, hard = _accuracies(model, split, config, config.eval_steps)
    record["loss"] = energy.cross_entropy(natural, split.labels).mean().item()
    record["pgd_loss"] = energy.cross_entropy(hard, split.labels).mean().item()
    summary = evaluation.energy_summary(natural, hard, split.labels)
    return record | {f"pgd_{name}": value for name, value in summary.items()}


def _probe_signals(model: nn.Module, probe: Split, config: TrainConfig, whole: bool):
    """Energies of the training attack on the probe; with ``whole`` cosines and E_lin."""
    x, y = next(evaluation.float_batches(probe, model, len(probe)))
    rng = make_generator(x.device, "probe", 0)
    other = dict(method="fgsm", alpha=AUTO) if config.method == "standard" else {}
    objective = Objective(config.change(attack_bn="eval", regularizer="none", **other))
    x_adv, start, logits = objective.attack(model, x, y, rng)
    with torch.no_grad(), attack_mode(model, "eval"):
        record = evaluation.energy_summary(model(x), model(x_adv), y, logits)
    record = {f"probe_{name}": value for name, value in record.items()}
    if whole:
        near, elle = x + noise_in_ball(x, config.eps, config.norm, rng), ELLE(config)
        with torch.no_grad(), attack_mode(model, "eval"):
            lin = elle({name: model(z) for name, z in elle.points(x, x_adv, rng).items()}, y)
        found = dict(cos=evaluation.gradient_cosine(model, x, near, y), E_lin=lin)
        found["align"] = evaluation.gradient_cosine(model, x if start is None else start, x_adv, y)
        record |= {name: values.mean().item() for name, values in found.items()}
    return record


def epoch_evaluation(model: nn.Module, dataset: Dataset, config: TrainConfig,
                     epoch: int) -> dict[str, float]:
    """The record of an epoch: accuracies on validation and probe images, energies, signals. The
    probe: the first ``probe_size`` training images, the same in every epoch."""
    probe = dataset.train.take(slice(config.probe_size))
    parts = {"valid": dataset.valid.take(slice(config.eval_size)), "probe": probe}
    record = {f"{name}_{key}": value for name, split in parts.items()
              for key, value in _split_record(model, split, config).items()}
    whole = epoch % config.probe_every == 0 or epoch == config.epochs
    record |= _probe_signals(model, probe, config, whole)
    return {name: round(value, 6) for name, value in record.items()}


def lacking(known: dict[str, Any], dataset: Dataset, config: TrainConfig,
            best: bool = False) -> dict[str, Split]:
    """What the config asks of this epoch and ``known`` has not, or on fewer: name -> images."""
    sizes = dict(images=config.final_size or len(dataset.test))
    if config.judge_best or not best:
        sizes |= dict(strong_images=config.strong_size, pgd50_images=config.pgd50_size,
                      aa_images=config.autoattack_size)
    parts = {name: dataset.test.take(slice(size)) for name, size in sizes.items() if size}
    return {name: part for name, part in parts.items() if len(part) > known.get(name, 0)}


def final_evaluation(model: nn.Module, dataset: Dataset, config: TrainConfig,
                     known: dict[str, Any] | None = None, best: bool = False) -> dict[str, Any]:
    """Test accuracies, each with its number of images, and the energies that PGD moves: clean,
    FGSM, PGD; as far as asked for the strong suite, PGD-50-10, AutoAttack. All run in the precision
    of the weights, BatchNorm in eval mode. ``known``: results that are kept."""
    out, eps, norm = dict(known or {}), config.eps, config.norm
    parts = lacking(out, dataset, config, best)
    if test := parts.get("images"):
        record, natural, hard = _accuracies(model, test, config, config.final_steps)
        out |= record | dict(pgd_steps=config.final_steps, images=len(test))
        summary = evaluation.energy_summary(natural, hard, test.labels)
        out |= {name: summary[name] for name in ("dE", "dEy", "aae")}
    if part := parts.get("strong_images"):
        strong = evaluation.strong_accuracy(model, part, eps, norm=norm)
        out |= dict(strong=strong, strong_images=len(part))
    if part := parts.get("pgd50_images"):
        value = evaluation.pgd50_accuracy(model, part, eps, norm=norm)
        out |= dict(pgd50=value, pgd50_images=len(part), pgd50_alpha=eps / 4)
    if part := parts.get("aa_images"):
        robust = evaluation.autoattack_mask(model, part, eps, norm).double().mean().item()
        package = f"pyautoattack {version('pyautoattack')}"
        out |= dict(aa=robust, aa_images=len(part), aa_package=package)
    return {name: round(v, 6) if isinstance(v, float) else v for name, v in out.items()}

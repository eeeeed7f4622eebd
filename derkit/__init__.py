"""derkit: energies of classifiers, adversarial training with DER, its diagnosis, and generation.

A kit for "Understanding Adversarial Training with Energy-based Models" (arXiv 2505.22486)."""

from derkit.attacks import fgsm, n_fgsm, pgd, rs_fgsm
from derkit.checkpoint import load_checkpoint, load_model, load_pretrained, pretrained
from derkit.checkpoint import save_checkpoint as save_checkpoint
from derkit.config import GenerateConfig, TrainConfig, parse_eps
from derkit.data import Dataset, Split, load_dataset
from derkit.diagnosis.evaluation import autoattack, robust_accuracy, strong_accuracy
from derkit.diagnosis.overfitting import co_onset, robust_overfitting
from derkit.energy import (
    abnormal_mask,
    delta_energy,
    joint_energy,
    marginal_energy,
    trades_decomposition,
)
from derkit.generation.extractor import extractor_for
from derkit.generation.generate import Samples, generate, load_samples, prepare
from derkit.generation.metrics import metrics_table
from derkit.models import Normalize, build_model
from derkit.records import Run, load_runs
from derkit.training import der
from derkit.training.loop import train
from derkit.util import DerkitError

__version__ = "0.2.0"
__all__ = [
    "Dataset", "DerkitError", "GenerateConfig", "Normalize", "Run", "Samples", "Split",
    "TrainConfig", "abnormal_mask", "autoattack", "build_model", "co_onset", "delta_energy", "der",
    "extractor_for", "fgsm", "generate", "joint_energy", "load_checkpoint", "load_dataset",
    "load_model", "load_pretrained", "load_runs", "load_samples", "marginal_energy",
    "metrics_table", "n_fgsm", "parse_eps", "pgd", "prepare", "pretrained", "robust_accuracy",
    "robust_overfitting", "rs_fgsm", "save_checkpoint", "strong_accuracy", "trades_decomposition",
    "train"]

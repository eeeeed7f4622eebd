"""derkit: energies of classifiers, adversarial training with DER, its diagnosis, and generation.

A kit for "Understanding Adversarial Training with Energy-based Models" (arXiv 2505.22486)."""

from derkit.attacks import fgsm, n_fgsm, pgd, rs_fgsm
from derkit.checkpoint import load_checkpoint, load_model, load_pretrained, pretrained
from derkit.checkpoint import save_checkpoint as save_checkpoint
from derkit.config import GenerateConfig, TrainConfig, parse_eps
from derkit.data import Dataset, Split, load_dataset
from derkit.diagnosis.evaluation import autoattack_mask, robust_accuracy, strong_accuracy
from derkit.diagnosis.overfitting import co_onset, robust_overfitting
from derkit.energy import abnormal_mask, delta_energy, joint_energy, marginal_energy
from derkit.energy import trades_decomposition as trades_decomposition
from derkit.generation.extractor import extractor_for
from derkit.generation.generate import Samples, generate, load_samples, prepare
from derkit.generation.metrics import metrics_table
from derkit.models import Normalize, build_model
from derkit.records import Run, load_runs
from derkit.training import der
from derkit.training.loop import train
from derkit.util import DerkitError

__version__ = "0.2.0"

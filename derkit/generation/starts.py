"""Where chains start: what the inits know of the training images, and one signature for them all.

``init(draw, pool, config) -> x0 (B, D)``, not yet clipped to [0, 1], from random numbers of `Draw`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from derkit.config import GenerateConfig
from derkit.data import Dataset, to_float
from derkit.util import DerkitError, cached, make_generator, progress

PUBLISHED_SCALE = 0.005 * math.sqrt(4999)  # 0.354 class standard deviations, see `pca_published`
PURPOSES = {"target": 0, "init": 1, "langevin": 2}  # independent streams of one sample


def sample_noise(index: Tensor, count: int, seed: int, purpose: str, step: int = 0,
                 uniform: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
    """(B, count) standard normal numbers, or uniform ones in [0, 1], on the device of index (B,).

    A row is a function of (seed, global index, purpose, step) through numpy's Philox, whatever its
    batch, and a longer row begins as a shorter one. Drawn in float64, rounded to dtype."""
    rows = np.empty((len(index), count))
    for row, number in zip(rows, index.tolist(), strict=True):
        counter = np.array([0, step, PURPOSES[purpose], number], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=seed % 2**128, counter=counter))
        draw = generator.random if uniform else generator.standard_normal
        draw(out=row)
    return torch.from_numpy(rows).to(dtype).to(index.device)


class ClassPCA(NamedTuple):
    """PCA of one class."""

    mean: Tensor  # (D,)
    directions: Tensor  # (R, D), orthonormal rows
    std: Tensor  # (R,) along them: singular value / sqrt(n_c - 1)


class Pool(NamedTuple):
    """Training images by class, and the fits that an init asked for."""

    images: Tensor  # (N, C, H, W) uint8
    rows: list[Tensor]  # of each class, the indices of its images
    near: Tensor  # (N, k) indices of the neighbours inside the class (of the chosen classes)
    pca: dict[int, ClassPCA]
    dtype: torch.dtype

    def flat(self, index: Tensor) -> Tensor:
        """Images by index, of any shape (...), as floats (..., D) in [0, 1]."""
        return to_float(self.images[index].flatten(index.ndim), self.dtype)


@dataclass(frozen=True)
class Draw:
    """Which samples: global ``index`` (B,), ``labels`` (B,), ``ranks`` (B,) inside their class;
    ``candidate``: 0, or the number of another start for the same sample (``best_of``)."""

    index: Tensor
    labels: Tensor
    ranks: Tensor
    seed: int
    candidate: int = 0

    def numbers(self, n: int, pool: Pool, uniform: bool = False) -> Tensor:
        """(B, n) random numbers of the samples for this candidate."""
        return sample_noise(self.index, n, self.seed, "init", self.candidate, uniform, pool.dtype)

    def anchors(self, pool: Pool) -> Tensor:
        """The index of a training image of the class for every sample, (B,). Without replacement:
        a class's images are used up in a random order before any comes again."""
        out = []
        for c, rank in zip(self.labels.tolist(), self.ranks.tolist(), strict=True):
            lap, place = divmod(rank, len(pool.rows[c]))
            generator = make_generator("cpu", "anchors", self.seed, c, lap)
            order = torch.randperm(len(pool.rows[c]), generator=generator)
            out.append(pool.rows[c][order[place]])
        return torch.stack(out)


def class_pca(x: Tensor, retained: float = 1.0) -> ClassPCA:
    """PCA of images x (n, D), up to the component that reaches ``retained`` of the variance, in
    float64 through the smaller Gram matrix. The largest coordinate of a direction is positive."""
    n, d = x.shape
    mean = x.double().mean(0)
    centred = x - mean
    wide = n <= d
    values, vectors = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    share = values.cumsum(0) / values.sum()
    used = values > values[0] * 1e-10  # the rest is rounding, not variance
    keep = min(int((share < retained - 1e-9).sum()) + 1, n - 1, int(used.sum()))
    values, vectors = values[:keep], vectors[:, :keep]
    rows = (centred.T @ vectors / values.sqrt()).T if wide else vectors.T
    rows = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    return ClassPCA(mean.float(), rows.float(), (values / (n - 1)).sqrt().float())


def neighbours(x: Tensor, k: int, rank: int) -> Tensor:
    """(n, k) indices of the k nearest others of every row of x (n, D), nearest first, by L2 in
    the first ``rank`` principal coordinates."""
    mean, directions, _ = class_pca(x)
    z, exact = (x - mean) @ directions[:rank].T, "donot_use_mm_for_euclid_dist"
    near = []
    for part in torch.arange(len(z), device=z.device).split(2048):
        distance = torch.cdist(z[part], z, compute_mode=exact)
        distance[torch.arange(len(part)), part] = torch.inf  # a copy of a row may come first
        near.append(distance.topk(k, largest=False).indices)
    return torch.cat(near)


def fit_pool(dataset: Dataset, classes: Sequence[int], config: GenerateConfig,
             dtype: torch.dtype = torch.float32) -> Pool:  # fmt: skip
    """What the config's init needs of the training images of some classes, cached by the data's
    sha256. Raises DerkitError where a class has too few images."""
    needs = FITS.get(config.init)
    k = config.k if needs == "near" else 0
    images, labels, sha256 = dataset.train.images, dataset.train.labels, dataset.sha256
    rows = [(labels == c).nonzero().squeeze(1) for c in range(len(dataset.classes))]
    why = f"k={k} neighbours beside the anchor need {k + 1}" if k else "an init needs 2"
    for c in classes:
        if len(rows[c]) < max(k + 1, 2):
            raise DerkitError(f"{why} images, but class {dataset.classes[c]!r} has {len(rows[c])}.")
    pool = Pool(images, rows, labels.new_zeros(len(labels), k), {}, dtype)
    for c in progress(classes, desc="class PCA") if needs else ():
        x = to_float(images[rows[c]].flatten(1))
        if needs == "pca":
            fit = cached("pca", (sha256, c, round(config.kept, 6)), class_pca, x, config.kept)
            pool.pca[c] = ClassPCA(*(t.to(images.device, dtype) for t in fit))
        else:
            most = min(max(k, 128), len(x) - 1)  # one fit for all k up to 128
            [near] = cached("near", (sha256, c, most, config.rank), neighbours, x, most,
                            config.rank)
            pool.near[rows[c]] = rows[c][near[:, :k].to(images.device)]
    return pool


def uniform(draw: Draw, pool: Pool, config: GenerateConfig) -> Tensor:
    """x0 ~ U[0, 1] per pixel: no knowledge of the data."""
    return draw.numbers(pool.images[0].numel(), pool, uniform=True)


def class_gaussian(draw: Draw, pool: Pool, config: GenerateConfig) -> Tensor:
    """x0 ~ N(mu_c, scale^2 S_c), the exact class Gaussian (Santurkar'19, JEM++), undecomposed:
    mu_c + scale / sqrt(n_c - 1) sum_i g_i (x_i - mu_c), g ~ N(0, I) over the n_c images."""
    g = config.scale * draw.numbers(max(map(len, pool.rows)), pool)
    out = g.new_empty(len(g), pool.images[0].numel())
    for c in draw.labels.unique().tolist():
        x, mine = pool.flat(pool.rows[c]), draw.labels == c
        mean = x.mean(0)
        out[mine] = mean + g[mine, : len(x)] @ (x - mean) / math.sqrt(len(x) - 1)
    return out


def pca(draw: Draw, pool: Pool, config: GenerateConfig) -> Tensor:
    """Class PCA at a chosen spread: mu_c + scale sum_i std_i g_i U_i, components up to
    ``retained`` of the variance. At scale 1 the baseline that locality has to beat."""
    g = config.scale * draw.numbers(max(len(fit.std) for fit in pool.pca.values()), pool)
    out = g.new_empty(len(g), pool.images[0].numel())
    for c in draw.labels.unique().tolist():
        fit, mine = pool.pca[c], draw.labels == c
        out[mine] = fit.mean + g[mine, : len(fit.std)] * fit.std @ fit.directions
    return out


def pca_published(draw: Draw, pool: Pool, config: GenerateConfig) -> Tensor:
    """Class PCA of the ECCV'24 code (arXiv 2407.06315): mu_c + sum_i s_i a_i U_i,
    a_i ~ N(0, 0.005^2), s_i singular values, without the component that reaches ``retained``.

    As s_i = sqrt(n_c - 1) std_i, that is 0.005 sqrt(4999) = 0.354 class standard deviations on
    CIFAR-10, and would be another spread at another class size: this kit keeps 0.354 for all."""
    fits = {c: ClassPCA(fit.mean, fit.directions[:-1], fit.std[:-1]) for c, fit in pool.pca.items()}
    return pca(draw, pool._replace(pca=fits), config.change(scale=PUBLISHED_SCALE))


def local_pca(draw: Draw, pool: Pool, config: GenerateConfig) -> Tensor:
    """Local class-wise PCA. The abstract of arXiv 2505.22486 names it; the formula is our reading:

        anchor a ~ class c, N = its k nearest neighbours in class-PCA coordinates, m = their mean
        x0 = m + tau / sqrt(k - 1) sum_j g_j (N_j - m),  g ~ N(0, I_k)

    exactly N(m, tau^2 S_local). Small k and tau: near copies; large k: the class Gaussian."""
    mean, deviation = local_parts(draw, pool, config)
    return mean + config.tau * deviation


def local_parts(draw: Draw, pool: Pool, config: GenerateConfig) -> tuple[Tensor, Tensor]:
    """(m, d), both (B, D): mean of the anchor's neighbours, d ~ N(0, S_local); x0 = m + tau d."""
    near = pool.flat(pool.near[draw.anchors(pool)])  # (B, k, D)
    mean = near.mean(1)
    near = near - mean[:, None]
    g = draw.numbers(config.k, pool)[:, None] / math.sqrt(config.k - 1)
    if config.kept < 1:  # project the coefficients onto the largest principal directions
        u, s, _ = torch.linalg.svd(near, full_matrices=False)
        before = s.square().cumsum(1) - s.square()  # variance of the larger ones
        u = u * (before < (config.kept - 1e-9) * s.square().sum(1, keepdim=True))[:, None]
        g = g @ u @ u.transpose(1, 2)
    return mean, (g @ near).squeeze(1)


def noisy_images(draw: Draw, pool: Pool, config: GenerateConfig) -> Tensor:
    """A training image (ECCV'24: a test image) of the class plus N(0, image_noise^2) per pixel."""
    x = pool.flat(draw.anchors(pool))
    return x + config.image_noise * draw.numbers(x.shape[1], pool)


INITS = dict(uniform=uniform, class_gaussian=class_gaussian, pca_published=pca_published, pca=pca,
             local_pca=local_pca, noisy_images=noisy_images)
FITS = dict(pca_published="pca", pca="pca", local_pca="near")  # inits that work on a fit

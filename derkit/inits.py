"""Where chains start: one signature for every init, by name.

``init(draw, pool, config) -> x0 (B, D)``, not yet clipped to [0, 1]. All randomness of a sample comes from its `Draw`,
that is from its global index: x0 does not depend on the batch. Adding one: a function under ``@init``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from derkit import keyed
from derkit.evaluation import make_generator
from derkit.fits import Pool
from derkit.gen_config import GenerateConfig

PUBLISHED_SCALE = 0.005 * math.sqrt(4999)  # 0.354 class standard deviations, see `pca_published`


@dataclass(frozen=True)
class Draw:
    """Which samples: global ``index`` (B,), ``labels`` (B,), ``ranks`` (B,) = place of the sample inside its class,
    seed.

    ``candidate``: 0, or the number of another start for the same sample (``best_of``).
    """

    index: Tensor
    labels: Tensor
    ranks: Tensor
    seed: int
    candidate: int = 0

    def normal(self, count: int, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """(B, count) standard normal numbers of the samples (or of those in ``rows``)."""
        index = self.index if rows is None else self.index[rows]
        return keyed.normal(index, count, self.seed, "init", self.candidate, dtype)

    def by_class(self) -> Iterator[tuple[int, Tensor]]:
        """(class, positions in the batch) for every class in the batch."""
        for c in self.labels.unique().tolist():
            yield c, (self.labels == c).nonzero().squeeze(1)

    def anchors(self, pool: Pool) -> Tensor:
        """A training image of the class for every sample, (B,), as a position inside the class.

        Without replacement: the class's images are used up in a random order before any of them comes again.
        """
        out = torch.empty_like(self.labels)
        for c, mine in self.by_class():
            n, ranks = len(pool.rows[c]), self.ranks[mine]
            for lap in (ranks // n).unique().tolist():
                order = torch.randperm(n, generator=make_generator("cpu", "anchors", self.seed, c, lap)).to(out.device)
                here = ranks // n == lap
                out[mine[here]] = order[ranks[here] % n]
        return out


@dataclass(frozen=True)
class Init:
    """A row of INITS. ``needs``: the fit that it works on ('', 'pca' or 'near')."""

    start: Callable[[Draw, Pool, GenerateConfig], Tensor]
    needs: str = ""


INITS: dict[str, Init] = {}


def init(name: str, needs: str = ""):
    """Register a function as an init."""

    def register(start: Callable[[Draw, Pool, GenerateConfig], Tensor]):
        INITS[name] = Init(start, needs)
        return start

    return register


@init("uniform")
def uniform(draw: Draw, pool: Pool, config: GenerateConfig) -> Tensor:
    """x0 ~ U[0, 1) per pixel: no knowledge of the data."""
    return keyed.uniform(draw.index, math.prod(pool.shape), draw.seed, "pixels", draw.candidate, pool.dtype)


@init("class_gaussian")
def class_gaussian(draw: Draw, pool: Pool, config: GenerateConfig) -> Tensor:
    """x0 ~ N(mu_c, scale^2 S_c), the exact class Gaussian (Santurkar'19, JEM++), without a decomposition:
    mu_c + scale / sqrt(n_c - 1) sum_i g_i (x_i - mu_c), g ~ N(0, I) over the n_c images of the class."""
    out = torch.empty(len(draw.index), math.prod(pool.shape), dtype=pool.dtype, device=draw.index.device)
    for c, mine in draw.by_class():
        x = pool.flat(pool.rows[c])
        mean = x.mean(0)
        g = draw.normal(len(x), pool.dtype, mine)
        out[mine] = mean + config.scale / math.sqrt(len(x) - 1) * (g @ (x - mean))
    return out


def _class_pca(draw: Draw, pool: Pool, scale: float, retained: float, exclude_last: bool) -> Tensor:
    """mu_c + scale sum_{i <= R} std_i g_i U_i."""
    out = torch.empty(len(draw.index), math.prod(pool.shape), dtype=pool.dtype, device=draw.index.device)
    for c, mine in draw.by_class():
        fit = pool.pca[c]
        r = fit.components(retained, exclude_last)
        g = draw.normal(r, pool.dtype, mine) if r else torch.zeros(len(mine), 0, dtype=pool.dtype, device=out.device)
        out[mine] = fit.mean + scale * (g * fit.std[:r]) @ fit.directions[:r]
    return out


@init("pca_published", needs="pca")
def pca_published(draw: Draw, pool: Pool, config: GenerateConfig) -> Tensor:
    """Class PCA of the ECCV'24 code: mu_c + sum_i s_i a_i U_i, a_i ~ N(0, 0.005^2), s_i singular values (arXiv
    2407.06315).

    As s_i = sqrt(n_c - 1) std_i, that is 0.005 sqrt(4999) = 0.354 class standard deviations on CIFAR-10, and would be
    another spread at every other class size. This kit keeps 0.354 for all. The component that reaches ``retained`` is
    left out, as there.
    """
    return _class_pca(draw, pool, PUBLISHED_SCALE, config.kept, exclude_last=True)


@init("pca", needs="pca")
def pca(draw: Draw, pool: Pool, config: GenerateConfig) -> Tensor:
    """Class PCA at a chosen spread: mu_c + scale sum_i std_i g_i U_i, components up to ``retained`` of the variance.

    At scale 1 the baseline that any credit for locality has to beat.
    """
    return _class_pca(draw, pool, config.scale, config.kept, exclude_last=False)


def neighbourhood(draw: Draw, pool: Pool, k: int) -> Tensor:
    """The k nearest neighbours (B, k, D) of every sample's anchor inside its class."""
    anchors = draw.anchors(pool)
    index = torch.empty(len(anchors), k, dtype=torch.int64, device=anchors.device)
    for c, mine in draw.by_class():
        index[mine] = pool.rows[c][pool.near[c][anchors[mine]]]
    return pool.flat(index)


def local_parts(draw: Draw, pool: Pool, config: GenerateConfig) -> tuple[Tensor, Tensor]:
    """(m, d), both (B, D): the mean of the anchor's neighbours and a draw d ~ N(0, S_local), so that x0 = m + tau d."""
    near = neighbourhood(draw, pool, config.k)
    mean = near.mean(1)
    near = near - mean[:, None]
    g = draw.normal(config.k, pool.dtype) / math.sqrt(config.k - 1)
    if config.kept < 1:
        g = _project(near, g, config.kept)
    return mean, torch.bmm(g[:, None], near).squeeze(1)


def _project(near: Tensor, g: Tensor, retained: float) -> Tensor:
    """Coefficients g (B, k) restricted to the principal directions of each neighbourhood that reach ``retained``.

    With N N^T = V diag(l) V^T, the draw sum_j g_j N_j has independent parts along the rows of V^T: dropping small
    ones is a projection of g.
    """
    values, vectors = torch.linalg.eigh(near @ near.transpose(1, 2))
    share = values.flip(1).clamp_min(0)
    share = share.cumsum(1) / share.sum(1, keepdim=True).clamp_min(1e-30)
    count = (share < retained - 1e-9).sum(1, keepdim=True) + 1
    keep = torch.arange(g.shape[1], device=g.device) < count  # (B, k), largest first
    inside = torch.bmm(g[:, None], vectors).squeeze(1) * keep.flip(1)
    return torch.bmm(inside[:, None], vectors.transpose(1, 2)).squeeze(1)


@init("local_pca", needs="near")
def local_pca(draw: Draw, pool: Pool, config: GenerateConfig) -> Tensor:
    """Local class-wise PCA, our reading (the abstract of arXiv 2505.22486 names it, its formula is unknown to us):

        anchor a ~ class c, N = its k nearest neighbours in class-PCA coordinates, m = their mean
        x0 = m + tau / sqrt(k - 1) sum_j g_j (N_j - m),  g ~ N(0, I_k)

    which is exactly N(m, tau^2 S_local). Small k and tau move towards copying, large k towards the class Gaussian.
    """
    mean, deviation = local_parts(draw, pool, config)
    return mean + config.tau * deviation


@init("noisy_images")
def noisy_images(draw: Draw, pool: Pool, config: GenerateConfig) -> Tensor:
    """A training image of the class plus N(0, image_noise^2) per pixel. The ECCV'24 code used test images: ours never
    do."""
    index = torch.empty_like(draw.labels)
    anchors = draw.anchors(pool)
    for c, mine in draw.by_class():
        index[mine] = pool.rows[c][anchors[mine]]
    x = pool.flat(index)
    return x + config.image_noise * draw.normal(x.shape[1], pool.dtype)

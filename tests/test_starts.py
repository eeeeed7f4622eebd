"""Numbers of a sample, class PCA, neighbours, and every init: exact against the definitions."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from derkit.config import GenerateConfig
from derkit.generation import starts
from derkit.generation.starts import INITS, PUBLISHED_SCALE, Draw, fit_pool, local_parts
from derkit.util import DerkitError

NAMES = get_args(GenerateConfig.model_fields["init"].annotation)


def draw(n, first=0, seed=0, candidate=0):
    index = torch.arange(first, first + n)
    return Draw(index, index % 10, index // 10, seed, candidate)


def of_class(c, n, rank=None):
    """n samples of one class, all with the anchor of one rank if it is given."""
    index = torch.arange(n)
    return Draw(index, torch.full_like(index, c), index if rank is None else index * 0 + rank, 0)


def start(draw, dataset, **options):
    config = GenerateConfig(**({"k": 8} | options))
    pool = fit_pool(dataset, range(10), config)
    return INITS[config.init](draw, pool, config), pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_its_distribution(dtype):
    index = torch.arange(400)
    g = starts.sample_noise(index, 501, 7, "init", dtype=dtype)
    u = starts.sample_noise(index, 501, 7, "init", step=1, uniform=True, dtype=dtype)
    assert g.dtype == u.dtype == dtype and g.shape == u.shape == (400, 501)
    assert abs(g.mean()) < 0.01 and abs(g.std() - 1) < 0.01 and abs((g**4).mean() - 3) < 0.1
    assert u.min() >= 0 and u.max() <= 1 and abs(u.mean() - 0.5) < 0.005
    assert (g.T @ g / 400 - torch.eye(501)).abs().mean() < 0.05  # independent columns


def test_noise_belongs_to_seed_index_purpose_and_step():
    index = torch.tensor([5, 2**33 + 5, 7])
    noise = starts.sample_noise(index, 20, 1, "langevin", 3)
    assert torch.equal(noise[2:], starts.sample_noise(torch.tensor([7]), 20, 1, "langevin", 3))
    assert torch.equal(noise[:, :13], starts.sample_noise(index, 13, 1, "langevin", 3))
    wide = starts.sample_noise(index, 20, 1, "langevin", 3, dtype=torch.float64)
    assert torch.equal(noise, wide.float())  # another precision is the same sample
    others = [(1, "langevin", 4), (1, "init", 3), (2, "langevin", 3), (1 + 2**64, "langevin", 3)]
    rows = [noise[0], noise[1], *(starts.sample_noise(index, 20, *other)[0] for other in others)]
    assert torch.stack(rows).corrcoef().fill_diagonal_(0).abs().max() < 0.8  # all different


@pytest.mark.parametrize("n, d", [(30, 50), (80, 20)])
def test_class_pca_against_svd(n, d, seeded):
    x = torch.randn(n, d, generator=seeded(), dtype=torch.float64)
    x = x * torch.linspace(3, 0.1, d, dtype=torch.float64)
    fit, rank = starts.class_pca(x), min(n - 1, d)
    _, s, v = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    np.testing.assert_allclose(fit.std.numpy(), s[:rank] / math.sqrt(n - 1), rtol=1e-5)
    np.testing.assert_allclose(np.abs(fit.directions.numpy()), np.abs(v[:rank]), atol=1e-5)
    np.testing.assert_allclose(fit.mean.numpy(), x.mean(0).numpy(), atol=1e-6)
    assert (fit.directions.gather(1, fit.directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_class_pca_keeps_the_share_of_variance_that_sklearn_does(some):
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = some.train.take(some.train.labels == 3).floats().flatten(1)
    oracle = decomposition.PCA(0.9, svd_solver="full").fit(x.double().numpy())
    fit = starts.class_pca(x, retained=0.9)
    assert len(fit.std) == oracle.n_components_
    np.testing.assert_allclose(fit.std.numpy() ** 2, oracle.explained_variance_, rtol=1e-4)


def test_directions_without_variance_are_not_kept():
    x = torch.ones(10, 6) + torch.eye(10, 6)[:, :1]  # one image differs in one pixel
    assert len(starts.class_pca(x).std) == 1 and len(starts.class_pca(torch.ones(5, 6)).std) == 0


def test_neighbours_are_the_nearest_others_of_the_class(some, seeded):
    x = torch.randn(50, 3, generator=seeded())
    distance = torch.cdist(x, x).fill_diagonal_(torch.inf)
    assert torch.equal(starts.neighbours(x, 5, rank=3), distance.argsort(1)[:, :5])
    near, labels = fit_pool(some, range(10), GenerateConfig(k=6)).near, some.train.labels
    assert (labels[near] == labels[:, None]).all() and (near != torch.arange(400)[:, None]).all()


def test_fits_are_cached_by_the_data(some, home, monkeypatch):
    configs = GenerateConfig(init="pca"), GenerateConfig(k=4)
    first = [fit_pool(some, [0, 1], config) for config in configs]
    files = {kind: list((home / "cache").glob(f"{kind}-*")) for kind in ("pca", "near")}
    assert len(files["pca"]) == len(files["near"]) == 2
    calls, real = [], starts.class_pca
    monkeypatch.setattr(starts, "class_pca", lambda *a: calls.append(1) or real(*a))
    again = [fit_pool(some, [0, 1], config) for config in configs]
    assert not calls and torch.equal(again[0].pca[1].directions, first[0].pca[1].directions)
    assert torch.equal(again[1].near, first[1].near)
    fit_pool(replace(some, sha256="other"), [0], configs[0])
    for file in files["pca"]:  # damaged: made anew
        file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(fit_pool(some, [0], configs[0]).pca[0].std, first[0].pca[0].std)
    assert len(calls) == 2
    monkeypatch.setenv("DERKIT_HOME", "/dev/null")  # cannot be written: skipped
    assert fit_pool(some, [0], configs[0]).pca and len(calls) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_start_depends_on_its_number_only(name, some):
    whole, _ = start(draw(30), some, init=name)
    assert whole.shape == (30, 784) and torch.isfinite(whole).all()
    part, _ = start(draw(7, first=12), some, init=name)
    assert torch.allclose(part, whole[12:19], atol=1e-5)  # products of other shapes round otherwise
    others = [start(d, some, init=name)[0] for d in (draw(30, seed=1), draw(30, candidate=1))]
    assert all((other - whole).abs().mean() > 0.01 for other in others)


def test_published_pca_has_its_scale_whatever_the_class_size(some, mini):
    assert abs(PUBLISHED_SCALE - 0.354) < 5e-4
    for data in (some, mini):  # 40 and 400 images a class
        x, pool = start(of_class(2, 600), data, init="pca_published")
        fit = pool.pca[2]
        along = (x - fit.mean) @ fit.directions.T
        assert along[:, -1].abs().max() < 1e-4  # the component that reaches 95 % is left out
        ratio = along[:, :-1].std(0) / (PUBLISHED_SCALE * fit.std[:-1])
        assert abs(ratio.mean() - 1) < 0.02 and (ratio - 1).abs().max() < 0.2


@pytest.mark.parametrize("name", ["pca", "class_gaussian"])
def test_gaussian_inits_have_the_class_moments(name, some):
    x, pool = start(of_class(0, 4000), some, init=name, scale=0.8, retained=1.0)
    images = pool.flat(pool.rows[0])
    assert (x.mean(0) - images.mean(0)).abs().max() < 0.03
    covariance, expected = torch.cov(x.T), 0.64 * torch.cov(images.T)
    assert (covariance - expected).norm() < 0.15 * expected.norm()


def test_local_pca_is_the_local_gaussian(some):
    """Covariance of the draws against its definition, tau^2 times that of the neighbours."""
    draws, config = of_class(5, 3000, rank=3), GenerateConfig(k=6, tau=0.5)
    pool = fit_pool(some, [5], config)
    mean, deviation = local_parts(draws, pool, config)
    near = pool.flat(pool.near[draws.anchors(pool)[0]])
    assert torch.allclose(mean, near.mean(0).expand_as(mean), atol=1e-6)
    covariance, expected = torch.cov(deviation.T), torch.cov(near.T)
    assert (covariance - expected).norm() < 0.1 * expected.norm()
    x = INITS["local_pca"](draws, pool, config)
    assert torch.allclose(x - mean, 0.5 * deviation, atol=1e-6)
    assert torch.equal(INITS["local_pca"](draws, pool, config.change(tau=0)), mean)


def test_retained_variance_projects_onto_the_largest_directions(some):
    draws, config = of_class(0, 200, rank=0), GenerateConfig(k=8, retained=0.6)
    pool = fit_pool(some, [0], config)
    _, every = local_parts(draws, pool, config.change(retained=1))
    _, few = local_parts(draws, pool, config)
    near = pool.flat(pool.near[draws.anchors(pool)[0]])
    _, s, v = torch.linalg.svd(near - near.mean(0), full_matrices=False)
    r = int((s.square().cumsum(0) < 0.6 * s.square().sum()).sum()) + 1
    assert 1 <= r < 7 and torch.allclose(few, every @ v[:r].T @ v[:r], atol=1e-4)


def test_anchors_come_without_replacement(some):
    pool = fit_pool(some, range(10), GenerateConfig(init="uniform"))
    draws = draw(800)  # 80 samples a class, of 40 images
    anchors = draws.anchors(pool)
    for c in range(10):
        mine = anchors[draws.labels == c].tolist()
        assert sorted(mine[:40]) == sorted(mine[40:]) == pool.rows[c].tolist()
        assert mine[:40] != mine[40:]


def test_uniform_and_noisy_images(some):
    x, _ = start(draw(40), some, init="uniform")
    assert x.min() >= 0 and x.max() <= 1 and abs(x.mean() - 0.5) < 0.01
    noisy, pool = start(draw(40), some, init="noisy_images", image_noise=0.2)
    assert abs((noisy - pool.flat(draw(40).anchors(pool))).std() - 0.2) < 0.004


def test_too_few_images_of_a_class(some):
    with pytest.raises(DerkitError, match="k=40 neighbours .* need 41 images, but class 't-shirt'"):
        fit_pool(some, range(10), GenerateConfig(k=40))
    fit_pool(some, range(2), GenerateConfig(k=39))
    one = replace(some, train=some.train.take(slice(1)), sha256="one")
    with pytest.raises(DerkitError, match="an init needs 2 images, but class 't-shirt' has 1"):
        fit_pool(one, [0], GenerateConfig(init="uniform"))


def test_no_image_is_its_own_neighbour_beside_copies():
    """Of equal images any may come first in a search; the image itself is left out all the same."""
    x = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    near = starts.neighbours(x, k=4, rank=5)
    assert (near != torch.arange(18)[:, None]).all() and near.shape == (18, 4)
    assert (near[:, :2] % 6 == torch.arange(18)[:, None] % 6).all()  # its two copies come first

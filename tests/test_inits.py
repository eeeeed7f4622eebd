"""Keyed noise, class PCA, neighbours, and every init: what it draws, from the sample's number only."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from derkit import fits, keyed
from derkit.errors import DerkitError
from derkit.fits import class_pca, fit_pool, neighbours
from derkit.gen_config import INIT_NAMES, STOP_NAMES, GenerateConfig, help_text
from derkit.inits import INITS, PUBLISHED_SCALE, Draw, local_parts, neighbourhood


@pytest.fixture(scope="module")
def some(mini):
    """40 training images of each class."""
    index = torch.cat([(mini.train.labels == c).nonzero().squeeze(1)[:40] for c in range(10)])
    return replace(mini, train=mini.train.take(index), sha256="some")


def draw(n, classes=10, seed=0, start=0, candidate=0):
    index = torch.arange(start, start + n)
    return Draw(index, index % classes, index // classes, seed, candidate)


def start(name, d, dataset, **options):
    config = GenerateConfig.make(init=name, **({"k": 8} | options))
    needs = INITS[name].needs
    options = dict(pca=config.kept) if needs == "pca" else dict(k=config.k) if needs == "near" else {}
    pool = fit_pool(dataset, range(10), **options)
    return INITS[name].start(d, pool, config), pool


# ---------------------------------------------------------------------------------------------------------- noise
@pytest.mark.parametrize(
    "counter, key, words",
    [  # known answers of the Random123 distribution
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert keyed.philox(torch.tensor([counter]), key)[0].tolist() == words


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keyed_numbers_have_the_right_distribution(dtype):
    index = torch.arange(400)
    g, u = keyed.normal(index, 501, 7, "init", dtype=dtype), keyed.uniform(index, 501, 7, "pixels", dtype=dtype)
    assert g.dtype == u.dtype == dtype and g.shape == u.shape == (400, 501)
    assert abs(g.mean()) < 0.01 and abs(g.std() - 1) < 0.01 and abs((g**4).mean() - 3) < 0.1
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert (g.T @ g / 400 - torch.eye(501, dtype=dtype)).abs().mean() < 0.05  # columns are independent


def test_keyed_numbers_belong_to_the_sample():
    index = torch.tensor([5, 2**33 + 5, 7])
    all_of_them = keyed.normal(index, 20, 1, "langevin", 3)
    assert torch.equal(all_of_them[2:], keyed.normal(torch.tensor([7]), 20, 1, "langevin", 3))
    for other in (("langevin", 4, 1), ("init", 3, 1), ("langevin", 3, 2)):
        purpose, step, seed = other
        assert not torch.equal(all_of_them, keyed.normal(index, 20, seed, purpose, step))
    assert torch.equal(all_of_them[:, :13], keyed.normal(index, 13, 1, "langevin", 3))
    assert not torch.equal(all_of_them[0], all_of_them[1])  # 2^33 apart
    with pytest.raises(DerkitError, match="Did you mean 'langevin'"):
        keyed.normal(index, 3, 0, "langevine")


# ------------------------------------------------------------------------------------------------------------ PCA
@pytest.mark.parametrize("n, d", [(30, 50), (80, 20)])
def test_class_pca_against_svd(n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.diag(
        torch.linspace(3, 0.1, d, dtype=torch.float64)
    )
    fit = class_pca(x)
    rank = min(n - 1, d)
    _, s, v = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    assert len(fit.std) == rank
    np.testing.assert_allclose(fit.std.numpy(), s[:rank] / math.sqrt(n - 1), rtol=1e-5)
    np.testing.assert_allclose(np.abs(fit.directions.numpy()), np.abs(v[:rank]), atol=1e-5)
    np.testing.assert_allclose(fit.mean.numpy(), x.mean(0).numpy(), atol=1e-6)
    assert (fit.directions.gather(1, fit.directions.abs().argmax(1, keepdim=True)) > 0).all()
    assert fit.share.sum().item() == pytest.approx(1, abs=1e-5)


def test_class_pca_against_sklearn(some):
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = some.train.take(some.train.labels == 3).floats().flatten(1)
    oracle = decomposition.PCA(svd_solver="full").fit(x.double().numpy())
    fit = class_pca(x, retained=0.9)
    r = len(fit.std)
    assert r == int((np.cumsum(oracle.explained_variance_ratio_) < 0.9).sum()) + 1
    np.testing.assert_allclose(fit.std.numpy() ** 2, oracle.explained_variance_[:r], rtol=1e-4)
    np.testing.assert_allclose(np.abs(fit.directions.numpy()), np.abs(oracle.components_[:r]), atol=1e-4)


def test_components_at_a_share_of_variance():
    fit = fits.ClassPCA(torch.zeros(4), torch.eye(4), torch.ones(4), torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert [fit.components(r) for r in (0.5, 0.6, 0.8, 0.81, 1.0)] == [1, 2, 2, 3, 4]
    assert [fit.components(r, exclude_last=True) for r in (0.3, 0.6, 0.95)] == [0, 1, 2]  # the published off-by-one


def test_constant_class_has_no_directions_of_rounding():
    fit = class_pca(torch.ones(10, 6) + torch.eye(10, 6)[:, :1])  # one image differs in one pixel
    assert len(fit.std) == 1


def test_neighbours_leave_the_row_itself_out():
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    found = neighbours(z, 5, chunk=16)
    distance = torch.cdist(z, z).fill_diagonal_(torch.inf)
    assert torch.equal(found, distance.argsort(1)[:, :5])


def test_fits_are_cached_by_the_data(some, home, monkeypatch):
    first = fit_pool(some, [0, 1], pca=0.9, k=4)
    assert len(list((home / "cache").glob("pca-*.pt"))) == len(list((home / "cache").glob("near-*.pt"))) == 2
    calls = []
    real = fits.class_pca
    monkeypatch.setattr(fits, "class_pca", lambda *a, **k: calls.append(1) or real(*a, **k))
    again = fit_pool(some, [0, 1], pca=0.9, k=4)
    assert not calls and torch.equal(again.pca[1].directions, first.pca[1].directions)
    assert torch.equal(again.near[0], first.near[0])
    fit_pool(replace(some, sha256="other"), [0], pca=0.9)
    assert len(calls) == 1
    for file in (home / "cache").glob("pca-*.pt"):
        file.write_bytes(file.read_bytes()[:100])  # a damaged cache is made anew
    assert torch.equal(fit_pool(some, [0], pca=0.9).pca[0].std, first.pca[0].std) and len(calls) == 2


# ---------------------------------------------------------------------------------------------------------- inits
@pytest.mark.parametrize("name", INIT_NAMES)
def test_a_start_depends_on_its_number_only(name, some):
    whole, pool = start(name, draw(30), some)
    assert whole.shape == (30, 784) and torch.isfinite(whole).all()
    part, _ = start(name, draw(7, start=12), some)
    assert torch.allclose(part, whole[12:19], atol=1e-6)
    other, _ = start(name, draw(30, seed=1), some)
    candidate, _ = start(name, draw(30, candidate=1), some)
    assert (other - whole).abs().mean() > 0.01 and (candidate - whole).abs().mean() > 0.01


def test_every_name_of_the_config_is_an_init():
    assert set(INITS) == set(INIT_NAMES)


def class_spread(x, images):
    """Root mean square distance from the class mean, in units of the class's."""
    mean = images.mean(0)
    return ((x - mean).square().sum(1).mean() / (images - mean).square().sum(1).mean()).sqrt().item()


def test_published_pca_keeps_its_spread_whatever_the_class_size(some, mini):
    assert abs(PUBLISHED_SCALE - 0.354) < 5e-4
    for data in (some, mini):  # 40 and 400 images a class
        index = torch.arange(400)
        one = Draw(index, torch.full_like(index, 2), index, 0)
        x, pool = start("pca_published", one, data)
        spread = class_spread(x, pool.flat(pool.rows[2]))
        assert spread == pytest.approx(0.354 * math.sqrt(0.95), rel=0.06)  # 95 % of the variance
    scaled, _ = start("pca", one, mini, scale=PUBLISHED_SCALE)
    assert (scaled - x).norm() < 0.25 * (scaled - pool.pca[2].mean).norm()  # the same but for one component


@pytest.mark.parametrize("name", ["pca", "class_gaussian"])
def test_gaussian_inits_have_the_class_moments(name, some):
    index = torch.arange(4000)
    one = Draw(index, torch.zeros_like(index), index, 0)
    x, pool = start(name, one, some, scale=0.8, retained=1.0)
    images = pool.flat(pool.rows[0])
    assert (x.mean(0) - images.mean(0)).abs().max() < 0.03
    covariance, expected = torch.cov(x.T), 0.64 * torch.cov(images.T)
    assert (covariance - expected).norm() < 0.15 * expected.norm()


def test_local_pca_is_the_local_gaussian(some):
    index = torch.arange(3000)
    one = Draw(index, torch.full_like(index, 5), torch.full_like(index, 3), 0)  # the same rank: the same anchor
    config = GenerateConfig.make(k=6, tau=0.5)
    pool = fit_pool(some, [5], k=6)
    mean, deviation = local_parts(one, pool, config)
    near = neighbourhood(one, pool, 6)[0]
    assert torch.allclose(mean[0], near.mean(0), atol=1e-6) and (mean == mean[0]).all()
    covariance, expected = torch.cov(deviation.T), torch.cov(near.T)
    assert (covariance - expected).norm() < 0.1 * expected.norm()
    x = INITS["local_pca"].start(one, pool, config)
    assert torch.allclose(x - mean, 0.5 * deviation, atol=1e-6)
    still = INITS["local_pca"].start(one, pool, config.change(tau=0.0))
    assert torch.equal(still, mean)


def test_neighbours_are_of_the_class_and_not_the_anchor(some):
    pool = fit_pool(some, range(10), k=6)
    d = draw(100)
    near, anchors = neighbourhood(d, pool, 6), d.anchors(pool)
    for i in range(100):
        c = int(d.labels[i])
        images = pool.flat(pool.rows[c])
        distance = torch.cdist(near[i], images)
        assert (distance.min(1).values < 0.02).all()  # members of the class
        assert (near[i] - images[anchors[i]]).norm(dim=1).min() > 0.02


def test_retained_variance_of_a_neighbourhood_lowers_the_rank(some):
    pool = fit_pool(some, [0], k=8)
    index = torch.arange(200)
    one = Draw(index, torch.zeros_like(index), torch.zeros_like(index), 0)
    _, every = local_parts(one, pool, GenerateConfig.make(k=8))
    _, few = local_parts(one, pool, GenerateConfig.make(k=8, retained=0.6))
    rank = [torch.linalg.matrix_rank(d.double(), rtol=1e-4).item() for d in (every, few)]
    assert rank[0] == 7 and 1 <= rank[1] < 7
    share = few.square().sum() / every.square().sum()
    assert 0.5 < share < 0.95
    _, same = local_parts(one, pool, GenerateConfig.make(k=8, retained=1.0))
    assert torch.equal(same, every)


def test_anchors_come_without_replacement(some):
    pool = fit_pool(some, range(10))
    d = draw(800)  # 80 samples a class, of 40 images
    anchors = d.anchors(pool)
    for c in range(10):
        mine = anchors[d.labels == c]
        assert sorted(mine[:40].tolist()) == sorted(mine[40:].tolist()) == list(range(40))
        assert mine[:40].tolist() != mine[40:].tolist()


def test_uniform_and_noisy_images(some):
    x, _ = start("uniform", draw(40), some)
    assert x.min() >= 0 and x.max() < 1 and abs(x.mean() - 0.5) < 0.01
    d = draw(40)
    noisy, pool = start("noisy_images", d, some, image_noise=0.2)
    images = torch.stack([pool.flat(pool.rows[c])[a] for c, a in zip(d.labels, d.anchors(pool), strict=True)])
    assert (noisy - images).std().item() == pytest.approx(0.2, rel=0.02)


# --------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "options, words",
    [
        (dict(init="local_pcs"), "unknown init 'local_pcs'. Did you mean 'local_pca'"),
        (dict(stop="quantil"), "unknown stop 'quantil'. Did you mean 'quantile'"),
        (dict(rule="norm"), "unknown rule"),
        (dict(n=0), "n must be at least 1"),
        (dict(n="many"), "n must be a whole number"),
        (dict(k=1), "k must be at least 2"),
        (dict(tua=1), "unknown parameter 'tua'. Did you mean 'tau'"),
        (dict(momentum=1.0), "momentum must be below 1"),
        (dict(low=0.6, high=0.4), "0 <= low <= high <= 1"),
        (dict(high=1.5), "0 <= low <= high <= 1"),
        (dict(retained=0), "retained is a share"),
        (dict(p_min=1.0), "p_min is a probability"),
        (dict(noise=-1), "noise must be at least 0"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(DerkitError) as error:
        GenerateConfig.make(**options)
    assert words in str(error.value)


def test_config_reads_text_and_hashes_what_matters():
    config = GenerateConfig.make(n="1e2", tau="0.5", retained="auto", batch_size="7")
    assert (config.n, config.tau, config.kept, config.batch_size) == (100, 0.5, 1.0, 7)
    assert config.hash() == config.change(batch_size=64).hash() != config.change(seed=1).hash()
    assert GenerateConfig(**config.as_dict()) == config
    assert GenerateConfig.make(init="pca").kept == 0.95
    text = help_text()
    assert all(f"  {name}=" in text for name in config.as_dict()) and all(s in text for s in STOP_NAMES)


def test_class_names():
    names = ["cat", "dog", "7"]
    assert GenerateConfig.make(classes="all").class_numbers(names) == [0, 1, 2]
    assert GenerateConfig.make(classes="dog, 0").class_numbers(names) == [1, 0]
    with pytest.raises(DerkitError, match="Did you mean 'dog'"):
        GenerateConfig.make(classes="dgo").class_numbers(names)
    with pytest.raises(DerkitError, match="twice"):
        GenerateConfig.make(classes="cat,0").class_numbers(names)


def test_k_larger_than_the_class(some):
    with pytest.raises(DerkitError, match=r"k=40 neighbours beside the anchor need 41 images, but class 't-sh"):
        fit_pool(some, range(10), k=40)
    fit_pool(some, range(2), k=39)

"""The kit beside other packages, on models that it trains itself; a package that is missing skips its tests with a reason.

By default: few images, where equal starts must give equal x*, and the committed record of scripts/compare_peers.py, whose
numbers must keep what they promise. `pytest -m slow tests/test_peers.py` compares anew: 1,000 images and AutoAttack, minutes.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from derkit.fits import fit_pool
from derkit.gen_config import GenerateConfig
from derkit.inits import Draw, local_parts, neighbourhood

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("torchattacks", "foolbox")
INSTALL = dict(torchattacks="pip install --no-deps torchattacks", foolbox='pip install "derkit[peers]"')


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_peers", ROOT / "scripts" / "compare_peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def need(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: {INSTALL.get(name, '')}")


def only(monkeypatch, script, name):
    """Pairs with one peer alone."""
    original = script.peer
    monkeypatch.setattr(script, "peer", lambda wanted: original(wanted) if wanted == name else None)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("which", ["standard", "pgd"])
def test_same_start_same_adversarial_examples(name, which, script, trained, robust, mini, monkeypatch):
    """FGSM, PGD in L_inf and L_2, on CE and on the margin, from x itself: x* equal to 1e-5, and every prediction."""
    need(name)
    only(monkeypatch, script, name)
    monkeypatch.setattr(script, "STEPS", 6)
    pairs = script.attack_pairs
    monkeypatch.setattr(script, "attack_pairs", lambda model: [r for r in pairs(model) if not r["random_start"]])
    rows = script.compare_attacks(trained if which == "standard" else robust, mini.test.take(slice(40)), batch_size=40)
    assert {r["attack"] for r in rows} >= {"FGSM", "PGD-6"} and {r["norm"] for r in rows} == {"linf", "l2"}
    for r in rows:
        assert r["equal_to_1e_5"] == 1 and r["ours"] == r["theirs"], r
    assert min(r["ours"] for r in rows) < max(r["ours"] for r in rows) or which == "pgd"  # the attacks do something
    robust.float()


def test_distances_against_torchmetrics(script, mini):
    """The score, the Frechet and the kernel distance with the same extractor, on noisy images and on the images themselves."""
    need("torchmetrics")
    need("torch_fidelity")
    real, train = mini.test.images[:200], mini.train.images[:200]
    for images in (script.noisy(train), train, real.flip(0)):
        found = script.compare_distances(images, real)
        for name, pair in found.items():
            assert pair["ours"] == pytest.approx(pair["theirs"], rel=1e-4, abs=1e-4), name


def test_neighbours_and_local_covariance_against_sklearn(mini, home):
    """Local PCA's two ingredients: neighbours in class-PCA coordinates, and the covariance of a neighbourhood."""
    empirical_covariance = need("sklearn.covariance").empirical_covariance
    PCA, NearestNeighbors = need("sklearn.decomposition").PCA, need("sklearn.neighbors").NearestNeighbors
    pool = fit_pool(mini, [4], k=7, rank=30)
    x = mini.train.take(pool.rows[4]).floats().flatten(1).double().numpy()
    z = PCA(30, svd_solver="full").fit_transform(x)
    distance, index = NearestNeighbors(n_neighbors=8).fit(z).kneighbors(z)
    same = [set(a) == set(b) for a, b in zip(pool.near[4].tolist(), index[:, 1:].tolist(), strict=True)]
    tied = np.isclose(distance[:, 7], np.sort(np.linalg.norm(z[:, None] - z[None], axis=2), axis=1)[:, 8], rtol=1e-5)
    assert all(s or t for s, t in zip(same, tied, strict=True)) and np.mean(same) > 0.99
    many = torch.arange(4000)
    draw = Draw(many, torch.full_like(many, 4), torch.full_like(many, 3), 0)  # one anchor, many draws
    mean, deviation = local_parts(draw, pool, GenerateConfig.make(k=7))
    near = neighbourhood(draw, pool, 7)[0].double().numpy()
    np.testing.assert_allclose(mean[0].numpy(), near.mean(0), atol=1e-6)
    local = PCA().fit(near)  # its variances are those of the draws along its directions
    along = deviation.double().numpy() @ local.components_[:6].T
    np.testing.assert_allclose(along.var(0), local.explained_variance_[:6], rtol=0.12)
    expected = empirical_covariance(near) * 7 / 6
    assert np.linalg.norm(empirical_covariance(deviation.double().numpy()) - expected) < 0.1 * np.linalg.norm(expected)


# --------------------------------------------------------------------------------------------------------- the record
def test_the_committed_record():
    """figures/records/peers.json: all models, every pair, within the bounds that the kit promises."""
    record = json.loads((ROOT / "figures" / "records" / "peers.json").read_text())
    assert record["data"] == "fashion_mini" and set(record["models"]) == {"standard", "pgd", "fgsm_der"}
    assert all(record["versions"][name] for name in ("torch", "torchattacks", "foolbox", "pyautoattack", "torchmetrics"))
    for model in record["models"].values():
        check_attacks(model["attacks"])
        check_autoattack(model["autoattack"])
        assert model["autoattack"]["images"] == 1000
    strong = [model["autoattack"]["ours"]["strong"] for model in record["models"].values()]
    sides = {who: sum(len(row[f"only_{who}_breaks"]) for row in strong) for who in ("autoattack", "ours")}
    assert sides == dict(autoattack=5, ours=4), "as README says"
    for pair in record["distances"].values():
        assert pair["ours"] == pytest.approx(pair["theirs"], rel=1e-4)


def check_attacks(rows):
    assert len(rows) == 12 and {r["peer"] for r in rows} == set(PEERS) and sum(r["same_definition"] for r in rows) == 11
    for r in rows:
        assert r["images"] == 1000 and (abs(r["ours"] - r["theirs"]) <= 0.005 or not r["same_definition"]), r
        assert r["random_start"] or r["equal_to_1e_5"] >= 0.999, r


def check_autoattack(record):
    """No attack of ours is far behind AutoAttack; what one side alone breaks is listed."""
    for name, row in record["ours"].items():
        gap = len(row["only_autoattack_breaks"]) - len(row["only_ours_breaks"])
        assert row["accuracy"] - record["autoattack"] == pytest.approx(gap / record["images"]), name
    assert record["ours"]["strong"]["accuracy"] - record["autoattack"] <= 0.03


@pytest.mark.slow
@pytest.mark.parametrize("which", ["standard", "pgd"])
def test_a_thousand_images_and_autoattack(which, script, trained, robust, mini):
    for name in (*PEERS, "pyautoattack"):
        need(name)
    model = trained if which == "standard" else robust
    check_attacks(script.compare_attacks(model, mini.test))
    check_autoattack(script.compare_autoattack(model, mini.test.take(slice(100))))

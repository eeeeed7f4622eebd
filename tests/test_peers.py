"""The kit beside other packages, on models that it trains itself; missing packages are skipped.

`pytest -m slow tests/test_peers.py` compares anew on 1,000 images and with AutoAttack: minutes.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from derkit.config import GenerateConfig
from derkit.generation.starts import fit_pool
from scripts import compare_peers as script

PEERS = ("torchattacks", "foolbox")
RECORD = Path(__file__).resolve().parents[1] / "figures" / "records" / "peers.json"


@pytest.fixture(params=["standard", "pgd"])
def model(request, trained, robust):
    return copy.deepcopy(trained if request.param == "standard" else robust)


@pytest.mark.parametrize("name", PEERS)
def test_same_start_same_adversarial_examples(name, model, mini, monkeypatch):
    """FGSM, PGD in L_inf and L_2, on CE and on the margin, from x itself: x* equal to 1e-5."""
    package, pairs = pytest.importorskip(name), script.attack_pairs
    monkeypatch.setattr(script, "STEPS", 6)
    monkeypatch.setattr(script, "peer", lambda wanted: package if wanted == name else None)
    monkeypatch.setattr(script, "attack_pairs",
                        lambda net: [row for row in pairs(net) if not row["random_start"]])
    rows = script.compare_attacks(model, mini.test.take(slice(40)), batch_size=40)
    assert {row["norm"] for row in rows} == {"linf", "l2"} and len(rows) >= 3
    for row in rows:
        assert row["equal_to_1e_5"] == 1 and row["ours"] == row["theirs"], row


def test_distances_against_torchmetrics(mini):
    """The score, the Frechet and the kernel distance with the same extractor."""
    pytest.importorskip("torchmetrics")
    pytest.importorskip("torch_fidelity")
    real, train = mini.test.images[:200], mini.train.images[:200]
    for pair in script.compare_distances(script.noisy(train), real).values():
        assert pair["ours"] == pytest.approx(pair["theirs"], rel=1e-4, abs=1e-4)


def test_neighbours_against_sklearn(mini):
    """Those of local PCA, in class-PCA coordinates. Their covariance is in test_starts.py."""
    PCA = pytest.importorskip("sklearn.decomposition").PCA
    neighbors = pytest.importorskip("sklearn.neighbors")
    config = GenerateConfig(init="local_pca", k=7, rank=30)
    pool = fit_pool(mini, [4], config)
    rows = pool.rows[4]
    x = mini.train.take(rows).floats().flatten(1).double().numpy()
    z = PCA(30, svd_solver="full").fit_transform(x)
    distance, index = neighbors.NearestNeighbors(n_neighbors=9).fit(z).kneighbors(z)
    ours = np.sort(pool.near[rows].numpy(), axis=1)
    same = (ours == np.sort(rows.numpy()[index[:, 1:8]], axis=1)).all(axis=1)
    tied = np.isclose(distance[:, 7], distance[:, 8], rtol=1e-5)  # rounding picks one of the two
    assert (same | tied).all() and same.mean() > 0.99


def check_attacks(rows):
    assert len(rows) == 12 and {row["peer"] for row in rows} == set(PEERS)
    assert sum(row["same_definition"] for row in rows) == 11
    for row in rows:
        close = abs(row["ours"] - row["theirs"]) <= 0.005
        assert row["images"] == 1000 and (close or not row["same_definition"]), row
        assert row["random_start"] or row["equal_to_1e_5"] >= 0.999, row


def check_autoattack(record):
    """No attack of ours is far behind AutoAttack."""
    assert record["ours"]["strong"]["accuracy"] - record["autoattack"] <= 0.03


def test_the_committed_record():
    """All models, every pair, within the bounds that the kit promises."""
    record = json.loads(RECORD.read_text())
    for name in script.MODELS:
        check_attacks(record["models"][name]["attacks"])
        check_autoattack(record["models"][name]["autoattack"])
    for pair in record["distances"].values():
        assert pair["ours"] == pytest.approx(pair["theirs"], rel=1e-4)


@pytest.mark.slow
def test_a_thousand_images_and_autoattack(model, mini):
    for name in (*PEERS, "pyautoattack"):
        pytest.importorskip(name)
    check_attacks(script.compare_attacks(model, mini.test))
    check_autoattack(script.compare_autoattack(model, mini.test.take(slice(100))))

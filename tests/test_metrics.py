"""The shipped extractor, its registration with torch-fidelity, Inception by path, and the metrics table."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from derkit import extractor as extractors
from derkit import inception as inceptions
from derkit.augment import to_float
from derkit.checkpoint import load_checkpoint, save_checkpoint
from derkit.errors import CheckpointError, DerkitError
from derkit.extractor import ExtractorNet, extractor_for, load_extractor, register
from derkit.generation import generate
from derkit.inception import INCEPTION_FILE, find_inception, inception
from derkit.metrics import CEILING, FLOOR, fidelity, metrics_table, near_copies, nearest, pairwise, protocol

fidelity_package = pytest.importorskip("torch_fidelity")


@pytest.fixture(scope="module")
def judge(mini):
    return extractor_for(mini)


@pytest.fixture(scope="module")
def some(mini):
    """40 training and 20 test images of each class."""
    parts = {}
    for name, count in (("train", 40), ("test", 20)):
        split = getattr(mini, name)
        index = torch.cat([(split.labels == c).nonzero().squeeze(1)[:count] for c in range(10)])
        parts[name] = split.take(index)
    return replace(mini, **parts, sha256="some")


# ------------------------------------------------------------------------------------------------------- extractor
def test_the_shipped_extractor(judge, mini):
    assert judge.sha256 == extractors.FASHION_SHA256 and judge.name == f"derkit-{judge.sha256[:8]}"
    assert judge.path.stat().st_size < 500_000 and judge.columns == ("CIS", "CFD", "CKD")
    info = judge.info
    assert info["adversarial"] is False and info["seed"] == 0 and len(info["data_sha256"]) == 64
    assert info["command"].startswith("python scripts/train_extractor.py")
    right = judge.logits(mini.test.images).argmax(1) == mini.test.labels
    assert abs(right.double().mean().item() - info["accuracy"]["test"]) < 0.04  # 1,000 of the 10,000 test images
    features = judge.net(mini.train.floats(0, 500))[0]
    early, late = features[:, :24], features[:, 24:]
    assert all(part.var(0).mean().item() == pytest.approx(1, rel=0.15) for part in (early, late))


def test_registering_twice_changes_nothing(judge):
    registry = fidelity_package.registry.FEATURE_EXTRACTORS_REGISTRY
    before = dict(registry)
    assert register(judge.net, judge.sha256) == judge.name and extractor_for("fashion_mini").name == judge.name
    assert registry == before and judge.name in registry


def test_a_file_with_other_weights(judge, tmp_path, trained):
    content = load_checkpoint(judge.path)
    content["state"]["head.2.bias"] += 1
    torch.save(content, tmp_path / "changed.pt")
    with pytest.raises(CheckpointError, match="do not match the recorded sha256"):
        load_extractor(tmp_path / "changed.pt")
    with pytest.raises(CheckpointError, match="weights .* expected 00000000"):
        load_extractor(judge.path, sha256="0" * 64)
    save_checkpoint(tmp_path / "classifier.pt", trained)
    with pytest.raises(CheckpointError, match=r"small_cnn.*must not judge its own samples"):
        load_extractor(tmp_path / "classifier.pt")


def test_other_data_needs_its_own_extractor(some, home):
    other = replace(some, name="cifar10")
    with pytest.raises(DerkitError, match=r"train_extractor.py --dataset cifar10 --out .*extractors/cifar10.pt"):
        extractor_for(other)
    net = ExtractorNet(3, 10)
    save_checkpoint(home / "extractors" / "cifar10.pt", net.half(), dict(seed=1))
    with pytest.raises(DerkitError, match="takes 3 channels and 10 classes, the data has 1 and 10"):
        extractor_for(other)
    assert extractor_for("cifar10").info == {"seed": 1}


def test_without_torch_fidelity(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(DerkitError, match=r'pip install "derkit\[eval\]"'):
        extractors.torch_fidelity()


# ------------------------------------------------------------------------------------------------------- inception
def test_inception_with_a_wrong_file(tmp_path, monkeypatch):
    fake = tmp_path / INCEPTION_FILE
    fake.write_bytes(b"not the weights")
    with pytest.raises(DerkitError, match=r"has sha256 .*expected 6726825d"):
        inception(fake)
    with pytest.raises(DerkitError, match="sha256"):
        inception(tmp_path)  # its folder
    monkeypatch.setenv("DERKIT_INCEPTION", str(fake))
    assert find_inception() == fake
    torch.save({"w": torch.ones(2)}, fake)
    prefix = hashlib.sha256(fake.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(inceptions, "INCEPTION_PREFIX", prefix)  # as if it were the file
    found = inception()
    assert found.columns == ("IS", "FID", "KID") and found.sha256.startswith(prefix) and found.logits(None) is None


def test_inception_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DERKIT_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert inception() is None
    out = capsys.readouterr().out
    assert "skipped" in out and INCEPTION_FILE in out and "https://" in out and out.count("\n") == 1
    with pytest.raises(DerkitError, match=r"not found at .*none.pth.*Download https"):
        inception(tmp_path / "none.pth", required=True)


# --------------------------------------------------------------------------------------------------------- metrics
def test_fidelity_against_the_formulas(judge, mini):
    a, b = mini.train.images[:300], mini.test.images[:250]
    found = fidelity(a, b, judge)
    assert set(found) == {"CIS", "CFD", "CKD", "precision", "recall"}
    with torch.no_grad():
        (fa, la), (fb, _) = (judge.net(to_float(x)) for x in (a, b))
    fa, fb, la = fa.double().numpy(), fb.double().numpy(), la.double()
    sa, sb = np.cov(fa, rowvar=False), np.cov(fb, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(sa @ sb).astype(complex)).real.sum()
    frechet = ((fa.mean(0) - fb.mean(0)) ** 2).sum() + np.trace(sa) + np.trace(sb) - 2 * root
    assert found["CFD"] == pytest.approx(frechet, rel=1e-3)
    p = la.softmax(1)
    score = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()
    assert found["CIS"] == pytest.approx(score, rel=1e-4)
    kernel = [(x @ y.T / 72 + 1) ** 3 for x, y in ((fa, fa), (fb, fb), (fa, fb))]
    off = [k.sum() - np.trace(k) for k in kernel[:2]]
    mmd = off[0] / (300 * 299) + off[1] / (250 * 249) - 2 * kernel[2].mean()
    assert found["CKD"] == pytest.approx(mmd, abs=0.3)  # over subsets of 250
    radius = torch.cdist(torch.tensor(fb), torch.tensor(fb)).kthvalue(4).values
    inside = (torch.cdist(torch.tensor(fa), torch.tensor(fb)) <= radius).any(1).double().mean()
    assert found["precision"] == pytest.approx(inside.item(), abs=0.011)


def test_the_same_images_are_at_distance_zero(judge, mini):
    x = mini.test.images[:200]
    found = fidelity(x, x.clone(), judge)
    assert abs(found["CFD"]) < 1e-3 and found["precision"] == found["recall"] == 1.0
    state = torch.random.get_rng_state()
    assert fidelity(x, mini.train.images[:200], judge) == fidelity(x, mini.train.images[:200], judge)
    assert torch.equal(state, torch.random.get_rng_state())


def test_quality_is_ordered(judge, mini):
    real, rest = mini.test.images, mini.train.images[:300]
    gauss = torch.randn(rest.shape, generator=torch.Generator().manual_seed(0))
    noisy = (rest.float() + 40 * gauss).clamp(0, 255).byte()
    noise = torch.randint(0, 256, rest.shape, generator=torch.Generator().manual_seed(0)).byte()
    found = [fidelity(x, real, judge) for x in (rest, noisy, noise)]
    assert found[0]["CFD"] < 0.3 * found[1]["CFD"] < 0.1 * found[2]["CFD"]
    assert found[0]["CKD"] < found[1]["CKD"] < found[2]["CKD"] and found[2]["precision"] < 0.05


@pytest.mark.parametrize(
    "images, words",
    [
        (torch.rand(4, 1, 28, 28), "images must be uint8"),
        (torch.zeros(1, 1, 28, 28, dtype=torch.uint8), "at least 2 images"),
        (torch.zeros(4, 3, 28, 28, dtype=torch.uint8), r"images are \(3, 28, 28\), the reference \(1, 28, 28\)"),
    ],
)
def test_fidelity_rejects(judge, mini, images, words):
    with pytest.raises(DerkitError, match=words):
        fidelity(images, mini.test.images[:10], judge)


def test_protocol_sizes():
    assert protocol(50_000, 50_000) == dict(isc_splits=10, kid_subsets=100, kid_subset_size=1000, prc_neighborhood=3)
    assert protocol(500, 1000) == dict(isc_splits=1, kid_subsets=20, kid_subset_size=500, prc_neighborhood=3)
    assert protocol(2, 1000)["prc_neighborhood"] == 1


def test_nearest_and_pairwise(mini):
    train, x = mini.train.images[:50], mini.test.images[:9]
    distance, index = nearest(x, train, chunk=4)
    brute = (to_float(x)[:, None] - to_float(train)[None]).flatten(2).norm(dim=2)
    assert torch.allclose(distance, brute.min(1).values, atol=1e-3) and torch.equal(index, brute.argmin(1))
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1, 0])
    found = pairwise(x, labels)
    mine = to_float(x[labels == 1]).flatten(1)
    expected = torch.stack([(mine[i] - mine[j]).norm() for i, j in ((0, 1), (0, 2), (1, 2))]).mean()
    assert found[1] == pytest.approx(expected.item(), rel=1e-5) and np.isnan(found[2])
    assert near_copies(torch.tensor([0.0, 5.0]), torch.linspace(1, 2, 101)) == 0.5


# ------------------------------------------------------------------------------------------------------- the table
@pytest.fixture(scope="module")
def table(some, judge, _trained):
    sets = {
        "local": generate(_trained, some, 60, k=8, steps=4),
        "fixed": generate(_trained, some, 60, k=8, steps=4, stop="fixed"),
    }
    return sets, metrics_table(sets, some, judge)


def test_table_has_what_makes_it_readable(table, some, judge):
    sets, found = table
    rows = [FLOOR, CEILING, "local: x0 only", "local", "fixed: x0 only", "fixed"]
    assert found.overall.index.tolist() == rows and (found.overall["n"] == 60).all()
    columns = ["CIS", "CFD", "CKD", "precision", "recall", "agreement", "pairwise L2", "nearest-train L2"]
    assert [*columns, "near copies", "saturated", "steps", "s / 1000"] == found.overall.columns.tolist()[1:]
    assert not {"IS", "FID", "KID"} & set(found.overall.columns)
    cfd = found.overall["CFD"]
    assert cfd[FLOOR] < cfd["local"] < cfd[CEILING]
    assert found.overall.loc["local: x0 only", "steps"] == 0 and found.overall.loc["fixed", "steps"] == 4
    same = found.overall.loc[["local: x0 only", "fixed: x0 only"]].drop(columns=["steps", "s / 1000"])
    assert same.iloc[0].equals(same.iloc[1])  # the same starts
    test = nearest(some.test.images, some.train.images)[0]
    assert found.overall.loc[FLOOR, "nearest-train L2"] == pytest.approx(test.mean().item())
    assert found.per_class.loc["local"].index.tolist() == some.classes
    assert found.per_class["CKD"].notna().all() and found.per_class.loc[FLOOR]["n"].tolist() == [6] * 10


def test_record_is_plain_json_with_the_protocol(table, some, judge):
    record = json.loads(json.dumps(table[1].record(), allow_nan=False))
    protocol = record["protocol"]
    assert protocol["extractor_sha256"] == judge.sha256 and protocol["n"] == 60 and protocol["n_reference"] == 200
    assert protocol["selection"] == "none" and protocol["data_sha256"] == "some" and protocol["source"] == "bundled"
    assert protocol["samples"]["local"]["config"]["init"] == "local_pca"
    assert len(record["overall"]) == 6 and len(record["per_class"]) == 60
    assert record["overall"][0]["steps"] is None


def test_table_against_the_training_set(table, some, judge):
    found = metrics_table({"local": table[0]["local"]}, some, judge, reference="train")
    assert found.protocol["n_reference"] == 400
    assert found.overall.loc[FLOOR, "CFD"] < found.overall.loc[CEILING, "CFD"]


def test_table_refuses_what_cannot_be_compared(table, some, judge):
    local = table[0]["local"]
    cut = generate_like(local, 50)
    with pytest.raises(DerkitError, match="never stand in one table"):
        metrics_table({"a": local, "b": cut}, some, judge)
    with pytest.raises(DerkitError, match="generated from other data"):
        metrics_table({"a": local}, replace(some, sha256="else"), judge)
    own = replace(local, record=local.record | {"model_sha256": judge.sha256})
    with pytest.raises(DerkitError, match="the extractor is the classifier"):
        metrics_table({"a": own}, some, judge)
    with pytest.raises(DerkitError, match="at least one set"):
        metrics_table({}, some, judge)
    with pytest.raises(DerkitError, match="'test' or 'train'"):
        metrics_table({"a": local}, some, judge, reference="valid")


def test_without_an_extractor_the_rest_is_still_measured(table, some, judge, capsys, home):
    found = metrics_table({"local": table[0]["local"]}, some, None)
    same = ["pairwise L2", "nearest-train L2", "near copies", "saturated", "steps"]
    assert found.overall.loc["local", same].tolist() == table[1].overall.loc["local", same].tolist()
    assert "CFD" not in found.overall and "precision" not in found.overall and found.protocol["extractor"] is None
    assert inceptions.judge(some).sha256 == judge.sha256
    assert inceptions.judge(replace(some, name="cifar10")) is None
    assert "train_extractor.py --dataset cifar10" in capsys.readouterr().out
    with pytest.raises(DerkitError, match="IS, FID and KID need"):
        inceptions.judge(some, home / "nowhere.pth")


def generate_like(samples, n):
    """The first n of a set of samples."""
    from derkit.samples import ARRAYS

    return replace(samples, **{k: getattr(samples, k)[:n] for k in ARRAYS})


def test_metric_figures(table, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    from derkit import gen_plots as plots

    overall, per_class = table[1].overall, table[1].per_class
    curve = overall.loc[["local", "fixed"]].assign(stop=["quantile", "fixed"])
    plots.trade_off({"stop": curve}, "recall", "CFD", "stop", overall.loc[FLOOR], save=tmp_path / "a.png")
    plots.class_bars(per_class, "CKD", [FLOOR, "local"], save=tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 1000 and (tmp_path / "b.png").stat().st_size > 1000


def test_summaries_of_records(table, tmp_path):
    """Mean and range over seeds, the grid by init and stop, the rows per class: from two seeds written like the script's."""
    from derkit.gen_results import generation_summary, init_by_stop, load_generation, per_class
    from derkit.records import write_json

    one = table[1].record()
    two = json.loads(json.dumps(one))
    for row in two["overall"]:
        row["CFD"] += 2
    def name(images):
        return images.replace("local", "local PCA | quantile").replace("fixed", "local PCA | fixed")

    rows = [dict(model="SAT", seed=s) | r | {"images": name(r["images"])} for s, t in enumerate((one, two)) for r in t["overall"]]
    classes = [dict(model="SAT", seed=s) | r for s in (0, 1) for r in one["per_class"]]
    settings = {"local PCA | quantile": {}, "local PCA | fixed": {}}
    write_json(tmp_path / "g" / "grid.json", dict(rows=rows, per_class=classes, settings=settings))
    record = load_generation("grid", "g", tmp_path)
    summary, base = generation_summary(record).loc["SAT"], table[1].overall.loc["local", "CFD"]
    assert summary.loc["local PCA | quantile", "seeds"] == 2
    found = summary.loc["local PCA | quantile", ["CFD", "CFD min", "CFD max"]].tolist()
    assert found == pytest.approx([base + 1, base, base + 2])
    grid = init_by_stop(record, "SAT")
    assert grid.columns.tolist() == ["x0 only", "quantile", "fixed"] and grid.loc["local PCA", "quantile"] == pytest.approx(base + 1)
    assert per_class(record, "SAT").loc["local"].shape == (10, 1)
    with pytest.raises(DerkitError, match="Did you mean 'grid'"):
        load_generation("gird", "g", tmp_path)


def test_published_figures_name_their_sources():
    from derkit.gen_published import published_generation

    rows = published_generation()
    assert rows.index.is_unique and rows["source"].str.len().min() > 10
    assert rows.loc["JEM", "FID"] == 38.4 and np.isnan(rows.filter(like="Santurkar", axis=0)["FID"].iloc[0])

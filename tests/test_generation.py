"""`generate` in memory and in folders: shards, kills, parts, damage, refusals; own starts."""

import os
import random
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from derkit.generation import generate as room
from derkit.generation.generate import ARRAYS, generate, load_samples, prepare
from derkit.generation.sampler import quantise, saturated
from derkit.models import build_model
from derkit.util import DerkitError, hold, read_json
from tests.conftest import forty_of_each
from tests.survivor import attempt

QUICK = dict(k=8, steps=4, verbose=False)
SHARDS = QUICK | dict(n=40, shard_size=10, batch_size=4)


def same(a, b):
    return all(torch.equal(getattr(a, k).nan_to_num(), getattr(b, k).nan_to_num()) for k in ARRAYS)


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("part_*.npz"))}


def test_sixteen_images(trained, some):
    s = generate(trained, some, 16, **QUICK)
    assert s.images.shape == s.x0.shape == (16, 1, 28, 28) and s.images.dtype == torch.uint8
    assert s.labels.tolist() == [i % 10 for i in range(16)] and s.index.tolist() == [*range(16)]
    assert s.record["seconds_per_1000"] > 0 and s.record["steps"] == s.steps.double().mean()
    assert same(s, generate(trained, some, 16, **QUICK)), "the same call, the same bytes"
    assert not torch.equal(s.images, generate(trained, some, 16, seed=1, **QUICK).images)
    # another batch: a convolution may sum in another order, and a pixel round to the next level
    five = generate(trained, some, 5, **QUICK)
    assert ((s.images[:5].int() - five.images.int()).abs() <= 1).double().mean() > 0.99
    s = generate(trained, some, 6, classes="bag,sandal,3", **QUICK)
    assert s.labels.tolist() == [8, 5, 3] * 2 and s.record["classes"] == ["bag", "sandal", "dress"]


def test_best_of_starts_nearer_to_the_target(trained, some):
    one, five = (generate(trained, some, 60, best_of=b, **QUICK | dict(steps=0)) for b in (1, 5))
    gaps = [(s.joint0 - s.target).abs().mean() for s in (one, five)]
    assert gaps[1] < 0.6 * gaps[0]


def test_levels_of_pixels_and_a_custom_module(some):
    assert saturated(torch.tensor([0, 255, 7, 0], dtype=torch.uint8)) == 0.75
    assert quantise(torch.tensor([0.0, 0.499 / 255, 0.501 / 255, 1.0])).tolist() == [0, 0, 1, 255]
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    assert generate(model, some, 9, stop="fixed", **QUICK).record["model"] == "Sequential"


@pytest.fixture
def whole(trained, some, tmp_path):
    return generate(trained, some, folder=tmp_path / "whole", **SHARDS)


def test_a_folder_equals_memory_and_is_made_once(whole, trained, some, tmp_path, monkeypatch):
    folder = tmp_path / "whole"
    assert same(whole, generate(trained, some, **SHARDS)) and same(whole, load_samples(folder))
    shard_files = [f"part_0000{i}.{kind}" for i in range(4) for kind in ("json", "npz")]
    found = sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
    assert found == ["manifest.json", *shard_files, "summary.json"]
    manifest, summary = (read_json(folder / name) for name in (found[0], found[-1]))
    assert len(manifest["model_sha256"]) == 64 and manifest["env"]["torch"] == torch.__version__
    assert summary == {k: v for k, v in whole.record.items() if k not in manifest}
    monkeypatch.setattr(room, "sample", None)  # nothing may be generated again
    assert same(whole, generate(trained, some, folder=folder, **SHARDS | dict(batch_size=3)))


def test_a_folder_of_another_config_is_refused(whole, trained, some, tmp_path):
    folder = tmp_path / "whole"
    with pytest.raises(DerkitError, match=r"another config \(seed: 0 there, 1 here\).*fresh=True"):
        generate(trained, some, folder=folder, seed=1, **SHARDS)
    with pytest.raises(DerkitError, match="data_sha256: some there, x here"):
        generate(trained, replace(some, sha256="x"), folder=folder, **SHARDS)
    assert same(whole, load_samples(folder))
    other = generate(trained, some, folder=folder, seed=1, fresh=True, **SHARDS)
    assert not torch.equal(other.images, whole.images) and same(other, load_samples(folder))
    trained[1].head.bias.data += 0.1
    with pytest.raises(DerkitError, match="model_sha256: .* there"):
        generate(trained, some, folder=folder, seed=1, **SHARDS)
    del trained.spec  # the same weights may do another thing in another module
    with pytest.raises(DerkitError, match="model: .* there, Sequential here"):
        generate(trained, some, folder=folder, seed=1, **SHARDS)
    with pytest.raises(DerkitError, match="not a folder of samples"):
        load_samples(tmp_path)


@pytest.mark.parametrize("how", ["truncated", "flipped", "others", "no seconds"])
def test_a_damaged_shard_is_made_again(whole, trained, some, tmp_path, how):
    folder = tmp_path / "whole"
    before, path = shards(folder), folder / "part_00001.npz"
    good = before[path.name]
    flipped = good[:3000] + bytes([good[3000] ^ 255]) + good[3001:]
    bad = dict(truncated=good[:500], flipped=flipped, others=before["part_00000.npz"])
    path.write_bytes(bad.get(how, good))
    if how == "no seconds":
        path.with_suffix(".json").unlink()
    (folder / ".part_00002.npz.77.tmp").write_bytes(b"half")  # left by a kill
    with pytest.raises(DerkitError, match="not finished: part_00001.npz is missing or"):
        load_samples(folder)
    assert same(whole, generate(trained, some, folder=folder, **SHARDS))
    assert shards(folder) == before and not list(folder.glob(".*.tmp"))
    (folder / "summary.json").unlink()
    with pytest.raises(DerkitError, match="not finished: summary.json is missing"):
        load_samples(folder)


def test_parts_in_any_order_and_number(whole, trained, some, tmp_path, capsys):
    folder = tmp_path / "parts"
    for part, have in [((2, 3), 1), ((2, 2), 2), ((3, 4), 3), ((1, 2), 4)]:
        made = generate(trained, some, folder=folder, part=part, **SHARDS | dict(verbose=True))
        own = range(40) if have == 4 else [i for i in range(40) if i // 10 % part[1] == part[0] - 1]
        assert made.index.tolist() == [*own] and len(shards(folder)) == have
        assert (folder / "summary.json").exists() == (have == 4)
    assert "part 2/3 is done; 3 of 4 shards" in capsys.readouterr().out
    assert shards(folder) == shards(tmp_path / "whole") and same(made, whole)
    summary = (folder / "summary.json").read_bytes()
    generate(trained, some, folder=folder, part=(4, 4), **SHARDS)
    assert (folder / "summary.json").read_bytes() == summary, "whoever writes it"


@pytest.mark.parametrize("options, words", [
    (dict(part=(3, 2)), "found 3/2"), (dict(part=(1, 5)), "N <= 4 shards"),
    (dict(part=(1, 2), fresh=True), "delete the folder"), (dict(part=(1, 2), folder=None), "into"),
    (dict(k=40), "k=40 neighbours"), (dict(classes="hat"), "unknown class 'hat'")])
def test_bad_input_before_any_work(trained, some, tmp_path, options, words):
    with pytest.raises(DerkitError) as error:
        generate(trained, some, **SHARDS | dict(folder=tmp_path / "out") | options)
    assert words in str(error.value) and not (tmp_path / "out").exists()


def test_two_processes_do_not_make_the_same_part(trained, some, tmp_path):
    with hold(tmp_path / ".part-1-of-2", "generating"):
        for part in ((1, 2), (1, 1)):  # the only part is all of them
            with pytest.raises(DerkitError, match="another process is generating"):
                generate(trained, some, folder=tmp_path, part=part, **SHARDS)
        assert len(generate(trained, some, folder=tmp_path, part=(2, 2), **SHARDS)) == 20


def test_a_full_disk_and_an_unwritable_place(trained, some, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a shard's write fails half-way
    try:
        with pytest.raises(DerkitError, match="could not write .*out.*free some space and run the"):
            generate(trained, some, folder=tmp_path / "out", **SHARDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not shards(tmp_path / "out") and not list((tmp_path / "out").glob(".*.tmp"))
    assert len(generate(trained, some, folder=tmp_path / "out", **SHARDS)) == 40
    with pytest.raises(DerkitError, match="could not write"):
        generate(trained, some, folder="/dev/null/out", **SHARDS)


def test_out_of_memory_says_what_to_do(trained, some, monkeypatch):
    monkeypatch.setattr(room, "sample", Mock(side_effect=torch.OutOfMemoryError("CUDA: none")))
    with pytest.raises(DerkitError, match="out of memory with batch_size=256: set a smaller"):
        generate(trained, some, 10, **QUICK)


def survive(root):
    """Kill generations again and again, let them finish, and compare with an undisturbed one."""
    torch.set_num_threads(1)
    data, model, deaths = forty_of_each(), build_model("small_cnn", 1, 10, 28, width=4), 0

    def make(folder):
        generate(model, data, folder=folder, stop="fixed", **SHARDS)

    for seed in range(7):
        folder, draw = root / str(seed), random.Random(seed).choice
        for _ in range(4 if seed else 0):  # folder 0 is left in peace
            point = draw([(os, "fsync"), (os, "replace"), (room.Job, "samples")])
            moment = draw([1, 2, 3, 4, 5]), draw(["before", "torn", "after"])
            deaths += attempt(make, folder, *point, *moment) != 0
        assert attempt(make, folder) == 0 and shards(folder) == shards(root / "0"), seed
        assert len(load_samples(folder)) == 40, seed
    assert deaths >= 12 and not list(root.glob("*/.*.tmp")), deaths


def test_killed_again_and_again_then_the_same_bytes(tmp_path):
    code = "import sys, pathlib, tests.test_generation as t; t.survive(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=200,
                   cwd=Path(__file__).parents[1])  # fmt: skip


def test_starts_of_ones_own(trained, some):
    job, first = prepare(trained, some, k=8, steps=4), torch.arange(6)
    own = job.run_from(job.starts(first), job.draw(first).labels)
    assert torch.equal(own.x, job.run(range(6)).x)
    x0, wanted = some.test.floats(0, 20), (some.test.labels[:20] + 5) % 10
    out = prepare(trained, some, stop="fixed", steps=5, k=8).run_from(x0, wanted)
    assert torch.equal(out.x0, x0) and (out.end[0] < out.start[0]).all()  # towards the wanted class
    with pytest.raises(DerkitError, match="x0 has the shape"):
        job.run_from(x0[..., :14], wanted)


def test_interpolation_joins_its_ends(trained, some):
    """Of one class and of two; the label and the target change in the middle."""
    job = prepare(trained, some, k=8, steps=4, noise=0.0)
    for second, labels in ((10, [0] * 5), (1, [0, 0, 0, 1, 1])):
        out = job.between(0, second, points=5)
        assert torch.allclose(out.x0[[0, -1]], job.starts(torch.tensor([0, second])), atol=1e-5)
        assert out.labels.tolist() == labels and out.index.tolist() == [0] * 3 + [second] * 2
    with pytest.raises(DerkitError, match="needs init=local_pca, found pca"):
        prepare(trained, some, init="pca").between(0, 1)


def test_models_that_do_not_fit(net, some):
    for options, words in [(dict(classes=7), "the model has 7 classes, fashion_mini has 10"),
                           (dict(channels=3), "the model takes 3 channels, fashion_mini has 1"),
                           (dict(size=32), r"not take the images of fashion_mini, \(1, 28, 28")]:
        with pytest.raises(DerkitError, match=words):
            prepare(net(**options), some, k=8)

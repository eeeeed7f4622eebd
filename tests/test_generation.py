"""`generate` in memory and in folders: shards, resuming after kill -9, refusals, full disk; command line; figures."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from derkit import gen_cli, jobs
from derkit.checkpoint import save_checkpoint
from derkit.config import TrainConfig
from derkit.errors import DerkitError
from derkit.generation import generate
from derkit.jobs import prepare
from derkit.samples import ARRAYS, load_samples, quantise, saturated

QUICK = dict(k=8, steps=4)


@pytest.fixture(scope="module")
def some(mini):
    """40 training images of each class."""
    index = torch.cat([(mini.train.labels == c).nonzero().squeeze(1)[:40] for c in range(10)])
    return replace(mini, train=mini.train.take(index), sha256="some")


@pytest.fixture
def checkpoint(trained, tmp_path):
    """The toy net as a checkpoint of a training run on the first 400 bundled images."""
    path = tmp_path / "final.pt"
    save_checkpoint(path, trained, TrainConfig.make("fashion_mini", train_size=400).as_dict())
    return path


def same(a, b):
    return all(torch.equal(getattr(a, k).nan_to_num(), getattr(b, k).nan_to_num()) for k in ARRAYS)


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("part_*.npz"))}


# ------------------------------------------------------------------------------------------------------- in memory
def test_sixteen_images(trained, some):
    s = generate(trained, some, 16, **QUICK)
    assert s.images.shape == s.x0.shape == (16, 1, 28, 28) and s.images.dtype == torch.uint8
    assert s.labels.tolist() == [i % 10 for i in range(16)] and s.index.tolist() == list(range(16))
    assert s.record["data_sha256"] == "some" and s.record["config"]["n"] == 16 and s.record["seconds_per_1000"] > 0
    assert same(s, generate(trained, some, 16, **QUICK))
    assert not torch.equal(s.images, generate(trained, some, 16, seed=1, **QUICK).images)
    assert torch.equal(s.images[:5], generate(trained, some, 5, **QUICK).images)  # a sample does not know n
    assert len(s.split) == 16 and s.split.floats().max() <= 1


def test_chosen_classes(trained, some):
    s = generate(trained, some, 6, classes="bag,sandal,3", **QUICK)
    assert s.labels.tolist() == [8, 5, 3] * 2 and s.record["classes"] == ["bag", "sandal", "dress"]


def test_best_of_starts_nearer_to_the_target(trained, some):
    one, five = (generate(trained, some, 60, best_of=b, steps=0, k=8) for b in (1, 5))
    gaps = [(s.joint0 - s.target).abs().mean() for s in (one, five)]
    assert gaps[1] < 0.6 * gaps[0] and torch.equal(one.target, five.target)


def test_statistics(trained, some):
    s = generate(trained, some, 40, **QUICK)
    stats = s.statistics()
    assert stats["steps"] == s.steps.double().mean() and stats["stopped_at_0"] == (s.steps == 0).double().mean()
    assert saturated(torch.tensor([0, 255, 7, 0], dtype=torch.uint8)) == 0.75
    assert quantise(torch.tensor([0.0, 0.499 / 255, 0.501 / 255, 1.0])).tolist() == [0, 0, 1, 255]


# --------------------------------------------------------------------------------------------------------- folders
def test_folder_equals_memory_and_is_written_once(trained, some, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    s = generate(trained, some, 25, folder=folder, shard_size=10, **QUICK)
    assert sorted(p.name for p in folder.glob("*.npz")) == [f"part_0000{i}.npz" for i in range(3)]
    assert same(s, generate(trained, some, 25, shard_size=10, **QUICK)) and same(s, load_samples(folder))
    manifest, summary = (json.loads((folder / f"{n}.json").read_text()) for n in ("manifest", "summary"))
    assert manifest["config"]["seed"] == 0 and len(manifest["model_sha256"]) == 64 and manifest["data_sha256"] == "some"
    assert set(summary["shards"]) == {p.name for p in folder.glob("*.npz")} and summary["n"] == 25
    assert (folder / "env.json").is_file()
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"}
    monkeypatch.setattr(jobs, "sample", None)  # nothing may be generated again
    again = generate(trained, some, 25, folder=folder, shard_size=10, batch_size=3, **QUICK)
    assert same(s, again) and "not generated again" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"}


def test_folder_of_another_config_is_refused(trained, some, tmp_path, net):
    folder = tmp_path / "out"
    first = generate(trained, some, 12, folder=folder, **QUICK)
    with pytest.raises(DerkitError, match=r"another config \(seed: 0 there, 1 here\).*fresh=True"):
        generate(trained, some, 12, folder=folder, seed=1, **QUICK)
    with pytest.raises(DerkitError, match="model_sha256"):
        generate(net(), some, 12, folder=folder, stop="fixed", **QUICK)
    with pytest.raises(DerkitError, match="data_sha256"):
        generate(trained, replace(some, sha256="x"), 12, folder=folder, **QUICK)
    assert same(first, load_samples(folder))
    other = generate(trained, some, 12, folder=folder, seed=1, fresh=True, **QUICK)
    assert not torch.equal(other.images, first.images) and same(other, load_samples(folder))
    (folder / "manifest.json").write_text("[1]")
    with pytest.raises(DerkitError, match="not a manifest"):
        generate(trained, some, 12, folder=folder, **QUICK)


def test_missing_and_damaged_shards_are_made_again(trained, some, tmp_path, capsys):
    folder = tmp_path / "out"
    generate(trained, some, 30, folder=folder, shard_size=10, **QUICK)
    whole = bytes_of(folder)
    (folder / "part_00001.npz").write_bytes(whole["part_00001.npz"][:500])  # truncated
    (folder / "part_00002.npz").unlink()
    (folder / ".part_00002.npz.77.tmp").write_bytes(b"half")  # left by a kill
    with pytest.raises(DerkitError, match="part_00001.npz is missing or damaged"):
        load_samples(folder)
    (folder / "summary.json").unlink()
    with pytest.raises(DerkitError, match="not finished"):
        load_samples(folder)
    generate(trained, some, 30, folder=folder, shard_size=10, **QUICK)
    assert bytes_of(folder) == whole and not list(folder.glob(".*.tmp"))
    assert "1 of 3 shards are there" in capsys.readouterr().out
    flipped = bytearray(whole["part_00000.npz"])
    flipped[len(flipped) // 2] ^= 255
    (folder / "part_00000.npz").write_bytes(flipped)
    with pytest.raises(DerkitError, match="part_00000.npz is missing or damaged"):
        load_samples(folder)
    with pytest.raises(DerkitError, match="not a folder of samples"):
        load_samples(tmp_path)


def test_kill_in_the_middle_then_the_same_bytes(checkpoint, tmp_path, home):
    settings = ["n=120", "shard_size=10", "k=8", "steps=40", "stop=fixed"]
    sets = [w for s in settings for w in ("--set", s)]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "derkit.generation", "--checkpoint", str(checkpoint), *sets, "--folder"]
    environment = os.environ | dict(OMP_NUM_THREADS="1", DERKIT_HOME=str(home))
    process = subprocess.Popen([*command, str(killed)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 90
    while not (killed / "part_00001.npz").is_file() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    made = len(list(killed.glob("part_*.npz")))
    assert process.returncode == -signal.SIGKILL and 2 <= made < 12 and not (killed / "summary.json").exists()
    with pytest.raises(DerkitError, match="not finished"):
        load_samples(killed)
    for folder in (killed, whole):
        assert gen_cli.main([*command[3:], str(folder)]) == 0
    assert len(bytes_of(killed)) == 12 and bytes_of(killed) == bytes_of(whole)
    hashes = [json.loads((f / "summary.json").read_text())["shards"] for f in (killed, whole)]
    assert hashes[0] == hashes[1]


def test_the_last_part_finishes_even_if_one_was_killed_before_its_time_was_written(trained, some, tmp_path):
    """A shard without its line of time is not over for the other parts; its owner goes on, and one of them writes the summary."""
    parts = [dict(folder=tmp_path / "p", part=(i, 2), n=40, shard_size=10, verbose=False, **QUICK) for i in (1, 2)]
    assert len(generate(trained, some, **parts[0])) == 20
    (tmp_path / "p" / "timing_1.jsonl").unlink()
    assert len(generate(trained, some, **parts[1])) == 20 and not (tmp_path / "p" / "summary.json").exists()
    whole = generate(trained, some, **parts[0])
    assert same(whole, generate(trained, some, 40, shard_size=10, **QUICK)) and len(load_samples(tmp_path / "p")) == 40
    assert json.loads((tmp_path / "p" / "summary.json").read_text())["seconds_per_1000"] > 0  # of the shards that have one


def test_full_disk(trained, some, tmp_path):
    folder, settings = tmp_path / "out", dict(shard_size=20, **QUICK)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a shard is larger: its write fails half-way
    try:
        with pytest.raises(DerkitError, match=r"could not write .*part_00000.npz .*free some space and run the same"):
            generate(trained, some, 40, folder=folder, **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "manifest.json").is_file()
    assert not list(folder.glob("part_*")) and not list(folder.glob(".*.tmp"))
    assert not (folder / "summary.json").exists()
    s = generate(trained, some, 40, folder=folder, **settings)
    assert same(s, generate(trained, some, 40, **settings))


def test_two_writers(trained, some, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(DerkitError, match="another process is writing"):
            generate(trained, some, 10, folder=tmp_path, **QUICK)
    generate(trained, some, 10, folder=tmp_path, **QUICK)


def test_unwritable_place(trained, some, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DerkitError, match="could not write"):
        generate(trained, some, 10, folder=tmp_path / "file" / "out", **QUICK)


# ---------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "options, words",
    [
        (dict(n=0), "n must be at least 1"),
        (dict(init="lokal_pca"), "Did you mean 'local_pca'"),
        (dict(stop="quantiles"), "Did you mean 'quantile'"),
        (dict(k=40), "k=40 neighbours"),
        (dict(classes="hat"), "unknown class 'hat'"),
        (dict(sede=1), "unknown parameter 'sede'. Did you mean 'seed'"),
    ],
)
def test_bad_input_before_any_work(trained, some, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(jobs, "sample", None)
    with pytest.raises(DerkitError) as error:
        generate(trained, some, folder=tmp_path / "out", **options)
    assert words in str(error.value) and not (tmp_path / "out").exists()


def test_models_that_do_not_fit(net, some):
    with pytest.raises(DerkitError, match="the model has 7 classes, fashion_mini has 10"):
        prepare(net(classes=7), some)
    with pytest.raises(DerkitError, match="the model takes 3 channels, fashion_mini has 1"):
        prepare(net(channels=3), some)
    with pytest.raises(DerkitError, match=r"does not take the images of fashion_mini, \(1, 28, 28\)"):
        prepare(net(size=32), some)


def test_out_of_memory_says_what_to_do(trained, some, monkeypatch):
    def burst(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(jobs, "sample", burst)
    with pytest.raises(DerkitError, match="out of memory with batch_size=256"):
        generate(trained, some, 10, **QUICK)


def test_a_custom_module_generates(some):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    s = generate(model, some, 10, init="pca", stop="fixed", steps=2)
    assert s.record["model"] == "Sequential" and len(s) == 10


# ---------------------------------------------------------------------------------------------------- command line
def test_command_line(checkpoint, capsys, home):
    assert gen_cli.main(["--checkpoint", str(checkpoint), "--set", "n=10", "--set", "k=8", "--set", "steps=2"]) == 0
    out = capsys.readouterr().out
    folder = out.split("samples: ")[1].splitlines()[0]
    assert folder.startswith(str(home / "generated" / "fashion_mini-local_pca-quantile-n10-s0-"))
    assert len(load_samples(folder)) == 10 and '"steps"' in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "init=nothing"], "unknown init 'nothing'"),
        (["--set", "n"], "--set takes key=value"),
        (["--set", "nn=3"], "unknown parameter 'nn'"),
        (["--set", "k=40"], "k=40 neighbours"),
        (["--dataset", "nowhere"], "unknown dataset"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_command_line_errors_are_one_line(checkpoint, capsys, arguments, words):
    assert gen_cli.main(["--checkpoint", str(checkpoint), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


def test_command_line_without_a_checkpoint(tmp_path, capsys):
    assert gen_cli.main(["--checkpoint", str(tmp_path / "none.pt")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "bad.pt").write_bytes(b"x")
    assert gen_cli.main(["--checkpoint", str(tmp_path / "bad.pt")]) == 2


def test_help_lists_the_config(capsys):
    with pytest.raises(SystemExit) as stop:
        gen_cli.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "tau=1.0" in text and "--checkpoint" in text and "ECCV'24" in text


# ----------------------------------------------------------------------------------------------------- diagnostics
def test_starts_of_ones_own(trained, some):
    """The job's own starts give the job's own samples; images of another class move towards the wanted one."""
    job = prepare(trained, some, **QUICK)
    first = torch.arange(6)
    assert torch.equal(job.run_from(job.starts(first), job.draw(first).labels).x, job.run(range(6)).x)
    x0, wanted = some.test.floats(0, 20), (some.test.labels[:20] + 5) % 10
    out = prepare(trained, some, stop="fixed", steps=5).run_from(x0, wanted)
    assert torch.equal(out.x0, x0) and (out.steps == 5).all() and (out.end[0] < out.start[0]).all()
    for bad, message in ((x0 + 1, "must lie in"), (x0[..., :14], "the data's are")):
        with pytest.raises(DerkitError, match=message):
            job.run_from(bad, wanted)
    with pytest.raises(DerkitError, match="labels must lie in"):
        job.run_from(x0, wanted + 10)


def test_interpolation_joins_its_ends(trained, some):
    job = prepare(trained, some, **QUICK, noise=0.0)
    out = job.between(0, 10, points=5)
    ends = job.starts(torch.tensor([0, 10]))
    assert torch.allclose(out.x0[0], ends[0], atol=1e-5) and torch.allclose(out.x0[-1], ends[1], atol=1e-5)
    assert (out.labels == 0).all() and len(out.target.unique()) == 1
    for bad in (lambda: job.between(0, 1), lambda: prepare(trained, some, init="pca").between(0, 10)):
        with pytest.raises(DerkitError, match="two starts of one class"):
            bad()


def test_figures(trained, some, tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    from derkit import gen_plots as plots

    job = prepare(trained, some, **QUICK)
    chains = job.run(range(20), trace=True, frames_every=2)
    s = generate(trained, some, 20, **QUICK)
    names = some.classes
    drawn = [
        lambda p: plots.sample_grid(s.images, s.labels, names, 2, "samples", save=p),
        lambda p: plots.start_and_result(s, names, 6, save=p),
        lambda p: plots.compare_sets({"x0": s.x0, "result": s.images}, s.labels, names, 5, save=p),
        lambda p: plots.film_strip(chains, names, save=p),
        lambda p: plots.nearest_neighbours(s, some.train.images, names, 5, save=p),
        lambda p: plots.interpolation(job.between(0, 10, 4), save=p),
        lambda p: plots.energy_traces(chains, job.reference, names, save=p),
        lambda p: plots.energy_histograms({"real": job.reference.joint, "x0": s.joint0, "result": s.joint}, save=p),
        lambda p: plots.steps_histogram({"quantile": s}, save=p),
    ]
    for i, draw in enumerate(drawn):
        path = tmp_path / f"{i}.png"
        assert draw(path) is None and path.stat().st_size > 1000
    assert not plt.get_fignums()
    plots.save_gif(chains, tmp_path / "a.gif", columns=5)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == len(chains.frames) and gif.size == (5 * 28 * 3, 4 * 28 * 3)

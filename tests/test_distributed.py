"""Two gloo processes on the CPU against one: the same runs, resumed across, written once, and no hanging on errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from derkit import distributed, gen_cli
from derkit.checkpoint import load_checkpoint, save_checkpoint
from derkit.config import TrainConfig
from derkit.errors import DerkitError
from derkit.records import Run, lock_folder
from derkit.samples import load_samples
from tests import workers

CASES = {
    "fgsm": dict(method="fgsm"),
    "rs_fgsm_der": dict(method="rs_fgsm", regularizer="der", augment="crop_flip"),
    "pgd": dict(method="pgd"),
    # the hinge holds a mean over the batch; made strong enough to show
    "trades_hinge": dict(method="trades", eps=0.5, regularizer="der", variant="hinge", penalty="square", weight=100),
    "l2_elle": dict(method="pgd", norm="l2", eps=0.9, regularizer="elle"),
    "sync_bn_gradalign": dict(method="rs_fgsm", regularizer="gradalign", weight=0.5, batch_norm=True, sync_bn=True),
    "ema_clip_sync_bn": dict(method="n_fgsm", clip=0.1, ema=0.9, batch_norm=True, sync_bn=True),
}
FGSM = CASES["fgsm"]
LOCAL = dict(method="standard", batch_norm=True, epochs=1, lr=0)
TIMES = ("seconds", "images_per_s", "processes")


def torchrun(*words, home, n=2, module=()):
    """`python -m torch.distributed.run`: (exit status, stdout, stderr); a hang is an error after five minutes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *module, *map(str, words)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | dict(OMP_NUM_THREADS="1", DERKIT_HOME=str(home), PYTHONPATH=path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def work(cases, folder):
    return torchrun(workers.__file__, json.dumps(cases), folder, home=folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """one/: by one process. two/: by two, of which 'up' was begun by one, and 'down' is ended by one; and what they printed."""
    folder = tmp_path_factory.mktemp("runs")
    half = FGSM | dict(mode="half")
    workers.main(json.dumps(CASES), folder / "one")
    workers.main(json.dumps({"up": half}), folder / "two")
    assert not Run(folder / "two" / "up").finished and len(Run(folder / "two" / "up").epochs) == 1
    broken = {mode: FGSM | dict(mode=mode) for mode in ("nan", "disk")}
    status, out, errors = work(CASES | {"up": FGSM, "down": half, "local_bn": LOCAL} | broken, folder / "two")
    assert status == 0, errors
    assert not Run(folder / "two" / "down").finished and len(Run(folder / "two" / "down").epochs) == 1
    workers.main(json.dumps({"down": FGSM}), folder / "two")
    (folder / "out.txt").write_text(out)
    return folder


def assert_equal(one, other):
    """Weights, optimiser and every recorded number to 1e-6."""
    a, b = (load_checkpoint(f / "last.pt") for f in (one, other))
    for k, v in a["state"].items():
        torch.testing.assert_close(b["state"][k], v, rtol=1e-6, atol=1e-6, msg=k)
    momentum = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (a, b)]
    for v, w in zip(*momentum, strict=True):
        torch.testing.assert_close(w, v, rtol=1e-6, atol=1e-6)
    ra, rb = Run(one), Run(other)
    assert len(ra.epochs) == len(rb.epochs) > 1 and list(ra.epochs) == list(rb.epochs)
    for column in set(ra.epochs) - {*TIMES, "steps"}:
        a, b = (r.epochs[column].astype(float).tolist() for r in (ra, rb))
        assert b == pytest.approx(a, rel=1e-5, abs=2e-6, nan_ok=True), column
    for series in ("loss", "acc", "aae"):
        a, b = ([float("nan") if v is None else v for v in r.steps(series)] for r in (ra, rb))
        assert b == pytest.approx(a, abs=2e-4, nan_ok=True), series
    assert rb.final["last"] == pytest.approx(ra.final["last"], rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(runs, name):
    """50 images in batches of 24: the last batch holds 2. Same weights, same records."""
    assert_equal(runs / "one" / name, runs / "two" / name)
    assert set(Run(runs / "two" / name).epochs["processes"]) == {2} and set(Run(runs / "one" / name).epochs["processes"]) == {1}


def test_the_runs_trained(runs):
    """Equal by being left alone would be easy: every run moved its weights, and no two runs are the same."""
    ends = {n: load_checkpoint(runs / "two" / n / "last.pt")["state"]["1.head.weight"] for n in CASES}
    start = workers.training.model_from_config(workers.config({}), workers.data()).state_dict()["1.head.weight"].double()
    assert all((w - start).abs().max() > 1e-3 for w in ends.values())
    assert len({round(w.abs().sum().item(), 8) for w in ends.values()}) == len(CASES)


@pytest.mark.parametrize("name, counts", [("up", [1, 2]), ("down", [2, 1])])
def test_resume_with_another_number_of_processes(runs, name, counts):
    assert Run(runs / "two" / name).epochs["processes"].tolist() == counts
    assert_equal(runs / "one" / "fgsm", runs / "two" / name)


def test_records_are_written_once(runs):
    folder = runs / "two" / "fgsm"
    files = {"lock", "config.json", "env.json", "metrics.jsonl", "final.json", "best.pt", "last.pt", "final.pt"}
    assert {p.name for p in folder.iterdir()} == files
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_local_batch_norm_averages_its_running_statistics(runs):
    """Weights that stay: the mean of two equal shares' means is the batch's; their variances are not the batch's variance."""
    workers.main(json.dumps({"local_bn": LOCAL}), runs / "one")
    one, two = (load_checkpoint(runs / n / "local_bn" / "last.pt")["state"] for n in ("one", "two"))
    torch.testing.assert_close(two["1.features.0.weight"], one["1.features.0.weight"], rtol=0, atol=0)
    torch.testing.assert_close(two["1.features.1.running_mean"], one["1.features.1.running_mean"], rtol=0, atol=1e-12)
    assert (two["1.features.1.running_var"] - one["1.features.1.running_var"]).abs().max() > 1e-6
    assert int(two["1.features.1.num_batches_tracked"]) == 3


@pytest.mark.parametrize("mode, message", [
    ("nan", "the loss is not finite at epoch 1, step 2 of 3."),
    ("disk", "No space left on device). Nothing half-written is kept"),
])
def test_an_error_of_one_process_is_raised_by_all(runs, mode, message):
    """The loss breaks on process 1; process 0 cannot write. The next run in the same processes then goes on as usual."""
    lines = [line for line in (runs / "out.txt").read_text().splitlines() if line.startswith(f"{mode}, process")]
    assert {line.split(":")[0] for line in lines} == {f"{mode}, process 0", f"{mode}, process 1"}
    assert len(lines) == 2 and all(message in line for line in lines)
    folder = runs / "two" / mode
    assert not (folder / "final.json").exists()
    lock_folder(folder).close()  # nobody holds it any more


def test_a_process_that_dies_ends_the_others(tmp_path):
    """Process 1 raises in the middle of an epoch, while process 0 waits for its gradients."""
    status, _, errors = work({"run": FGSM | dict(mode="raise")}, tmp_path)
    assert status != 0 and errors.count("RuntimeError: process 1 has had enough") == 1
    assert not (tmp_path / "run" / "final.json").exists()


def test_errors_of_the_command_line_are_printed_once(tmp_path):
    """A bad field, found by every process."""
    status, out, errors = torchrun("--set", "batch_size=1", home=tmp_path, module=("-m", "derkit.training"))
    assert status != 0 and out == "" and errors.count("error: batch_size is over all processes: 1 images") == 1
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ without processes
def fake(monkeypatch, rank, world, gpus=0):
    for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="x", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "world", lambda: world)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def test_one_process_needs_no_group(seeded):
    x, y, g = torch.rand(5, 1, 2, 2), torch.arange(5), seeded()
    assert distributed.share(x, y, g) == (x, y, g) and distributed.weight(g) == 1
    with distributed.processes():
        assert not torch.distributed.is_initialized() and distributed.world() == 1 and distributed.rank() == 0
    assert distributed.first(lambda: 3) == distributed.everywhere(lambda: 3) == distributed.in_turn(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        distributed.everywhere(lambda: 1 / 0)


@pytest.mark.parametrize("total, world", [(24, 2), (25, 2), (7, 3), (3, 3), (2, 3)])
def test_shares_partition_the_batch_and_its_draws(monkeypatch, seeded, total, world):
    x, y = torch.rand(total, 1, 2, 2), torch.arange(total)
    whole = torch.rand(x.shape, generator=seeded(1))
    rows, noise, weights = [], [], []
    for rank in range(world):
        fake(monkeypatch, rank, world)
        part, labels, draws = distributed.share(x, y, seeded(1))
        assert torch.equal(part, x[labels])
        rows.append(labels)
        noise.append(distributed.draw(torch.rand, part.shape, draws))
        weights.append(distributed.weight(draws))
    assert sum(weights) == pytest.approx(1)
    if total < world:  # all of it, by everybody
        assert all(torch.equal(r, y) and torch.equal(n, whole) for r, n in zip(rows, noise, strict=True))
    else:
        assert torch.equal(torch.cat(rows), y) and torch.equal(torch.cat(noise), whole)
        assert weights == [len(r) / total for r in rows]


def test_every_process_has_a_device_of_its_own(monkeypatch):
    fake(monkeypatch, 1, 2)
    assert distributed.device_name("auto") == distributed.device_name("cpu") == "cpu"
    wrong = ("cuda", 0, "no GPU of its own, found 0"), ("auto", 1, "Start at most 1"), ("cuda:1", 2, "'cuda:1' is one device")
    for name, gpus, words in wrong:
        fake(monkeypatch, 1, 2, gpus)
        with pytest.raises(DerkitError, match=words):
            distributed.device_name(name)
    fake(monkeypatch, 1, 2, 2)
    assert distributed.device_name("auto") == distributed.device_name("cuda") == "cuda:1"


def test_sync_bn_is_not_compiled():
    with pytest.raises(DerkitError, match="set compile=false"):
        TrainConfig.make(sync_bn=True, compile=True)


# ------------------------------------------------------------------------------------------------------ generation
GENERATE = ["n=40", "shard_size=10", "init=pca", "stop=fixed", "steps=3"]


def generate_words(folder, *more):
    sets = [w for s in GENERATE for w in ("--set", s)]
    return ["--checkpoint", str(folder / "final.pt"), "--device", "cpu", *sets, "--folder", *map(str, more)]


def shards(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("part_*.npz"))}


@pytest.fixture
def checkpoint(net, tmp_path):
    save_checkpoint(tmp_path / "final.pt", net(), TrainConfig.make("fashion_mini", train_size=400).as_dict())
    return tmp_path


def test_two_processes_generate_the_bytes_of_one(checkpoint):
    """Under torchrun: four shards by two processes, one manifest, one summary, printed once."""
    folder = checkpoint / "two"
    words = generate_words(checkpoint, folder, "--measure")
    status, out, errors = torchrun(*words, home=checkpoint, module=("-m", "derkit.generation"))
    assert status == 0, errors
    assert out.count("pairwise L2") == 1, "the metrics table as well"
    assert gen_cli.main(generate_words(checkpoint, checkpoint / "one")) == 0
    assert len(shards(checkpoint / "one")) == 4 and shards(checkpoint / "two") == shards(checkpoint / "one")
    one, two = (json.loads((checkpoint / n / "summary.json").read_text()) for n in ("one", "two"))
    assert one | dict(seconds_per_1000=0) == two | dict(seconds_per_1000=0) and out.count(f"samples: {folder}") == 1, out
    assert (checkpoint / "one" / "manifest.json").read_bytes() == (checkpoint / "two" / "manifest.json").read_bytes()
    lines = [(checkpoint / "two" / f"timing_{i}.jsonl").read_text().splitlines() for i in (1, 2)]
    assert [[json.loads(line)["shard"] for line in part] for part in lines] == [[0, 2], [1, 3]]
    assert len(load_samples(checkpoint / "two")) == 40
    status, again, errors = torchrun(*words, home=checkpoint, module=("-m", "derkit.generation"))
    assert status == 0 and again.count(f"samples: {folder}") == 1 and again.split("samples: ")[1] == out.split("samples: ")[1], again


def test_an_error_of_generating_processes_is_printed_once(checkpoint):
    """A class that the data does not have, found by both when all is loaded."""
    words = generate_words(checkpoint, checkpoint / "two", "--set", "classes=shoe")
    status, out, errors = torchrun(*words, home=checkpoint, module=("-m", "derkit.generation"))
    assert status != 0 and out == "" and errors.count("error: ") == 1 and "'shoe'" in errors
    assert not (checkpoint / "two").exists()


def test_parts_by_hand_and_another_number_of_them(checkpoint, capsys):
    """Part 2 of 3 alone, then all the rest by 1 of 2 and 2 of 2; the bytes do not know."""
    folder = checkpoint / "parts"
    assert gen_cli.main(generate_words(checkpoint, folder, "--part", "2/3")) == 0
    out = capsys.readouterr().out
    assert "part 2/3 is done; 3 of 4 shards" in out and "samples: " not in out
    assert set(shards(folder)) == {"part_00001.npz"} and not (folder / "summary.json").exists()
    kept = (folder / "part_00001.npz").stat().st_mtime_ns
    with pytest.raises(DerkitError, match="not finished"):
        load_samples(folder)
    assert gen_cli.main(generate_words(checkpoint, folder, "--part", "2/2")) == 0
    assert gen_cli.main(generate_words(checkpoint, folder, "--part", "1/2")) == 0
    assert "samples: " in capsys.readouterr().out and (folder / "part_00001.npz").stat().st_mtime_ns == kept
    assert gen_cli.main(generate_words(checkpoint, checkpoint / "one")) == 0
    assert shards(folder) == shards(checkpoint / "one") and len(load_samples(folder)) == 40


@pytest.mark.parametrize("words, message", [
    (["--inception", "/nowhere.pth"], "not found at /nowhere.pth"),
    (["--part", "3/2"], "found 3/2"),
    (["--part", "one"], "--part is I/N such as 1/4, found 'one'"),
    (["--part", "1/5"], "Use at most 4 parts, or a shard_size of at most 8"),
    (["--part", "1/2", "--fresh"], "delete the folder"),
])
def test_parts_that_cannot_be(checkpoint, capsys, words, message):
    assert gen_cli.main(generate_words(checkpoint, checkpoint / "out", *words)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (checkpoint / "out").exists()


def test_a_lone_writer_and_parts_keep_off_each_other(checkpoint, capsys):
    fcntl = pytest.importorskip("fcntl")
    (checkpoint / "out").mkdir()
    for kind, words in ((fcntl.LOCK_EX, ["--part", "1/2"]), (fcntl.LOCK_SH, [])):
        with open(checkpoint / "out" / ".lock", "a") as f:
            fcntl.flock(f, kind)
            assert gen_cli.main(generate_words(checkpoint, checkpoint / "out", *words)) == 2
        assert "another process is writing" in capsys.readouterr().err

"""Training runs at toy size: what they write, resume bit for bit, loading, precision, errors."""

import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from derkit import attacks, util
from derkit.checkpoint import load_checkpoint, load_state
from derkit.config import TrainConfig
from derkit.diagnosis.evaluation import accuracy, gradient_cosine, predict
from derkit.records import Run, read_lines, run_folder
from derkit.training import loop, monitor
from derkit.training.loop import SCHEDULES, model_from_config
from derkit.util import DerkitError
from tests.conftest import SMALL
from tests.survivor import record


def train(*args, **options):
    return loop.train(*args, **dict(verbose=False) | options)


class Own(nn.Module):
    """A user's module: dropout, no spec, no normaliser."""

    def __init__(self, hidden=8):
        super().__init__()
        torch.manual_seed(3)
        layers = nn.Linear(784, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, 10)
        self.net = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, x):
        return self.net(x)


def weights(run, name="final.safetensors"):
    return load_checkpoint(run.folder / name)["state"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@contextmanager
def interrupted(where, call=1, owner=loop):
    """Training in the block stops as by Ctrl-C at the n-th call of this function."""
    original, count = getattr(owner, where), iter(range(1, 100))

    def stop(*args, **options):
        if next(count) == call:
            raise KeyboardInterrupt
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, where, stop)
        yield


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run; nobody changes it."""
    config = TrainConfig.make("fashion_mini", **SMALL | dict(strong_size=4))
    return train(config, tiny, folder=tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def done(finished, tmp_path):
    """A copy of it."""
    return Run(shutil.copytree(finished.folder, tmp_path / "done"))


# ------------------------------------------------------------------------------------ a whole run
def test_what_a_run_writes(finished, tiny, config):
    names = {"config.json", "env.json", "metrics.jsonl", "final.json", "last.pt",
             "best.safetensors", "final.safetensors"}
    assert names <= {p.name for p in finished.folder.iterdir()} <= {".lock", *names}
    assert TrainConfig.read(finished.config["train"]) == config(strong_size=4)
    assert finished.config["sizes"] == dict(train=64, valid=32, test=32) and finished.finished
    about = dict(data_sha256="tiny", source="bundled", classes=tiny.classes)
    assert finished.config.items() >= about.items()
    assert finished.env.items() >= dict(precision="fp32", threads=1, device="cpu").items()
    assert list(finished.epochs["epoch"]) == [1, 2]
    rates = [0.1 * SCHEDULES["onecycle"]((epoch + 0.75) / 2, 0.25) for epoch in range(2)]
    assert list(finished.epochs["lr"]) == pytest.approx(rates)  # in the middle of the last step


def test_quantities_of_an_epoch(finished):
    wanted = {"train_loss", "train_penalty", "train_acc", "train_aae", "train_E_adv", "cos"}
    measured = ["clean", "fgsm", "pgd", "loss", "pgd_loss", "pgd_dE", "pgd_aae"]
    energies = ["dE", "dEy", "E", "E_adv", "aae"]
    wanted |= {f"probe_{name}" for name in measured + energies}
    wanted |= {f"valid_{name}" for name in measured} | {"E_lin"}
    row = read_lines(finished.folder / "metrics.jsonl")[0]
    assert -1 <= row["align"] <= 1 and -1 <= row["cos"] <= 1
    assert wanted <= set(row) and row["valid_loss"] < row["valid_pgd_loss"]
    shares = [k for k in row if k.endswith(("_clean", "_fgsm", "_pgd", "_acc", "_aae"))]
    assert all(0 <= row[name] <= 1 for name in shares)


def test_pert_align_of_the_probe(tiny, config):
    """cos(grad at the attack's start, grad at x*): FGSM starts at x."""
    run = train(config(method="fgsm", epochs=1, eps=0.2, precision="fp64"), tiny, verbose=False)
    model, probe = run.model(), tiny.train.take(slice(run.config["train"]["probe_size"]))
    x, y = probe.floats(dtype=torch.float64), probe.labels
    expected = gradient_cosine(model, x, attacks.fgsm(model, x, y, 0.2), y).mean().item()
    assert run.epochs["align"].iloc[0] == pytest.approx(expected, abs=1e-5)


def test_final_record(finished, tiny):
    final, test = finished.final, tiny.test.take(slice(16))
    assert set(final) == {"last", "last_epoch", "best", "best_epoch"} and final["last_epoch"] == 2
    for which in ("last", "best"):
        found = final[which]
        clean = accuracy(predict(finished.model(which), test), test.labels)
        assert found["clean"] == pytest.approx(clean, abs=1e-6)  # it is rounded
        assert {"fgsm", "pgd", "dE", "dEy", "aae", "strong"} <= set(found)
        assert (found["images"], found["strong_images"], found["pgd_steps"]) == (16, 4, 2)


def test_training_learns(config, home):
    """Adversarial training on 600 images beats chance under attack, and the loss falls."""
    sizes = dict(train_size=600, eval_size=100, final_size=100)
    run = train(config(epochs=4, width=8, method="pgd", **sizes))
    assert run.folder.parent == home / "runs" and run.config["sizes"]["train"] == 600
    assert run.epochs["train_loss"].iloc[-1] < 0.8 * run.epochs["train_loss"].iloc[0]
    assert run.final["last"]["clean"] > 0.4 and run.final["last"]["pgd"] > 0.2


# ------------------------------------------------------------------------------ loading and resume
def test_finished_run_is_loaded(done, tiny, config, capsys):
    times = {p.name: p.stat().st_mtime_ns for p in done.folder.iterdir()}
    again = train(config(strong_size=4), tiny, folder=done.folder, verbose=True)
    assert {p.name: p.stat().st_mtime_ns for p in again.folder.iterdir()} == times
    assert "loaded the finished run" in capsys.readouterr().out and again.final == done.final


def test_the_seed_decides(finished, tiny, config):
    """Initial weights and the order of the images; the global random state has no part in it."""
    assert record(train(config(strong_size=4), tiny).folder) == record(finished.folder)
    before = torch.get_rng_state()
    start, other = (model_from_config(config(seed=seed), tiny) for seed in (0, 1))
    assert not same(start.state_dict(), other.state_dict())
    assert torch.equal(before, torch.get_rng_state())
    run = train(config(seed=1), tiny, model=start)
    assert run.epochs["train_loss"][0] != finished.epochs["train_loss"][0]


def test_nothing_of_a_replaced_run_is_left(done, tiny, config, tmp_path):
    """resume=False, interrupted in its first epoch, then resumed: no file of the old run counts."""
    c = config(seed=1, epochs=1)
    with interrupted("train_step"):
        train(c, tiny, folder=done.folder, resume=False)
    assert record(train(c, tiny, folder=done.folder).folder) == record(train(c, tiny).folder)


@pytest.mark.parametrize("options", [
    dict(precision="fp32", method="rs_fgsm", regularizer="der", augment="crop_flip"),
    dict(precision="fp64", method="pgd", ema=0.9),
    dict(precision="fp64", method="trades", regularizer="elle", channels_last=False, clip=0.5),
    dict(precision="fp16", method="n_fgsm"),
    dict(precision="fp32", method="fgsm", regularizer="gradalign", schedule="triangular"),
], ids=lambda options: "-".join(map(str, options.values())))  # fmt: skip
def test_resume_gives_the_same_bytes(options, tiny, config, tmp_path, monkeypatch, capsys):
    """Interrupted in epoch 2: weights, momentum, averages, scale, metrics, final record."""
    c, scaler = config(**options), torch.amp.GradScaler
    growing = dict(init_scale=4.0, growth_interval=2)  # it grows after the two steps of an epoch
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, **growing))
    whole = train(c, tiny, folder=tmp_path / "whole")
    with interrupted("train_step", 4):
        train(c, tiny)
    folder = run_folder(c, tiny)
    assert len(read_lines(folder / "metrics.jsonl")) == 1 and not (folder / "final.json").exists()
    resumed = train(c, tiny, verbose=True)
    assert f"resuming {resumed.name} after epoch 1" in capsys.readouterr().out
    assert record(resumed.folder) == record(whole.folder)
    state = load_state(resumed.folder / "last.pt")
    assert ("ema" in state) == ("ema" in options)
    assert (state["scaler"].get("scale", 0) > 4) == (options["precision"] == "fp16")


def test_users_module_with_dropout(tiny, config, tmp_path):
    c, model = config(lr=1e-3), Own()
    whole = train(c, tiny, model=model, folder=tmp_path / "whole")
    assert whole.config["train"]["model"] == "custom" and same(model.state_dict(), weights(whole))
    assert (model.net[:3](tiny.train.floats()) > 0).float().mean() > 0.2  # so that dropout matters
    with interrupted("train_epoch", 2):
        train(c, tiny, model=Own())
    torch.rand(5)  # the global random state may have moved on
    resumed = train(c, tiny, model=Own())
    assert record(resumed.folder) == record(whole.folder)
    with pytest.raises(DerkitError, match="another model"):
        train(c, tiny, model=Own(16), folder=resumed.folder)


@pytest.mark.parametrize("where", ["save_checkpoint", "save_state", "write_lines"])
def test_resume_after_a_kill_between_files(where, tiny, config, tmp_path, monkeypatch):
    """Files of different epochs: the same record. The best epoch is the first of the highest PGD
    accuracy on validation images; test images are not looked at before the end."""
    c = config(epochs=4, probe_every=3)
    scores, original = {1: 0.2, 2: 0.3, 3: 0.5, 4: 0.5}, monitor.epoch_evaluation

    def evaluate(model, dataset, config, epoch):
        row = original(model, replace(dataset, test=None), config, epoch)
        return row | dict(valid_pgd=scores[epoch], probe_pgd=epoch)

    monkeypatch.setattr(monitor, "epoch_evaluation", evaluate)
    with interrupted(where, dict(save_checkpoint=4, save_state=3, write_lines=5)[where]):
        train(c, tiny)  # save_state: the best is of epoch 3 already, the state of epoch 2
    resumed, whole = train(c, tiny), train(c, tiny, folder=tmp_path / "whole")
    assert record(resumed.folder) == record(whole.folder)
    assert (whole.final["best_epoch"], whole.final["last_epoch"]) == (3, 4)
    assert not same(weights(whole, "best.safetensors"), weights(whole))
    rows = read_lines(whole.folder / "metrics.jsonl")
    assert ["cos" in row for row in rows] == [False, False, True, True]  # always in the last


def test_epochs_before_eval_from_are_not_evaluated(tiny, config):
    """The weights are the same; the best epoch is one of those that were evaluated."""
    whole, late = (train(config(epochs=4, eval_from=share), tiny) for share in (0, 0.5))
    rows = read_lines(late.folder / "metrics.jsonl")
    assert ["valid_pgd" in row for row in rows] == [False, False, True, True]
    assert all("train_loss" in row for row in rows) and late.final["best_epoch"] > 2
    assert same(weights(whole), weights(late)) and late.final["last"] == whole.final["last"]


def test_stop_on_co(tiny, config, monkeypatch, capsys):
    """The history is complete after a resume, and a stopped run does not go on."""
    c, seen, bars = config(epochs=4, stop_on_co=True), [], []
    monkeypatch.setattr(loop.util, "progress", lambda x, name: bars.append(iter(x)) or bars[-1])
    monkeypatch.setattr(loop, "should_stop", lambda rows: seen.append(rows[:]) or len(rows) == 3)
    for where, call in (("train_epoch", 3), ("_finish", 1)):
        with interrupted(where, call):
            train(c, tiny)
    assert [row["epoch"] for row in seen[-1]] == [1, 2, 3]
    monkeypatch.setattr(loop, "train_epoch", None)  # nothing is trained again
    run = train(c, tiny, verbose=True)
    assert run.final["last_epoch"] == 3 == len(run.epochs) and next(bars[-1], None) is None
    assert "stopped after epoch 3: catastrophic-overfitting alarm" in capsys.readouterr().out


@pytest.mark.parametrize("half", [False, True], ids=["finished", "half"])
def test_folder_of_another_run_is_refused(half, done, tiny, config):
    if half:
        (done.folder / "final.json").unlink()
    left = {p.name: p.read_bytes() for p in done.folder.iterdir()}
    for message, c, data in (("another config", config(strong_size=4, eps=0.2), tiny),
                             ("other data", config(strong_size=4), replace(tiny, sha256="other"))):
        with pytest.raises(DerkitError, match=message):
            train(c, data, folder=done.folder)
    assert {p.name: p.read_bytes() for p in done.folder.iterdir()} == left
    (done.folder / "config.json").write_text("{}")
    with pytest.raises(DerkitError, match="config.json is not the config of a run"):
        train(config(strong_size=4), tiny, folder=done.folder)


@pytest.mark.parametrize("eps", [0.1, 0.05])
def test_another_process_was_quicker(eps, tiny, config, tmp_path, monkeypatch):
    """It came, trained and went between the first look and the lock: there is a second look."""
    c, folder, original, runs = config(epochs=1), tmp_path / "run", util.hold, []

    def quicker(*args):
        monkeypatch.setattr(util, "hold", original)
        runs.append(record(train(c, tiny, folder=folder).folder))
        return original(*args)

    monkeypatch.setattr(util, "hold", quicker)
    refused = pytest.raises(DerkitError, match="another config")
    with nullcontext() if eps == c.eps else refused:
        train(c.change(eps=eps), tiny, folder=folder)
    assert [record(folder)] == runs


def test_model_of_the_config(tiny, config):
    """Options reach the model; the data set's normaliser is inside unless switched off."""
    for options in (dict(model="preact_resnet18", width=2, shortcut="x", final_bn=False),
                    dict(model="wide_resnet", width=1, depth=10)):
        spec = model_from_config(config(**options), tiny).spec
        assert spec["name"] == options.pop("model") and spec.items() >= options.items()
    model = model_from_config(config(batch_norm=False), tiny)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert torch.equal(model[0].mean.flatten(), torch.tensor(tiny.mean))
    assert model_from_config(config(normalize=False), tiny)[0].mean == 0


def test_another_model_and_a_last_batch_of_one_image(tiny, config, monkeypatch):
    odd = replace(tiny, name="odd", train=tiny.train.take(slice(5)))
    options = dict(model="preact_resnet18", width=2, epochs=1, batch_size=2, probe_size=2)
    sizes, step = [], loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda model, x, *rest, **more: (
        sizes.append(len(x)) or step(model, x, *rest, **more)))
    run = train(config(eval_size=2, final_size=0, **options), odd)
    assert sizes == [2, 2, 1]
    assert run.config["train"]["dataset"] == "odd" and run.final["last"]["images"] == 32  # 0: all


# ------------------------------------------------------------------------------------ optimisation
def test_schedules():
    points = (0, 0.2, 0.4, 0.7, 1)
    expected = {"constant": [1, 1, 1, 1, 1], "piecewise": [1, 1, 1, 0.1, 0.01],
                "triangular": [0, 0.5, 1, 0.5, 0], "onecycle": [1 / 25, 0.52, 1, 0.500002, 4e-6],
                "cosine": [1, 0.9045085, 0.6545085, 0.2061074, 0]}
    for name, factor in SCHEDULES.items():
        assert [factor(p, 0.4) for p in points] == pytest.approx(expected[name], abs=1e-7), name
        assert all(-1e-12 <= factor(p, peak) <= 1 for p in points for peak in (0.0, 1.0)), name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping(precision, tiny, config):
    """The step is lr times the clipped norm; in fp16 gradients are unscaled before."""
    options = dict(clip=0.01, weight_decay=0.0, epochs=1, batch_size=64, schedule="constant")
    run = train(config(precision=precision, method="standard", **options), tiny)
    start = dict(model_from_config(config(), tiny).named_parameters())
    moves = [(weights(run)[name] - p).detach().square().sum() for name, p in start.items()]
    assert sum(moves).sqrt().item() == pytest.approx(0.1 * 0.01, rel=0.01)  # float32 weights


def test_ema(finished, tiny, config):
    """The average is what is judged and kept; the raw weights go on in last.pt."""
    run, test = train(config(ema=0.9), tiny), tiny.test.take(slice(16))
    raw = load_state(run.folder / "last.pt")["model"]
    assert same(raw, weights(finished)) and not same(weights(run), raw)
    clean = accuracy(predict(run.model(), test), test.labels)
    assert run.final["last"]["clean"] == pytest.approx(clean, abs=1e-6)


@pytest.mark.parametrize("options", [dict(precision="bf16"), dict(augment="flip")], ids=str)
def test_half_precision_and_augmentation(options, finished, tiny, config):
    """They are used, and the weights that are kept are float32."""
    kept = weights(train(config(**options), tiny))
    dtypes = {v.dtype for v in kept.values() if v.is_floating_point()}
    assert dtypes == {torch.float32} and not same(kept, weights(finished))


@pytest.mark.parametrize("field", ["channels_last", "compile"])
def test_what_makes_it_faster_does_not_change_the_run(field, tiny, config, tmp_path, monkeypatch):
    """In float64 only the order of sums may differ. Compiled: traced, no C++ compiler is needed."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend="eager"))
    c = config(precision="fp64", width=8, epochs=1, regularizer="der")
    runs = [train(c.change(**{field: f}), tiny, folder=tmp_path / str(f)) for f in (False, True)]
    for a, b in zip(*(weights(run).values() for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_l2_reaches_the_evaluation(tiny, config, monkeypatch):
    norms, original = set(), attacks.pgd
    monkeypatch.setattr(
        attacks, "pgd", lambda *a, **k: norms.add(k.get("norm", "linf")) or original(*a, **k))
    train(config(method="pgd", norm="l2", eps=0.5, epochs=1, strong_size=2), tiny)
    assert norms == {"l2"}


def test_further_evaluation_of_a_finished_run(done, tiny, config, monkeypatch):
    """Nothing is trained, the rest of the record stays."""
    monkeypatch.setattr(loop, "train_epoch", None)
    one = lambda model, split, *_: torch.arange(len(split)) < 1  # noqa: E731
    monkeypatch.setattr(monitor.evaluation, "autoattack_mask", one)
    monkeypatch.setattr(monitor, "version", lambda name: "1")
    monkeypatch.setattr(monitor.evaluation, "find_spec", lambda name: name)
    c = config(strong_size=4, pgd50_size=1, autoattack_size=2)
    again = train(c, tiny, folder=done.folder)
    expected = dict(pgd50_images=1, pgd50_alpha=0.025, aa=0.5, aa_images=2,
                    aa_package="pyautoattack 1")
    for which in ("last", "best"):
        found, before = again.final[which], done.final[which]
        assert found == before | expected | dict(pgd50=found["pgd50"])
    with pytest.raises(DerkitError, match="AutoAttack needs eps > 0"):
        train(c.change(eps=0.0), tiny)
    monkeypatch.setattr(monitor.evaluation, "find_spec", lambda name: None)
    with pytest.raises(DerkitError, match=r"pip install \"derkit\[eval\]\""):
        train(c, tiny, folder=done.folder)


# ----------------------------------------------------------------------------------------- errors
def test_numbers_that_break(tiny, config):
    where = r"the loss is not finite at epoch [12], step [12] of 2\. No checkpoint was written"
    with pytest.raises(FloatingPointError, match=where):
        train(config(lr=1e30, schedule="constant", momentum=0, method="standard"), tiny)


def test_bad_input_before_any_work(config, home):
    for bad, message in (dict(model="wide_resnet", depth=11), "6n"), (dict(model="custom"), "'cu"):
        with pytest.raises(DerkitError, match=message):
            train(config(**bad))
    assert not (home / "runs").exists()


def test_weights_are_kept_on_the_way(tiny, config, tmp_path):
    """keep_every=2 of 5 epochs: those of 2 and 4, as a run that ends there would have them."""
    c = config(epochs=5, schedule="constant", keep_every=2)
    run = train(c, tiny, folder=tmp_path / "long", verbose=False)
    assert {p.stem for p in run.folder.glob("epoch-*")} == {"epoch-2", "epoch-4"}
    short = train(c.change(epochs=2, keep_every=0), tiny, folder=tmp_path / "short", verbose=False)
    for mine, theirs in zip(run.model(2).parameters(), short.model().parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(DerkitError, match="unknown epoch '3'.*Allowed: last, best, "):
        run.model(3)
    train(c.change(keep_every=0), tiny, folder=run.folder, resume=False, verbose=False)
    assert not [*run.folder.glob("epoch-*")], "a run that starts anew leaves nothing of the old one"


def test_the_best_epoch_is_judged_less_if_asked(tiny, config):
    """judge_best=false: strong suite and the like for the last epoch only; asked again, for all."""
    c = config(epochs=2, lr=0.0, strong_size=8, pgd50_size=4, judge_best=False)
    with_last, without = (train(c, tiny, verbose=False).final[name] for name in ("last", "best"))
    assert with_last["strong_images"] == 8 and with_last["pgd50_images"] == 4
    assert "strong" not in without and without["images"] == with_last["images"]
    assert train(c.change(judge_best=True), tiny, verbose=False).final["best"]["pgd50_images"] == 4

"""Training runs at toy size: what they write, resume bit by bit, reload, schedules, precision, errors."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from derkit import attacks, training
from derkit.checkpoint import load_checkpoint, load_model
from derkit.config import SCHEDULE_NAMES, TrainConfig
from derkit.data import Split
from derkit.device import choose_device, choose_precision
from derkit.errors import DerkitError
from derkit.evaluation import accuracy, predict
from derkit.records import Run, read_lines, runs_folder
from derkit.run_folders import run_folder
from derkit.schedules import SCHEDULES
from derkit.training import model_from_config, train

TIMING = ("seconds", "images_per_s")


class Own(nn.Module):
    """A user's module: dropout, no spec, no normaliser."""

    def __init__(self, hidden=8):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, 10)
        )

    def forward(self, x):
        return self.net(x)


def lines(run):
    """The metric lines without timing fields."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_lines(run.folder / "metrics.jsonl")]


def weights(run, name="final.pt"):
    return load_checkpoint(run.folder / name)["state"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def interrupt(monkeypatch, epoch):
    """Training stops as by Ctrl-C at the start of this epoch (from 1)."""
    original = training._train_epoch

    def stop(state, *args):
        if state.epoch + 1 == epoch:
            raise KeyboardInterrupt
        return original(state, *args)

    monkeypatch.setattr(training, "_train_epoch", stop)


# ---------------------------------------------------------------------------------------------------- a whole run
def test_a_run_writes_its_record(tiny, config):
    c = config(strong_size=4)
    run = train(c, tiny, verbose=False)
    assert {p.name for p in run.folder.iterdir()} == {
        "lock",
        "config.json",
        "env.json",
        "metrics.jsonl",
        "final.json",
        "best.pt",
        "last.pt",
        "final.pt",
    }
    assert run.folder == run_folder(c, tiny) and run.finished and isinstance(run, Run)
    assert TrainConfig(**run.config["train"]) == c and run.config["sizes"] == dict(train=64, valid=32, test=32)
    assert (
        run.config["data_sha256"] == "tiny"
        and run.config["source"] == "bundled"
        and run.config["classes"] == tiny.classes
    )
    assert run.env["precision"] == "fp32" and run.env["threads"] == 1 and run.env["device"] == "cpu"
    assert list(run.epochs["epoch"]) == [1, 2]
    assert len(run.steps("loss")) == 2 * math.ceil(64 / 32) == len(run.steps("aae"))


def test_every_epoch_records_the_named_quantities(tiny, config):
    row = lines(train(config(), tiny, verbose=False))[0]
    wanted = {
        "train_loss",
        "train_penalty",
        "train_acc",
        "train_aae",
        "train_E_adv",
        "lr",
        "cos",
        "E_lin",
        "steps",
        "epoch",
    }
    wanted |= {
        f"{part}_{name}"
        for part in ("valid", "probe")
        for name in ("clean", "fgsm", "pgd", "loss", "pgd_loss", "pgd_dE", "pgd_aae")
    }
    wanted |= {f"probe_{name}" for name in ("dE", "dEy", "E", "E_adv", "aae", "dE_q05", "dE_q50", "dE_q95", "dEy_q50")}
    assert wanted <= set(row)
    shares = [k for k in row if k.endswith(("_clean", "_fgsm", "_pgd", "_acc", "_aae"))]
    assert all(0 <= row[k] <= 1 for k in shares) and row["lr"] > 0
    assert row["valid_pgd"] <= row["valid_clean"]


def test_final_record(tiny, config):
    run = train(config(strong_size=4), tiny, verbose=False)
    final = run.final
    assert set(final) == {"last", "last_epoch", "best", "best_epoch"} and final["last_epoch"] == 2
    for part in ("last", "best"):
        assert {"clean", "fgsm", "pgd", "pgd_steps", "images", "dE", "dEy", "aae", "strong", "strong_images"} == set(
            final[part]
        )
        assert final[part]["images"] == 16 and final[part]["strong_images"] == 4 and final[part]["pgd_steps"] == 2
    test = tiny.test.take(slice(16))
    assert final["last"]["clean"] == pytest.approx(
        accuracy(predict(load_model(run.folder / "final.pt"), test), test.labels), abs=1e-6
    )
    assert final["best"]["clean"] == pytest.approx(
        accuracy(predict(load_model(run.folder / "best.pt"), test), test.labels), abs=1e-6
    )


def test_final_size_0_means_all(tiny, config):
    assert train(config(final_size=0, epochs=1), tiny, verbose=False).final["last"]["images"] == 32


def test_training_learns(mini, config):
    """Adversarial training on 600 images beats chance under attack, and the loss falls."""
    data = replace(
        mini, train=mini.train.take(slice(600)), valid=mini.valid.take(slice(100)), test=mini.test.take(slice(100))
    )
    run = train(config(epochs=4, width=8, method="pgd", lr=0.1, eval_size=100, final_size=100), data, verbose=False)
    assert run.epochs["train_loss"].iloc[-1] < 0.8 * run.epochs["train_loss"].iloc[0]
    assert run.final["last"]["clean"] > 0.4 and run.final["last"]["pgd"] > 0.2


def test_default_dataset_and_folder_name(config, home):
    run = train(config(train_size=40, epochs=1, regularizer="der"), verbose=False)
    assert run.folder.parent == home / "runs" and run.config["sizes"]["train"] == 40
    assert run.name.startswith("fashion_mini-rs_fgsm-der-segment-eps0.1-s0-")


# ------------------------------------------------------------------------------------------------- reload and resume
def test_finished_run_is_loaded_not_retrained(tiny, config, capsys, monkeypatch):
    run = train(config(), tiny)
    times = {p.name: p.stat().st_mtime_ns for p in run.folder.iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(training, "_train_epoch", lambda *a: pytest.fail("trained again"))
    again = train(config(), tiny)
    assert {p.name: p.stat().st_mtime_ns for p in again.folder.iterdir()} == times
    assert "loaded the finished run" in capsys.readouterr().out and again.final == run.final


def test_resume_false_trains_anew(tiny, config):
    run = train(config(), tiny, verbose=False)
    before, state = (run.folder / "final.json").stat().st_mtime_ns, weights(run)
    again = train(config(), tiny, verbose=False, resume=False)
    assert (
        (again.folder / "final.json").stat().st_mtime_ns > before
        and len(lines(again)) == 2
        and same(weights(again), state)
    )


def test_nothing_of_a_replaced_run_is_left(tiny, config, tmp_path, monkeypatch):
    """resume=False, interrupted in its first epoch, then resumed: the old run's checkpoint is not taken up."""
    train(config(), tiny, folder=tmp_path / "r", verbose=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 1)
        train(config(seed=1), tiny, folder=tmp_path / "r", resume=False, verbose=False)
    run = train(config(seed=1), tiny, folder=tmp_path / "r", verbose=False)
    whole = train(config(seed=1), tiny, folder=tmp_path / "whole", verbose=False)
    assert lines(run) == lines(whole) and same(weights(run), weights(whole))


RESUME = [
    dict(precision="fp32", method="rs_fgsm", regularizer="der", variant="hinge", augment="crop_flip"),
    dict(precision="fp64", method="pgd", ema=0.9),
    dict(precision="fp64", method="trades", regularizer="elle", channels_last=False, clip=0.5),
    dict(precision="fp16", method="n_fgsm"),
    dict(precision="fp32", method="fgsm", regularizer="gradalign", schedule="triangular"),
]


@pytest.mark.parametrize("options", RESUME, ids=lambda o: "-".join(map(str, o.values())))
def test_resume_gives_the_same_result(options, tiny, config, monkeypatch, capsys):
    """Interrupted after epoch 1 of 3: same weights, same lines, same final record as in one go."""
    c = config(epochs=3, **options)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=4.0, growth_interval=2))
    whole = train(c, tiny, folder=runs_folder() / "whole", verbose=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 2)
        train(c, tiny)
    folder = run_folder(c, tiny)
    assert len(read_lines(folder / "metrics.jsonl")) == 1 and not (folder / "final.json").exists()
    resumed = train(c, tiny)
    assert "resuming" in capsys.readouterr().out
    assert lines(resumed) == lines(whole) and resumed.final == whole.final
    for name in ("final.pt", "best.pt", "last.pt"):
        assert same(weights(resumed, name), weights(whole, name)), name
    last = [load_checkpoint(run.folder / "last.pt") for run in (resumed, whole)]
    for name in ("epoch", "best", "best_epoch", "scaler"):
        assert last[0][name] == last[1][name], name
    assert last[0]["scaler"] == {} or last[0]["scaler"]["scale"] > 4  # it grew on the way


def test_resume_of_a_users_module_with_dropout(tiny, config, monkeypatch):
    c, model = config(epochs=3, lr=1e-3), Own()
    whole = train(c, tiny, model=model, folder=runs_folder() / "whole", verbose=False)
    assert (model.net[:3](tiny.train.floats()) > 0).float().mean() > 0.2  # its units are alive: dropout matters
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3)
        train(c, tiny, model=Own(), verbose=False)
    torch.rand(5)  # the global random state may have moved on
    resumed = train(c, tiny, model=Own(), verbose=False)
    assert lines(resumed) == lines(whole) and same(weights(resumed), weights(whole))


@pytest.mark.parametrize("every", [1, 2])
def test_resume_after_a_kill_between_line_and_checkpoint(tiny, config, monkeypatch, every):
    """Lines of epochs that the checkpoint does not know are dropped, a torn one too."""
    c = config(epochs=4, save_every=every)
    whole = train(c, tiny, folder=runs_folder() / "whole", verbose=False)
    original, count = training.save_checkpoint, iter(range(100))

    def dies(path, *args, **kw):
        if path.name == "last.pt" and next(count) == 1:
            raise KeyboardInterrupt
        original(path, *args, **kw)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_checkpoint", dies)
        train(c, tiny, verbose=False)
    metrics = run_folder(c, tiny) / "metrics.jsonl"
    assert len(read_lines(metrics)) == 2 * every
    metrics.write_text(metrics.read_text()[:-30])
    with pytest.warns(UserWarning, match="truncated"):
        resumed = train(c, tiny, verbose=False)
    assert lines(resumed) == lines(whole) and same(weights(resumed), weights(whole))


def test_resume_before_the_final_evaluation(tiny, config, monkeypatch):
    """A kill during the last evaluation: nothing is trained again."""
    whole = train(config(), tiny, folder=runs_folder() / "whole", verbose=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "final_evaluation", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        train(config(), tiny, verbose=False)
    monkeypatch.setattr(training, "_train_epoch", lambda *a: pytest.fail("trained again"))
    resumed = train(config(), tiny, verbose=False)
    assert resumed.final == whole.final and lines(resumed) == lines(whole)


def test_alarm_sees_the_epochs_before_the_interruption(tiny, config, monkeypatch):
    """Stopping on CO: the history is complete after a resume, and a stopped run does not go on."""
    c, seen = config(epochs=4, stop_on_co=True), []

    def alarm(rows):
        seen.append([r["epoch"] for r in rows])
        return len(rows) == 3

    monkeypatch.setattr(training.alarms, "should_stop", alarm)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3)
        train(c, tiny, verbose=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "_finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        train(c, tiny, verbose=False)
    assert seen[-1] == [1, 2, 3]
    run = train(c, tiny, verbose=False)
    assert run.final["last_epoch"] == 3 == len(run.epochs)


def test_stop_on_co(tiny, config, monkeypatch, capsys):
    monkeypatch.setattr(training.alarms, "should_stop", lambda rows: len(rows) == 1)
    run = train(config(stop_on_co=True), tiny)
    assert run.final["last_epoch"] == 1 and "catastrophic-overfitting alarm" in capsys.readouterr().out
    assert train(config(), tiny, verbose=False).final["last_epoch"] == 2  # off by default


def test_folder_of_another_config_is_refused(tiny, config, tmp_path, monkeypatch):
    train(config(epochs=1), tiny, folder=tmp_path / "run", verbose=False)
    with pytest.raises(DerkitError, match="another config"):
        train(config(epochs=1, eps=0.2), tiny, folder=tmp_path / "run", verbose=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 2)
        train(config(), tiny, folder=tmp_path / "half", verbose=False)
    with pytest.raises(DerkitError, match="another config"):
        train(config(seed=1), tiny, folder=tmp_path / "half", verbose=False)
    assert (
        train(config(epochs=1, eps=0.2), tiny, folder=tmp_path / "run", resume=False, verbose=False).config["train"][
            "eps"
        ]
        == 0.2
    )


def test_folder_of_other_data_is_refused(tiny, config, tmp_path, monkeypatch):
    other = replace(tiny, sha256="other")
    assert run_folder(config(), tiny) != run_folder(config(), other)
    train(config(epochs=1), tiny, folder=tmp_path / "run", verbose=False)
    with pytest.raises(DerkitError, match="other data"):
        train(config(epochs=1), other, folder=tmp_path / "run", verbose=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 2)
        train(config(), tiny, folder=tmp_path / "half", verbose=False)
    with pytest.raises(DerkitError, match="other data"):
        train(config(), other, folder=tmp_path / "half", verbose=False)


def test_same_seed_same_run_and_other_seed_other_run(tiny, config, tmp_path):
    one, two, other = (
        train(config(seed=s), tiny, folder=tmp_path / name, verbose=False) for s, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert lines(one) == lines(two) and same(weights(one), weights(two))
    assert lines(one) != lines(other) and not same(weights(one), weights(other))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    a, b = (train(config(seed=s, epochs=1), tiny, model=copy.deepcopy(linear), verbose=False) for s in (0, 1))
    assert lines(a)[0]["steps"] != lines(b)[0]["steps"]  # equal initial weights: the order of the images differs
    a, b = (model_from_config(config(seed=s), tiny).state_dict() for s in (0, 1))
    assert not torch.equal(a["1.head.weight"], b["1.head.weight"])


def test_model_is_seeded_without_the_global_random_state(tiny, config):
    before = torch.get_rng_state()
    a = model_from_config(config(), tiny)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert same(a.state_dict(), model_from_config(config(), tiny).state_dict())


# ----------------------------------------------------------------------------------------------- models of the user
def test_users_module(tiny, config):
    model = Own()
    before = copy.deepcopy(model.state_dict())
    run = train(config(), tiny, model=model, verbose=False)
    assert run.config["train"]["model"] == "custom" and not same(before, model.state_dict())
    assert same(
        model.state_dict(), weights(run)
    )  # afterwards the module holds the last weights, whichever epoch was best
    again = load_model(run.folder / "best.pt", model=Own())
    assert accuracy(predict(again, tiny.test.take(slice(16))), tiny.test.labels[:16]) == pytest.approx(
        run.final["best"]["clean"], abs=1e-6
    )


def test_two_different_modules_do_not_share_a_run(tiny, config):
    """The config says only 'custom': the folder must tell them apart."""
    small, wide = (train(config(epochs=1), tiny, model=Own(n), verbose=False) for n in (8, 16))
    assert small.folder != wide.folder and weights(wide)["net.1.weight"].shape[0] == 16
    assert train(config(epochs=1), tiny, model=Own(8), verbose=False).folder == small.folder
    with pytest.raises(DerkitError, match="another model"):
        train(config(epochs=1), tiny, model=Own(16), folder=small.folder, verbose=False)


@pytest.mark.parametrize(
    "options",
    [
        dict(model="preact_resnet18", width=2, shortcut="x", final_bn=False),
        dict(model="wide_resnet", width=1, depth=10),
    ],
)
def test_other_models(options, tiny, config):
    run = train(config(epochs=1, method="fgsm", eval_size=8, final_size=8, **options), tiny, verbose=False)
    model = load_model(run.folder / "best.pt", classes=10)
    assert (
        model.spec["name"] == options["model"]
        and model.spec.items() >= {k: v for k, v in options.items() if k != "model"}.items()
    )


def test_small_cnn_without_batch_norm(tiny, config):
    with_bn, without = (model_from_config(config(batch_norm=flag), tiny) for flag in (True, False))
    assert [any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model in (with_bn, without)] == [
        True,
        False,
    ]


def test_normaliser_of_the_data_set(tiny, config):
    assert torch.equal(model_from_config(config(), tiny)[0].mean.flatten(), torch.tensor([0.2860]))
    assert model_from_config(config(normalize=False), tiny)[0].mean == 0


# --------------------------------------------------------------------------------------- optimisation and precision
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_every_schedule(schedule, tiny, config, tmp_path):
    """The recorded rate is the peak rate times the schedule at the middle of the last step."""
    run = train(config(schedule=schedule, peak=0.4, lr=0.05), tiny, folder=tmp_path / "r", verbose=False)
    expected = [0.05 * SCHEDULES[schedule]((epoch + 0.75) / 2, 0.4) for epoch in range(2)]
    assert list(run.epochs["lr"]) == pytest.approx(expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp64"])
def test_precision_on_a_cpu(precision, tiny, config):
    run = train(config(precision=precision, epochs=1, regularizer="der"), tiny, verbose=False)
    assert run.env["precision"] == precision and run.epochs["train_loss"].notna().all()
    dtypes = {v.dtype for k, v in weights(run).items() if v.is_floating_point()}
    assert dtypes == {torch.float64 if precision == "fp64" else torch.float32}  # master weights


def test_half_precision_is_used(tiny, config, tmp_path):
    runs = [train(config(precision=p, epochs=1), tiny, folder=tmp_path / p, verbose=False) for p in ("fp32", "bf16")]
    assert not same(*(weights(r) for r in runs))


def test_channels_last_does_not_change_the_run(tiny, config, tmp_path):
    """In float64 only the order of sums may differ."""
    runs = [
        train(config(precision="fp64", channels_last=flag, epochs=1), tiny, folder=tmp_path / str(flag), verbose=False)
        for flag in (True, False)
    ]
    for a, b in zip(weights(runs[0]).values(), weights(runs[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_compiled_model_gives_the_same_run(tiny, config, tmp_path, monkeypatch):
    """Modes, statistics and checkpoints go through the wrapper (traced only: no C++ compiler is needed)."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend="eager"))
    options = dict(epochs=1, method="rs_fgsm", regularizer="der", precision="fp64")
    runs = [train(config(compile=f, **options), tiny, folder=tmp_path / str(f), verbose=False) for f in (False, True)]
    assert lines(runs[0]) == lines(runs[1]) and same(weights(runs[0]), weights(runs[1]))


def test_ema(tiny, config, tmp_path):
    """The average is what is judged and kept; the raw weights go on in last.pt."""
    run = train(config(ema=0.9), tiny, folder=tmp_path / "ema", verbose=False)
    plain = train(config(), tiny, folder=tmp_path / "plain", verbose=False)
    assert same(weights(run, "last.pt"), weights(plain, "last.pt")) and not same(weights(run), weights(plain))
    assert load_model(run.folder / "final.pt").spec == model_from_config(config(), tiny).spec
    test = tiny.test.take(slice(16))
    assert run.final["last"]["clean"] == pytest.approx(
        accuracy(predict(load_model(run.folder / "final.pt"), test), test.labels), abs=1e-6
    )


def test_clipping(tiny, config, tmp_path):
    """A tiny largest norm leaves the weights almost where they were."""
    options = dict(weight_decay=0.0, momentum=0.0, epochs=1, precision="fp64")
    start = model_from_config(config(), tiny).double().state_dict()
    moves = []
    for clip in (0.0, 1e-6):
        after = weights(train(config(clip=clip, **options), tiny, folder=tmp_path / str(clip), verbose=False))
        moves.append((after["1.head.weight"] - start["1.head.weight"]).norm())
    assert 0 < moves[1] < 1e-6 and moves[0] > 1e-3


def test_clipping_in_half_precision(tiny, config, tmp_path):
    """Gradients are unscaled before they are clipped: fp16 moves as far as fp32."""
    start, moves = model_from_config(config(), tiny).state_dict(), []
    for precision in ("fp32", "fp16"):
        c = config(clip=0.1, weight_decay=0.0, epochs=1, precision=precision)
        after = weights(train(c, tiny, folder=tmp_path / precision, verbose=False))
        moves.append((after["1.head.weight"] - start["1.head.weight"]).norm().item())
    assert moves[0] > 1e-4 and moves[1] == pytest.approx(moves[0], rel=0.2)


def test_one_sgd_step_by_hand(tiny, config):
    """One batch, one epoch of standard training in float64: w - lr (g + wd w)."""
    part = replace(tiny, train=tiny.train.take(slice(16)))
    c = config(
        method="standard", precision="fp64", epochs=1, batch_size=16, schedule="constant", lr=0.1, weight_decay=0.01
    )
    run = train(c, part, verbose=False)
    model = model_from_config(c, part).double().train()
    nn.functional.cross_entropy(model(part.train.floats(dtype=torch.float64)), part.train.labels).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(weights(run)[name], (p - 0.1 * (p.grad + 0.01 * p)).detach(), rtol=1e-9, atol=1e-12)


def test_augmentation_and_l2_reach_the_run(tiny, config, tmp_path, monkeypatch):
    """crop_flip changes training; in an L_2 run the evaluation attacks are L_2 as well."""
    plain, moved = (
        train(config(augment=a, epochs=1), tiny, folder=tmp_path / a, verbose=False) for a in ("none", "crop_flip")
    )
    assert not same(weights(plain), weights(moved))
    norms, original = set(), attacks.pgd
    monkeypatch.setattr(attacks, "pgd", lambda *a, **k: norms.add(k.get("norm", "linf")) or original(*a, **k))
    train(config(method="pgd", norm="l2", eps=0.5, epochs=1, strong_size=2), tiny, verbose=False)
    assert norms == {"l2"}


def test_probe_cadence(tiny, config):
    rows = lines(train(config(epochs=3, probe_every=2), tiny, verbose=False))
    assert ["cos" in r for r in rows] == ["E_lin" in r for r in rows] == [False, True, True]  # and always the last


@pytest.mark.parametrize("method", ["standard", "trades", "weat", "n_fgsm", "pgd"])
def test_every_method_runs(method, tiny, config):
    run = train(config(method=method, epochs=1), tiny, verbose=False)
    assert run.epochs["train_aae"].isna().all() == (method in ("standard", "pgd"))
    assert run.epochs["probe_dE"].notna().all()


def test_best_epoch_is_chosen_on_validation(tiny, config, monkeypatch):
    """The first epoch with the highest PGD accuracy on valid; test is not looked at before the end."""
    scores = iter([0.2, 0.5, 0.5, 0.1])
    original, states = training.epoch_evaluation, []

    def evaluate(model, dataset, *args):
        states.append(copy.deepcopy(model.state_dict()))
        return original(model, replace(dataset, test=None), *args) | {"valid_pgd": next(scores), "probe_pgd": 1.0}

    monkeypatch.setattr(training, "epoch_evaluation", evaluate)
    run = train(config(epochs=4), tiny, verbose=False)
    assert run.final["best_epoch"] == 2 and run.final["last_epoch"] == 4
    assert same(weights(run, "best.pt"), states[1]) and same(weights(run), states[3])
    assert load_checkpoint(run.folder / "best.pt")["epoch"] == 2


def test_uneven_last_batch(tiny, config):
    part = replace(tiny, train=tiny.train.take(slice(33)))
    run = train(config(epochs=1, batch_size=16), part, verbose=False)
    assert len(run.steps("loss")) == 3


# ------------------------------------------------------------------------------------------------------------ errors
def test_nan_loss_names_the_epoch(tiny, config):
    with pytest.raises(FloatingPointError, match=r"not finite at epoch [12], step [12] of 2"):
        train(config(lr=1e30, schedule="constant", momentum=0, method="standard"), tiny, verbose=False)


def test_weights_that_break_in_the_last_step_are_noticed(tiny, config):
    """The loss of the only step is finite, the weights after it are not usable."""
    with pytest.raises(FloatingPointError, match="epoch 1"):
        train(
            config(lr=1e38, schedule="constant", batch_size=64, epochs=1, method="standard", weight_decay=0),
            tiny,
            verbose=False,
        )


def test_bad_input_before_any_work(config, tiny, home):
    for bad, message in (
        (dict(dataset="fashionmini"), "Did you mean 'fashion_mini'"),
        (dict(train_size=5000), "larger than the 4000"),
        (dict(data_dir="/nowhere/at/all"), "does not exist"),
        (dict(device="cuda:77"), "not usable here"),
        (dict(device="gpu"), "not usable here"),
        (dict(model="wide_resnet", depth=11), "6n"),
        (dict(model="custom"), "custom"),
    ):
        with pytest.raises(DerkitError, match=message):
            train(config(**bad), verbose=False)
    assert not (home / "runs").exists()


def test_choice_of_device_and_precision(config):
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_precision(config(precision="auto"), torch.device("cpu")) == ("fp32", "auto on cpu")
    assert choose_precision(config(precision="bf16"), torch.device("cpu")) == ("bf16", "set in the config")


def test_precision_on_gpus(config, monkeypatch):
    """bf16 where the GPU has it, fp16 on older ones, fp32 for GradAlign, with the reason."""
    c, gpu = config(precision="auto"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: True)
    assert choose_precision(c, gpu)[0] == "bf16"
    assert choose_precision(c.change(method="fgsm", regularizer="gradalign"), gpu)[0] == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: False)
    for capability, expected in (((7, 5), "fp16"), ((6, 1), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        precision, why = choose_precision(c, gpu)
        assert precision == expected and why


def test_records_are_plain_json(tiny, config):
    run = train(config(epochs=1, method="pgd"), tiny, verbose=False)
    text = (run.folder / "metrics.jsonl").read_text() + (run.folder / "final.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text.splitlines()[0])["train_aae"] is None


def test_tiny_batches_of_one_image(tiny, config):
    split = Split(tiny.train.images[:3], tiny.train.labels[:3])
    run = train(config(epochs=1, batch_size=2, probe_size=2), replace(tiny, train=split), verbose=False)
    assert len(run.steps("acc")) == 2


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    """The second one gets a clear error and the first one's files are left alone."""
    from derkit.records import lock_folder

    config = TrainConfig.make(train_size=32, epochs=1, width=4, eval_size=8, probe_size=8, final_size=8, strong_size=0)
    held = lock_folder(tmp_path)
    with pytest.raises(DerkitError, match="another process"):
        train(config, folder=tmp_path, verbose=False)
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]
    held.close()
    assert train(config, folder=tmp_path, verbose=False).finished

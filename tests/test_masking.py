"""Gradient masking: masked models are flagged, each by the check made for it; ordinary ones are not."""

import json
import math

import pytest
import torch
from torch import nn

import derkit
from derkit.errors import DerkitError
from derkit.masking import VERDICTS, gradient_masking
from derkit.results import records_folder

QUICK = dict(images=40, steps=(1, 5, 20), restarts=1, noise=10)


class Saturated(nn.Module):
    """Logits so large that float32 has no gradient of the cross-entropy left."""

    def __init__(self, model, scale=1e4):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x):
        return self.model(x) * self.scale


class Quantised(nn.Module):
    """Pixels rounded to five levels: the gradient is zero everywhere."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((x * 4).round() / 4)


class _Shatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        g = torch.Generator().manual_seed(int(grad.double().abs().sum().item() * 1e6) % 2**31)
        return torch.randn(grad.shape, generator=g, dtype=grad.dtype)


class Shattered(nn.Module):
    """The model's own predictions, with noise for gradients."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(_Shatter.apply(x))


class Needle(nn.Module):
    """Two classes and no gradient: a flat grey image turns into class 1 where a random direction meets it, one try in ten."""

    def __init__(self):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(36, generator=torch.Generator().manual_seed(3)))

    def forward(self, x):
        t = (x.flatten(1) - 0.5) @ self.direction / self.direction.norm() - 0.037  # noise of radius 0.05 has std 0.029
        return torch.stack([-t, t], 1) * 100


def names(report):
    return {c.name for c in report.reasons}


def test_ordinary_models_show_no_sign(trained, robust, mini):
    """A standard and a PGD-trained network, the second also with the first's examples."""
    for model, options in ((trained, {}), (robust, dict(source=trained)), (robust, dict(norm="l2"))):
        report = gradient_masking(model, mini.test, 1.0 if options.get("norm") else 0.1, **QUICK, **options)
        assert report.verdict == "no sign" and report.reasons == (), str(report)
        assert len(report.checks) == 10 + ("source" in options)
        assert report.by_eps["accuracy"].iloc[-1] == 0 and report.by_eps["loss"].is_monotonic_increasing
        assert str(report).startswith("gradient masking: no sign (40 images") and "\n" not in str(report)


def test_the_numbers_are_those_of_the_kits_evaluation(robust, mini):
    """Clean accuracy and FGSM as measured elsewhere."""
    part = mini.test.take(slice(40))
    report = gradient_masking(robust, part, 0.1, **QUICK)
    assert report.by_eps["accuracy"][0] == pytest.approx(derkit.robust_accuracy(robust, part, 0.0))
    x, y = part.floats(), part.labels
    fooled = robust(derkit.fgsm(robust, x, y, 0.1)).argmax(1) != y
    assert report.by_steps["accuracy"][0] == pytest.approx(1 - fooled.double().mean().item())
    assert list(report.by_steps["steps"]) == [1, 5, 20]
    assert report.by_eps["eps"].tolist() == pytest.approx([0, 0.025, 0.05, 0.1, 0.2, 0.4, 1])


@pytest.mark.parametrize("mask, expected", [
    (Saturated, {"gradients vanish", "the cross-entropy hides what the margin shows", "an unbounded attack fails"}),
    (Quantised, {"gradients vanish", "an unbounded attack fails"}),
], ids=lambda p: getattr(p, "__name__", ""))  # fmt: skip
def test_masked_models_are_flagged(mask, expected, trained, mini):
    report = gradient_masking(mask(trained).eval(), mini.test, 0.1, **QUICK)
    assert report.verdict == "masked" and expected <= names(report), str(report)
    for c in report.reasons:
        assert c.found > c.bound and f"{c.found:.3f} against {c.bound:.3f}" in str(report) and c.proves in VERDICTS


def test_transfer_sees_what_gradients_do_not(trained, mini):
    """Gradients of noise: the same network with its own gives it away, and no gradient agrees with its neighbour."""
    report = gradient_masking(Shattered(trained).eval(), mini.test, 0.1, source=trained, **QUICK)
    assert report.verdict == "masked"
    assert {"another model's examples find what gradients miss", "the loss is not locally linear"} <= names(report)


def test_noise_sees_what_gradients_do_not():
    """A gradient attack that is blind finds less than fifty throws of the dice."""
    x, y = torch.full((40, 1, 6, 6), 0.5), torch.zeros(40).long()
    model = Needle()
    model.forward = lambda x: Needle.forward(model, x.detach() + 0 * x)  # zero gradient
    report = gradient_masking(model, (x, y), 0.05, **QUICK | dict(noise=50))
    assert report.verdict == "masked" and "noise finds what gradients miss" in names(report), str(report)


def test_collapsed_model_is_flagged(toy_run, mini):
    """Catastrophic overfitting of FGSM training: its FGSM accuracy says nothing."""
    collapsed = toy_run(method="fgsm", eps=0.3, epochs=10, lr=0.2, width=8)
    report = gradient_masking(collapsed, mini.test, 0.3, **QUICK)
    one, many = report.by_steps["accuracy"].iloc[0], report.by_steps["accuracy"].iloc[-1]
    assert one > 0.3 and many < 0.15, "the run did not collapse: the test has no case"
    assert report.verdict != "no sign" and "one step is blind" in names(report), str(report)


def test_one_step_that_beats_many_is_flagged(mini, trained):
    """Honest at x itself, shattered everywhere else: FGSM works, iterating loses what it gained."""

    class Rough(nn.Module):
        def __init__(self, model, x):
            super().__init__()
            self.model, self.known = model, x

        def forward(self, x):
            honest = any((k.shape == x.shape and torch.equal(k, x)) for k in self.known.split(len(x)))
            return self.model(x if honest else _Shatter.apply(x))

    x, y = mini.test.floats(0, 40), mini.test.labels[:40]
    report = gradient_masking(Rough(trained, x).eval(), (x, y), 0.1, **QUICK)
    assert report.verdict == "masked" and "one step beats many" in names(report), str(report)


def test_split_and_tensors_give_the_same_report(trained, mini):
    one = gradient_masking(trained, mini.test, 0.1, **QUICK)
    two = gradient_masking(trained, (mini.test.floats(0, 40), mini.test.labels[:40]), 0.1, **QUICK)
    assert one.checks == two.checks and one.by_eps.equals(two.by_eps)
    wide = gradient_masking(trained.double(), mini.test, 0.1, **QUICK)
    assert wide.verdict == "no sign" and abs(wide.by_eps["accuracy"][0] - one.by_eps["accuracy"][0]) < 0.02


def test_the_model_is_left_as_it_was(trained, mini):
    trained.train()
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    gradient_masking(trained, mini.test, 0.1, **QUICK | dict(images=10))
    assert torch.equal(torch.rand(1), expected) and all(m.training for m in trained.modules())
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert all(p.grad is None for p in trained.parameters())


@pytest.mark.parametrize("options, message", [
    (dict(eps=8), "8 / 255"), (dict(eps=0.0), "eps > 0"), (dict(eps=math.nan), "eps"), (dict(steps=(5, 20)), "rise from 1"),
    (dict(steps=(1,)), "rise from 1"), (dict(steps=(1, 20, 5)), "rise from 1"), (dict(norm="l1"), "norm"), (dict(restarts=0), "restarts"),
    (dict(images=0), "at least one image"),
], ids=str)  # fmt: skip
def test_bad_input(options, message, trained, mini):
    with pytest.raises(DerkitError, match=message):
        gradient_masking(trained, mini.test, **({"eps": 0.1} | options))
    with pytest.raises(DerkitError, match=r"\[0, 1\].*normaliser"):
        gradient_masking(trained, (mini.test.floats(0, 4) * 255, mini.test.labels[:4]), 0.1)
    with pytest.raises(DerkitError, match="at least one image"):
        gradient_masking(trained, (mini.test.floats(0, 0), mini.test.labels[:0]), 0.1)


def test_verdicts_on_the_finished_runs():
    """What README says of figures/records/*/masking.json: every collapsed run is flagged, few of the others are."""
    rows = [row for path in sorted(records_folder().glob("*/masking.json")) for row in json.loads(path.read_text())["rows"]]
    for row in rows:  # of the checks as they are now: their names, and what a failed one proves
        assert row["reasons"] == [name for name, c in row["checks"].items() if c["found"] > c["bound"] + 1e-9]
    collapsed, healthy = ([r for r in rows if r["collapsed"] is flag] for flag in (True, False))
    assert len(collapsed) == 6 and all(r["reasons"] == ["one step is blind", "the loss is not locally linear"] for r in collapsed)
    flagged = [r for r in healthy if r["verdict"] != "no sign"]
    assert len(healthy) == 37 and [(r["label"], r["reasons"]) for r in flagged] == [
        ("fgsm + elle", ["one step is blind"]), ("fgsm + der", ["one step is blind"])]
    assert {r["verdict"] for r in rows} == {"no sign", "suspicious"}

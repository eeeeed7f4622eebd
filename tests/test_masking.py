"""Gradient masking: masked models are flagged by the check made for it, ordinary ones are not."""

import json
import math

import pytest
import torch
from torch import nn

from derkit.attacks import fgsm
from derkit.diagnosis.masking import gradient_masking
from derkit.records import records_folder
from derkit.util import DerkitError

QUICK = dict(images=40, steps=(1, 5, 20), restarts=1, noise=10)
BLIND, CURVED = "one step is blind", "the loss is not locally linear"


def noisy(x):
    """The identity, with noise for its gradient."""
    rng = torch.Generator().manual_seed(int(x.sum() * 1e4))
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda grad: torch.randn(grad.shape, generator=rng).to(grad))
    return x


def masked(model, before=lambda x: x, after=lambda f: f):
    """A model's own predictions, behind functions that spoil its gradients."""
    outer = nn.Sequential(model).eval()
    outer.register_forward_pre_hook(lambda module, args: before(args[0]))
    outer.register_forward_hook(lambda module, args, f: after(f))
    return outer


def needle(x):
    """Two classes, no gradient. A random direction turns a grey image, one try in ten."""
    direction = torch.randn(36, generator=torch.Generator().manual_seed(3))
    t = (x.detach().flatten(1) - 0.5) @ direction / direction.norm()
    t = t - 0.037 + 0 * x.flatten(1).sum(1)  # noise of radius 0.05 has a deviation of 0.029
    return torch.stack([-t, t], 1) * 100


def names(report):
    return {c.name for c in report.reasons}


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.0)])
def test_ordinary_models_show_no_sign(norm, eps, trained, robust, mini):
    """A PGD-trained network, attacked with a standard one's examples, too."""
    report = gradient_masking(robust, mini.test, eps, norm=norm, source=trained, **QUICK)
    assert str(report) == "gradient masking: no sign (40 images, 11 checks)"
    table = report.by_eps
    assert table["loss"].is_monotonic_increasing and table["accuracy"].iloc[-1] == 0
    assert table["eps"].tolist()[:6] == pytest.approx([0, eps / 4, eps / 2, eps, 2 * eps, 4 * eps])


def test_a_standard_model_shows_no_sign_from_a_split_and_from_tensors(trained, mini):
    report = gradient_masking(trained, mini.test, 0.1, **QUICK)
    x, y = mini.test.floats(0, 40), mini.test.labels[:40]
    right = trained(fgsm(trained, x, y, 0.1)).argmax(1) == y
    assert report.by_steps["accuracy"][0] == pytest.approx(right.double().mean().item())
    assert report.verdict == "no sign" and report.reasons == ()
    assert gradient_masking(trained, (x, y), 0.1, **QUICK).checks == report.checks
    assert gradient_masking(trained.double(), mini.test, 0.1, **QUICK).verdict == "no sign"


@pytest.mark.parametrize("options, expected", [
    (dict(after=lambda f: f * 1e4),  # float32 has no gradient of its cross-entropy left
     {"the cross-entropy hides what the margin shows", "gradients vanish"}),
    (dict(before=lambda x: (x * 4).round() / 4), {"gradients vanish", "an unbounded attack fails"}),
    (dict(before=noisy), {"another model's examples find what gradients miss", CURVED}),
], ids=["saturated", "quantised", "shattered"])  # fmt: skip
def test_masked_models_are_flagged(options, expected, trained, mini):
    report = gradient_masking(masked(trained, **options), mini.test, 0.1, source=trained, **QUICK)
    assert report.verdict == "masked" and expected <= names(report), str(report)
    assert "\n  masked: " in str(report) and " against " in str(report)


def test_noise_sees_what_gradients_do_not():
    images = (torch.full((40, 1, 6, 6), 0.5), torch.zeros(40).long())
    model = masked(nn.Identity(), after=needle)
    report = gradient_masking(model, images, 0.05, **QUICK | dict(noise=50))
    assert report.verdict == "masked" and "noise finds what gradients miss" in names(report)


@pytest.mark.parametrize("honest, name, verdict", [
    (True, "one step beats many", "masked"), (False, BLIND, "suspicious")])
def test_gradients_honest_at_the_image_or_beside_it(honest, name, verdict, trained, mini):
    """Iterating loses what FGSM gained; or FGSM misses what iterating finds, as after CO."""
    x, y = mini.test.floats(0, 40), mini.test.labels[:40]

    def before(z):
        same = z.shape == x.shape and torch.equal(z, x)
        return z if same == honest else noisy(z)

    report = gradient_masking(masked(trained, before), (x, y), 0.1, **QUICK)
    assert report.verdict == verdict and name in names(report), str(report)


def test_the_model_is_left_as_it_was(trained, mini):
    trained.train()
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    state = torch.get_rng_state()
    gradient_masking(trained, mini.test, 0.1, **QUICK | dict(images=10))
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in trained.modules())
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert all(p.grad is None for p in trained.parameters())


@pytest.mark.parametrize("options, message", [
    (dict(eps=8), "8 / 255"), (dict(eps=0.0), "eps > 0"), (dict(eps=math.nan), "eps"),
    (dict(steps=(5, 20)), "rise from 1"), (dict(steps=(1,)), "rise from 1"),
    (dict(steps=(1, 20, 5)), "rise from 1"), (dict(norm="l1"), "norm"),
    (dict(restarts=0), "restarts"), (dict(images=0), "at least one image"),
    (dict(data=(torch.full((4, 1, 28, 28), 255.0), torch.zeros(4).long())), "normaliser"),
    (dict(data=(torch.zeros(0, 1, 28, 28), torch.zeros(0).long())), "at least one image"),
], ids=lambda p: "-".join(p) if isinstance(p, dict) else "")  # fmt: skip
def test_bad_input(options, message, trained, mini):
    with pytest.raises(DerkitError, match=message):
        gradient_masking(**(dict(model=trained, data=mini.test, eps=0.1) | options))


def test_verdicts_on_the_finished_runs():
    """What README says of the records: every collapsed run is flagged, few of the others are."""
    files = sorted(records_folder().glob("*/masking.json"))
    rows = [row for path in files for row in json.loads(path.read_text())["rows"]]
    assert [r["reasons"] for r in rows if r["collapsed"]] == [[BLIND, CURVED]] * 6
    healthy = [r["reasons"] for r in rows if not r["collapsed"]]
    assert len(healthy) == 37 and [r for r in healthy if r] == [[BLIND]] * 2

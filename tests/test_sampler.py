"""Targets, steps, guidance, stops, and what makes a chain independent of its batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from derkit import sampler
from derkit.energy import joint_energy, marginal_energy
from derkit.errors import DerkitError
from derkit.gen_config import STOP_NAMES, GenerateConfig
from derkit.jobs import prepare
from derkit.sampler import guided_energy, normalised, plain, sample
from derkit.stops import STOPS
from derkit.targets import energy_targets, reference_energies


@pytest.fixture(scope="module")
def some(mini):
    """40 training images of each class."""
    index = torch.cat([(mini.train.labels == c).nonzero().squeeze(1)[:40] for c in range(10)])
    return replace(mini, train=mini.train.take(index), sha256="some")


@pytest.fixture
def job(trained, some):
    """A prepared generation from the trained toy net: local PCA, quantile stop."""

    def make(**options):
        return prepare(trained, some, GenerateConfig.make(**({"n": 64, "k": 8, "steps": 12} | options)))

    return make


class Linear(nn.Module):
    """Logits A x: gradients known by hand. Counts its calls."""

    def __init__(self, d=4, classes=3):
        super().__init__()
        self.a = nn.Parameter(torch.randn(classes, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        self.norm = nn.BatchNorm2d(1).double()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.norm(x).flatten(1) @ self.a.T


def chain(model=None, x0=None, labels=None, target=None, **options):
    model = model or Linear().eval()
    x0 = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64) if x0 is None else x0
    labels = torch.tensor([0, 1, 2]) if labels is None else labels
    config = GenerateConfig.make(**({"stop": "fixed", "noise": 0.0, "steps": 3, "momentum": 0.0} | options))
    return model, sample(model, x0, labels, torch.arange(len(x0)), config, target=target, trace=True)


# -------------------------------------------------------------------------------------------------------- energies
def test_guided_energy_joins_the_two_energies():
    logits, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.allclose(guided_energy(logits, y, 0.0), marginal_energy(logits))
    assert torch.allclose(guided_energy(logits, y, 1.0), joint_energy(logits, y))
    middle = -0.5 * marginal_energy(logits) + 1.5 * joint_energy(logits, y)
    assert torch.allclose(guided_energy(logits, y, 1.5), middle)


def test_reference_holds_the_sorted_energies_of_correct_images(trained, some):
    reference = reference_energies(trained, some)
    with torch.no_grad():
        logits = trained(some.train.floats())
    right = logits.argmax(1) == some.train.labels
    assert reference.counts.sum() == right.sum() and reference.total.tolist() == [40] * 10
    for c in (0, 6):
        mine = right & (some.train.labels == c)
        expected = joint_energy(logits[mine].double(), some.train.labels[mine]).sort().values
        assert torch.allclose(reference.of(c), expected, atol=1e-4)
        u = torch.rand(50, dtype=torch.float64)
        found = reference.quantile(torch.full((50,), c), u)
        np.testing.assert_allclose(found.numpy(), np.quantile(expected.numpy(), u.numpy()), atol=1e-4)
        mean, std = reference.moments(torch.tensor([c]))
        assert mean.item() == pytest.approx(expected.mean().item(), abs=1e-4)
        assert std.item() == pytest.approx(expected.std().item(), rel=1e-3)


def test_targets_lie_between_their_quantiles_and_belong_to_the_sample(trained, some):
    reference = reference_energies(trained, some)
    index = torch.arange(500)
    labels = index % 10
    found = energy_targets(reference, index, labels, 0, 0.2, 0.4)
    low, high = (reference.quantile(labels, torch.full((500,), q)) for q in (0.2, 0.4))
    assert (low <= found).all() and (found <= high).all() and found[labels == 3].std() > 0
    assert torch.equal(found[7:9], energy_targets(reference, index[7:9], labels[7:9], 0, 0.2, 0.4))


def test_reference_is_cached_by_model_and_data(trained, some, home):
    first = reference_energies(trained, some)
    assert len(list((home / "cache").glob("energies-*.pt"))) == 1
    trained.forward = None  # no second pass
    assert torch.equal(reference_energies(trained, some).joint, first.joint)
    del trained.forward
    reference_energies(trained, some, "valid")
    assert len(list((home / "cache").glob("energies-*.pt"))) == 2


# ----------------------------------------------------------------------------------------------------------- steps
def test_step_rules():
    g = torch.randn(5, 1, 3, 3)
    assert torch.allclose(plain(g, 0.4), -0.2 * g)
    moved = normalised(g, 0.4)
    assert torch.allclose(moved.flatten(1).norm(dim=1), torch.full((5,), 0.4))
    assert torch.allclose(F.cosine_similarity(moved.flatten(1), -g.flatten(1)), torch.ones(5))
    assert torch.equal(normalised(torch.zeros(1, 1, 2, 2), 0.4), torch.zeros(1, 1, 2, 2))


def test_descent_by_hand_with_momentum_and_clipping():
    model, out = chain(rule="plain", eta=0.1, momentum=0.5, w=1.0, steps=4)
    x, v = torch.full((3, 4), 0.5, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(4):  # E(x, y) = -a_y x (BatchNorm at its initial statistics)
        v = 0.5 * v + 0.05 * model.a.detach() / (1 + 1e-5) ** 0.5
        x = (x + v).clamp(0, 1)
    assert torch.allclose(out.x.flatten(1), x) and (out.steps == 4).all()
    _, far = chain(rule="plain", eta=10.0)
    assert far.x.min() == 0 and far.x.max() == 1


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_the_gradient_is_that_of_the_guided_energy(w):
    model, out = chain(rule="plain", eta=1e-3, w=w, steps=1)
    x = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(guided_energy(model(x), torch.tensor([0, 1, 2]), w).sum(), x)[0]
    assert torch.allclose(out.x, (x - 5e-4 * grad).detach(), atol=1e-12)


def test_no_noise_on_the_last_step():
    _, one = chain(noise=0.1, steps=1)
    assert torch.equal(one.x, chain(noise=0.0, steps=1)[1].x)
    _, two = chain(noise=0.1, steps=2, rule="plain", eta=0.0)
    _, quiet = chain(noise=0.0, steps=2, rule="plain", eta=0.0)
    moved = two.x - quiet.x  # one noise, between the two steps
    assert 0.03 < moved.std() < 0.2


def test_a_stopped_chain_loses_the_noise_of_its_last_step():
    target = torch.full((3,), -1e9, dtype=torch.float64)
    _, running = chain(noise=0.05, steps=6, eta=0.1, stop="quantile", target=target)
    level = running.trace[2, 0]  # the energy at the noisy point before step 3
    _, stopped = chain(noise=0.05, steps=6, eta=0.1, stop="quantile", target=level)
    _, two = chain(noise=0.05, steps=2, eta=0.1)
    for i in (stopped.steps == 2).nonzero().flatten().tolist():
        assert torch.equal(stopped.x[i], two.x[i])
    assert (stopped.steps == 2).any()


def test_saved_noise_depends_on_index_and_step_only():
    x0 = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64)
    config = GenerateConfig.make(stop="fixed", noise=0.1, steps=3, eta=0.0)
    labels, model = torch.zeros(3, dtype=torch.int64), Linear().eval()
    together = sample(model, x0, labels, torch.tensor([4, 9, 2]), config)
    alone = sample(model, x0[:1], labels[:1], torch.tensor([9]), config)
    assert torch.allclose(together.x[1], alone.x[0]) and not torch.allclose(together.x[0], alone.x[0])


# ----------------------------------------------------------------------------------------------------------- stops
def test_every_stop_of_the_config_exists():
    assert set(STOPS) == set(STOP_NAMES)


def test_quantile_stop_is_latched_and_one_sided(job):
    out = job(noise=0.0).run(range(64), trace=True)
    reached = out.reached & (out.steps < 12)
    assert reached.any() and (out.end[0][reached] <= out.target[reached] + 1e-4).all()
    for i in reached.nonzero().flatten().tolist():
        trace, stop = out.trace[:, 0, i], int(out.steps[i])
        assert (trace[:stop] > out.target[i]).all() and trace[stop] <= out.target[i]
        assert trace[stop + 1 :].isnan().all()
        assert trace[stop].item() == pytest.approx(out.end[0, i].item(), abs=1e-4)
    untouched = out.steps == 0
    assert untouched.any() and torch.equal(out.x[untouched], out.x0[untouched])


def test_fixed_takes_every_step_and_mean_band_stops_inside_the_band(job):
    assert (job(stop="fixed", steps=5).run(range(20)).steps == 5).all()
    out = job(stop="mean_band", noise=0.0, eta=0.1, steps=30).run(range(64))
    early = out.steps < 30
    mean, std = job().reference.moments(out.labels)
    assert early.any() and ((out.end[0] - mean).abs()[early] < 0.5 * std[early] + 1e-4).all()


def test_min_steps_and_p_min(job):
    free, held = job().run(range(64)), job(min_steps=3).run(range(64))
    assert (free.steps == 0).any() and held.steps.min() == 3
    sure = job(p_min=0.9, noise=0.0, steps=40).run(range(64))
    early = sure.steps < 40
    assert early.any() and (sure.end[2][early] > 0.9 - 1e-4).all()


def test_zero_steps_return_the_starts(job):
    out = job(steps=0).run(range(8), trace=True, frames_every=1)
    assert torch.equal(out.x, out.x0) and out.trace.shape == (1, 3, 8) and torch.equal(out.start, out.end)
    assert out.frame_steps == [0] and len(out.frames) == 1


def test_steps_saved_are_forwards_saved():
    model, out = chain(steps=50, stop="quantile", target=torch.full((3,), 1e9, dtype=torch.float64))
    assert (out.steps == 0).all() and model.calls == 2  # the check of step 0, and the final readings


# -------------------------------------------------------------------------------------------- independent of batches
@pytest.mark.parametrize(
    "options", [{}, dict(noise=0.05, rule="plain", eta=2.0), dict(stop="mean_band"), dict(best_of=3)]
)
def test_batch_sizes_give_the_same_images(job, options):
    ready = job(**options)
    whole = ready.run(range(64))
    for size in (7, 64):
        parts = [ready.run(range(i, min(i + size, 64))) for i in range(0, 64, size)]
        assert (torch.cat([p.x for p in parts]) - whole.x).abs().max() < 1e-5
        assert torch.equal(torch.cat([p.steps for p in parts]), whole.steps)
    assert len(whole.steps.unique()) > 2  # they finish at different times


def test_filling_up_with_finished_chains_changes_nothing(job, monkeypatch):
    ready = job(noise=0.01)
    whole = ready.run(range(40))
    real = sampler._Batch.shrink
    monkeypatch.setattr(sampler._Batch, "shrink", lambda self, grad, multiple: real(self, grad, 5))  # as on a GPU
    again = ready.run(range(40))
    assert (again.x - whole.x).abs().max() < 1e-5 and torch.equal(again.steps, whole.steps)
    monkeypatch.setattr(sampler._Batch, "shrink", lambda self, grad, multiple: grad)  # never
    again = ready.run(range(40))
    assert (again.x - whole.x).abs().max() < 1e-5 and torch.equal(again.steps, whole.steps)


def test_mixed_classes_equal_single_classes(job):
    mixed, single = job().run(range(50)), job(classes="3").run(range(5))
    mine = (mixed.labels == 3).nonzero().flatten()
    assert (mixed.x0[mine][0] - single.x0[0]).abs().max() > 0  # another global number: another sample
    alone = job().run(mine)
    assert (alone.x - mixed.x[mine]).abs().max() < 1e-5


# -------------------------------------------------------------------------------------------------- what stays as is
def test_model_is_left_alone(trained, some):
    trained.train()
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    prepare(trained, some, k=8, steps=3, stop="fixed").run(range(8))
    assert trained.training and all(m.training for m in trained.modules())
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert all(p.grad is None for p in trained.parameters())


def test_float64_and_copies(trained, some):
    trained.double()
    out = prepare(trained, some, k=8, steps=3).run(range(4))
    assert out.x.dtype == torch.float64
    low = prepare(trained, some, k=8, steps=3, precision="fp32").run(range(4))
    assert low.x.dtype == torch.float32 and next(trained.parameters()).dtype == torch.float64
    assert (low.x - out.x).abs().max() < 1e-3 and low.end.dtype == torch.float64


def test_half_precision_logits_give_wide_energies():
    logits = torch.randn(4, 3).to(torch.bfloat16)
    y = torch.tensor([0, 1, 2, 0])
    found = sampler.readings(logits, y)
    assert found.dtype == torch.float64
    assert torch.allclose(found[1].float(), -torch.logsumexp(logits.float(), 1), atol=1e-5)


def test_frames_follow_the_chains(job):
    out = job(noise=0.0).run(range(10), frames_every=3)
    assert out.frame_steps == sorted(out.frame_steps) and len(out.frames) == len(out.frame_steps)
    assert torch.equal(out.frames[0], out.x0) and torch.equal(out.frames[-1], out.x)
    still = out.steps == 0
    assert torch.equal(out.frames[1][still], out.x0[still])


# ---------------------------------------------------------------------------------------------------------- errors
def test_class_without_a_correct_image(net, some):
    class Never(nn.Module):
        """Class 4 is never predicted."""

        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return self.body(x) - 1e3 * F.one_hot(torch.tensor(4), 10)

    with pytest.raises(DerkitError, match=r"stop=quantile needs real energies.* 40 train images of class 'coat'"):
        prepare(Never(), some, k=8, classes="coat")
    with pytest.raises(DerkitError, match="best_of=2 needs real energies"):
        prepare(Never(), some, k=8, classes="coat", stop="fixed", best_of=2)
    out = prepare(Never(), some, k=8, classes="coat", stop="fixed", steps=2).run(range(3))
    assert out.target.isnan().all() and torch.isfinite(out.x).all()


@pytest.mark.parametrize("stop", ["quantile", "mean_band"])
def test_a_stop_without_energies(stop):
    with pytest.raises(DerkitError, match=f"stop={stop} needs real energies"):
        chain(stop=stop)


def test_logits_that_are_not_finite(net, some):
    model = net()
    with torch.no_grad():
        model[1].head.bias[0] = torch.inf
    with pytest.raises(DerkitError, match="not all finite"):
        prepare(model, some, k=8)

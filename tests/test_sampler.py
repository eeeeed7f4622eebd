"""Targets, steps, guidance, stops, and what makes a chain independent of its batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from derkit.config import GenerateConfig
from derkit.energy import joint_energy, marginal_energy
from derkit.generation import sampler
from derkit.generation.generate import prepare
from derkit.generation.sampler import energy_targets, guided_energy, reference_energies, sample
from derkit.util import DerkitError


@pytest.fixture
def job(trained, some):
    """A prepared generation from the trained toy net: local PCA, quantile stop."""
    return lambda **options: prepare(trained, some, **(dict(n=64, k=8, steps=12) | options))


def chain(level=None, index=(0, 1, 2), **options):
    """Chains of three classes from grey images by logits A x. level: a target for each class."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False, dtype=torch.float64))
    model.calls, labels, reference = [], torch.arange(len(index)), None
    model.register_forward_hook(lambda *_: model.calls.append(1))
    options = dict(stop="fixed", noise=0.0, steps=3, momentum=0.0) | options
    if level is not None:
        options |= dict(stop="quantile")
        reference = sampler.Reference(torch.as_tensor(level, dtype=torch.float64), torch.arange(4))
    x0 = torch.full((len(index), 1, 2, 2), 0.5, dtype=torch.float64)
    chains = x0, labels, torch.tensor(index), GenerateConfig(**options), reference
    return model, sample(model, *chains, trace=True)


def test_reference_is_the_sorted_energies_of_correct_images(trained, some, home, monkeypatch):
    reference = reference_energies(trained, some)
    with torch.no_grad():
        logits = trained(some.train.floats()).double()
    right = logits.argmax(1) == some.train.labels
    for c in range(10):
        mine = right & (some.train.labels == c)
        expected = joint_energy(logits[mine], some.train.labels[mine]).sort().values
        assert torch.allclose(reference.of(c), expected, atol=1e-4)
    reference_energies(trained, some, "valid")
    assert len(list((home / "cache").glob("energies-*"))) == 2
    look = sampler.predict
    monkeypatch.setattr(sampler, "predict", lambda net, part: look(net, part.take(slice(16))))
    assert torch.equal(reference_energies(trained, some).joint, reference.joint)  # no second pass
    monkeypatch.setattr(sampler, "predict", look)
    trained.register_forward_hook(lambda net, images, logits: 2 * logits)  # the same weights
    assert torch.allclose(reference_energies(trained, some).joint, 2 * reference.joint)


def test_targets_are_quantiles_of_the_class_and_belong_to_the_sample(trained, some):
    reference, index = reference_energies(trained, some), torch.arange(500)

    def targets(low, high, rows=slice(None)):
        config = GenerateConfig(low=low, high=high)
        return energy_targets(reference, index[rows], index[rows] % 10, config)

    for q in (0.0, 0.37, 1.0):
        expected = [np.quantile(reference.of(c).numpy(), q) for c in range(10)]
        np.testing.assert_allclose(targets(q, q)[:10].numpy(), expected, atol=1e-9)
    found = targets(0.2, 0.4)
    assert (targets(0.2, 0.2) <= found).all() and (found <= targets(0.4, 0.4)).all()
    assert found[::10].std() > 0 and torch.equal(found[7:9], targets(0.2, 0.4, slice(7, 9)))


def test_normalised_steps():
    g = torch.randn(5, 1, 3, 3)
    config = GenerateConfig(eta=0.4)
    assert torch.allclose(sampler.drift(g, config).flatten(1), -0.4 * F.normalize(g.flatten(1)))
    assert not sampler.drift(torch.zeros(1, 1, 2, 2), config).any()


def test_descent_by_hand_with_momentum_and_clipping():
    model, out = chain(rule="plain", eta=0.1, momentum=0.5, steps=4)
    x, v = torch.full((3, 4), 0.5, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(4):  # E(x, y) = -a_y x
        v = 0.5 * v + 0.05 * model[1].weight.detach()
        x = (x + v).clamp(0, 1)
    assert torch.allclose(out.x.flatten(1), x) and (out.steps == 4).all()
    _, far = chain(rule="plain", eta=100.0)
    assert far.x.min() == 0 and far.x.max() == 1


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_the_gradient_is_that_of_the_guided_energy(w):
    """(1 - w) E(x) + w E(x, y)"""
    model, out = chain(rule="plain", eta=1e-3, w=w, steps=1)
    x, y = out.x0.clone().requires_grad_(True), torch.arange(3)
    energy = (1 - w) * marginal_energy(model(x)) + w * joint_energy(model(x), y)
    assert torch.allclose(guided_energy(model(x), y, w), energy)
    assert torch.allclose(out.x, x - 5e-4 * torch.autograd.grad(energy.sum(), x)[0], atol=1e-12)


def test_noise_comes_between_steps_and_belongs_to_index_and_step():
    still = dict(noise=0.1, rule="plain", eta=0.0)
    assert torch.equal(chain(**still, steps=1)[1].x, chain(**still, steps=1)[1].x0)  # none at last
    _, two = chain(**still, steps=2)
    assert 0.03 < (two.x - 0.5).std() < 0.2
    (_, together), (_, alone) = chain(**still, index=(4, 9, 2)), chain(**still, index=(9,))
    differ = (together.x - alone.x).abs().amax((1, 2, 3))
    assert differ[1] < 1e-12 and differ[0] > 0.01


def test_a_stopped_chain_loses_the_noise_of_its_last_step():
    noisy = dict(noise=0.05, eta=0.1)
    _, running = chain(level=[-99] * 3, steps=6, **noisy)
    _, stopped = chain(level=running.trace[2, 0], steps=6, **noisy)  # after the second noise
    _, two = chain(steps=2, **noisy)
    here = stopped.steps == 2
    assert here.any() and torch.allclose(stopped.x[here], two.x[here], atol=1e-12)


def test_quantile_stop_is_latched_and_one_sided(job):
    out = job(noise=0.0).run(range(64), trace=True)
    reached = out.reached & (out.steps < 12)
    assert reached.any() and (out.end[0][reached] <= out.target[reached] + 1e-4).all()
    for i in reached.nonzero().flatten().tolist():
        trace, stop = out.trace[:, 0, i], int(out.steps[i])
        assert (trace[:stop] > out.target[i]).all() and trace[stop] <= out.target[i]
        assert trace[stop + 1 :].isnan().all() and abs(trace[stop] - out.end[0, i]) < 1e-4
    untouched = out.steps == 0
    assert untouched.any() and torch.equal(out.x[untouched], out.x0[untouched])


def test_mean_band_stops_inside_the_band(job):
    ready = job(stop="mean_band", noise=0.0, eta=0.1, steps=30)
    out, classes = ready.run(range(64)), [ready.reference.of(c) for c in range(10)]
    mean, std = (torch.stack([f(e) for e in classes])[out.labels] for f in (torch.mean, torch.std))
    early = out.steps < 30
    assert early.any() and ((out.end[0] - mean).abs()[early] < 0.5 * std[early] + 1e-4).all()


def test_min_steps_and_p_min(job):
    assert (job().run(range(64)).steps == 0).any()
    assert job(min_steps=3).run(range(64)).steps.min() == 3
    sure = job(p_min=0.9, noise=0.0, steps=40).run(range(64))
    early = sure.steps < 40
    assert early.any() and (sure.end[2][early] > 0.9 - 1e-4).all()


def test_steps_saved_are_forwards_saved():
    model, out = chain(level=[99] * 3, steps=50)
    assert (out.steps == 0).all() and len(model.calls) == 2  # check, final readings


def assert_same_samples(a, b):
    """A convolution sums in another order in another batch (blocking by its shape), so energies
    differ by rounding: a chain at its target may stop a step apart, a pixel fall to either side."""
    levels = (sampler.quantise(a.x).int() - sampler.quantise(b.x).int()).abs().flatten(1).amax(1)
    same = (levels <= 1) & (a.steps == b.steps)
    assert same.double().mean() > 0.95, (levels, a.steps - b.steps)


@pytest.mark.parametrize("options", [
    {}, dict(noise=0.05, rule="plain", eta=2.0), dict(stop="mean_band"), dict(best_of=3)])
def test_a_sample_does_not_depend_on_its_batch(job, options):
    ready = job(**options)
    whole = ready.run(range(64))
    rows = [*range(40, 64), *range(3)]
    mine = replace(whole, x=whole.x[rows], steps=whole.steps[rows])
    assert_same_samples(ready.run(rows), mine)
    assert len(whole.steps.unique()) > 2  # they finish at different times


@pytest.mark.parametrize("multiple", [5, 10**6])
def test_filling_up_with_ended_chains_changes_nothing(job, monkeypatch, multiple):
    """In eighths as on a GPU, and without any compaction."""
    ready, real = job(noise=0.01), sampler._kept
    whole = ready.run(range(40))
    monkeypatch.setattr(sampler, "_kept", lambda moving, _: real(moving, multiple))
    assert_same_samples(ready.run(range(40)), whole)


def test_model_is_left_alone(trained, some):
    trained.train()
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    prepare(trained, some, k=8, steps=3, stop="fixed").run(range(8))
    assert all(m.training for m in trained.modules())
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert all(p.grad is None for p in trained.parameters())


def test_precision_changes_rounding_only(trained, some):
    out = prepare(trained.double(), some, k=8, steps=3, stop="fixed").run(range(4))
    low = prepare(trained, some, k=8, steps=3, stop="fixed", precision="fp32").run(range(4))
    assert out.x.dtype == torch.float64 and low.x.dtype == torch.float32
    assert (low.x - out.x).abs().max() < 1e-3 and low.end.dtype == torch.float64


def test_frames_follow_the_chains(job):
    out = job(noise=0.0).run(range(10), frames_every=3)
    assert out.frame_steps == sorted(out.frame_steps) and len(out.frames) == len(out.frame_steps)
    assert torch.equal(out.frames[0], out.x0) and torch.equal(out.frames[-1], out.x)
    still = job(steps=0).run(range(8), trace=True, frames_every=1)
    assert torch.equal(still.x, still.x0) and torch.equal(still.start, still.end)
    assert still.trace.shape == (1, 3, 8) and still.frame_steps == [0]


def test_energies_that_are_not_there_or_not_finite(net, some):
    model, coats = net(), dict(k=8, classes="coat")
    with torch.no_grad():
        model[1].head.bias[4] = -1e3  # never a coat
    with pytest.raises(DerkitError, match=r"stop=quantile needs real energies.* 'coat' right"):
        prepare(model, some, **coats)
    with pytest.raises(DerkitError, match="best_of=2 needs real energies"):
        prepare(model, some, **coats, stop="fixed", best_of=2)
    out = prepare(model, some, **coats, stop="fixed", steps=2).run(range(3))
    assert out.target.isnan().all() and torch.isfinite(out.x).all()
    with pytest.raises(DerkitError, match="stop=mean_band needs real energies: pass"):
        chain(stop="mean_band")
    with torch.no_grad():
        model[1].head.bias[0] = torch.inf
    with pytest.raises(DerkitError, match="not all finite"):
        prepare(model, some, k=8)

"""Methods and the regularisers beside DER: what reaches them, one step of everything, no sync.

Their formulas are compared in test_reference_step.py.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from derkit import attacks
from derkit.config import METHOD_NAMES, REGULARIZER_NAMES, VARIANT_NAMES
from derkit.training.loop import train_step
from derkit.training.objectives import Objective, make_regularizer

TIGHT = dict(rtol=0, atol=1e-12)
SINGLE = ("fgsm", "rs_fgsm", "n_fgsm", "zerograd")
CASES = [(m, r, v) for m in METHOD_NAMES for r in REGULARIZER_NAMES
         for v in (VARIANT_NAMES if r == "der" else ("segment",))
         if (m != "standard" or r == "none") and (r != "aaer" or m in SINGLE)]


def ce(f, y):
    return F.cross_entropy(f, y, reduction="none")


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_attack_of_each_method(name, trained, batch, config, seeded):
    """The config's eps, step size, noise, steps, norm and BatchNorm mode reach the attack."""
    model, x, y = trained.double(), batch[0].double(), batch[1]
    own = {"standard": {}, "fgsm": {}, "rs_fgsm": dict(alpha=0.05), "n_fgsm": dict(alpha=0.05, k=3),
           "zerograd": dict(alpha=0.05, q=0.6)}
    own = own.get(name, dict(alpha=0.05, norm="l2"))
    c = config(method=name, eps=0.07, steps=3, attack_bn="train", precision="fp64", **own)
    x_adv, start, found = Objective(c).attack(model, x, y, seeded())
    common = dict(bn_mode="train", generator=seeded())
    expected = x
    if name in SINGLE:
        attack = attacks.ATTACKS[name]
        expected, z, logits = attack(model, x, y, 0.07, return_start=True, **own, **common)
        assert torch.equal(found, logits) and torch.equal(start, z)
    elif name != "standard":
        loss = "ce" if name == "pgd" else "kl"
        expected = attacks.pgd(model, x, y, 0.07, steps=3, loss=loss, **own, **common)
    assert torch.equal(x_adv, expected)
    assert (start is None) == (found is None) == (name not in SINGLE)


def test_gradalign_with_zero_gradients_gives_no_nan(config, seeded):
    """Such samples count as aligned: value 0, and no part in the gradient."""
    model = nn.Sequential(nn.Flatten(), nn.Threshold(0.5, 0), nn.Linear(16, 3)).double()
    align = make_regularizer(config(method="fgsm", regularizer="gradalign", eps=0.05), model)
    x = torch.full((2, 1, 4, 4), 0.1, dtype=torch.float64)  # below the threshold
    for first in (0.1, 0.7):
        x[0] = first
        align.points(x, x, seeded())
        value = align({}, torch.tensor([0, 1]))
        gradient = torch.autograd.grad(value, model[2].weight)[0]
        assert gradient.isfinite().all()
        assert (value == 0) == (first == 0.1) == (gradient == 0).all()


# ------------------------------------------------------------------------- one step of everything
class NoSync(TorchDispatchMode):
    """Raises on every operation that would make the host wait for the device."""

    forbidden = {"local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "bincount"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name.lstrip("_") not in self.forbidden, f"host sync: {name}"
        if name.startswith("index") and isinstance(args[1], list | tuple):
            mask = any(i is not None and i.dtype == torch.bool for i in args[1])
            assert not mask, "host sync: indexing with a mask"
        return func(*args, **(kwargs or {}))


def test_no_sync_guard_works():
    x = torch.ones(2)
    for sync in (lambda: x[0].item(), lambda: bool(x.sum() > 1), lambda: x[x > 0], x.nonzero):
        with pytest.raises(AssertionError, match="host sync"), NoSync():
            sync()


@pytest.mark.parametrize("method, regularizer, variant", CASES, ids=map("-".join, CASES))
def test_a_finite_step_without_host_sync(method, regularizer, variant, net, config, seeded):
    """Loss and gradients are finite, the regulariser is in the loss, the host never waits."""
    x = torch.rand(4, 1, 8, 8, generator=seeded(9), dtype=torch.float64)
    y, model = torch.tensor([1, 2, 3, 4]), net(torch.float64, width=2, size=8).train()
    c = config(method=method, regularizer=regularizer, variant=variant)
    objective, extra = Objective(c), make_regularizer(c, model)
    with NoSync():
        total, statistics = train_step(model, x, y, objective, extra, 2.0, seeded())
        total.backward()
    assert total.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    assert not any(value.requires_grad for value in statistics.values())
    expected = statistics["loss"] + 2.0 * statistics["penalty"]
    torch.testing.assert_close(total.detach(), expected, **TIGHT)
    if variant != "norm" and regularizer != "aaer":  # act on abnormal examples, if there are any
        assert (statistics["penalty"] > 0) == (regularizer != "none")


@pytest.mark.parametrize("method, regularizer, points", [
    ("fgsm", "der", 3), ("trades", "der", 3), ("trades", "none", 2), ("pgd", "none", 1)])
def test_statistics_of_a_step(method, regularizer, points, trained, batch, config, seeded):
    """Of x* against its start, x here; PGD's is not known. All points share one forward."""
    model, x, y, seen = trained.double(), batch[0].double(), batch[1], []
    c = config(method=method, regularizer=regularizer, variant="segment", attack_bn="eval")
    f, start = model(Objective(c).attack(model, x, y, seeded())[0]).detach(), model(x)
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    _, found = train_step(model, x, y, Objective(c), make_regularizer(c, model), 1.0, seeded())
    assert seen[-1] == 16 * points and found["acc"] == (f.argmax(1) == y).double().mean()
    torch.testing.assert_close(found["E_adv"], -f.exp().sum(1).log().mean(), **TIGHT)
    aae = (ce(f, y) < ce(start, y)).double().mean()
    assert found["aae"].isnan() if method == "pgd" else found["aae"] == aae

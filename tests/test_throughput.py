"""The benchmark compares like with like: its plain loop and derkit's step compute the same update. No time is asserted."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from derkit.config import TrainConfig
from derkit.costs import operations_per_image
from derkit.losses import Step
from derkit.models import build_model
from derkit.training import train_step

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "throughput.py"
SPEC = importlib.util.spec_from_file_location("throughput", PATH)


@pytest.fixture(scope="module")
def bench():
    import sys

    module = importlib.util.module_from_spec(SPEC)
    sys.modules["throughput"] = module  # dataclasses look their module up
    SPEC.loader.exec_module(module)
    yield module
    del sys.modules["throughput"]


@pytest.mark.parametrize("name", ["FGSM", "RS-FGSM", "RS-FGSM + DER", "PGD-10"])
def test_same_weights_after_a_step(bench, name, seeded):
    """In float64 from one start. DER without BatchNorm: derkit sends its points through the net together, the plain loop
    one by one, which are different batch statistics."""
    der = "DER" in name
    torch.manual_seed(0)
    model = build_model("small_cnn", 3, 10, 32, width=4, bn=not der).double().train()
    x, y = torch.rand(8, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (8,))
    config = TrainConfig.make("cifar10", model="small_cnn", eps=0.1, precision="fp64", warmup=0.0, **bench.METHODS[name])
    config = config.change(steps=3)
    pair = {"plain": model, "derkit": copy.deepcopy(model)}
    for kind, net in pair.items():
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        if kind == "plain":
            loss = bench.plain_loss(net, x, y, config, seeded(1))
        else:
            loss, _ = train_step(Step(net, x, y, config, seeded(1), 1.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    start = dict(build_same(model).named_parameters())
    for (key, a), b in zip(pair["plain"].named_parameters(), pair["derkit"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
        assert key.endswith("bias") or not torch.equal(a, start[key]), "a step was taken"


def build_same(model):
    """The net as it was before the step."""
    torch.manual_seed(0)
    options = {k: v for k, v in model.spec.items() if k in ("width", "bn")}
    return build_model("small_cnn", 3, 10, 32, **options).double()


def test_quick_run_writes_a_record(bench, tmp_path, capsys):
    out = tmp_path / "record.json"
    assert bench.main(["--quick", "--device", "cpu", "--model", "small_cnn", "--method", "RS-FGSM + DER", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [r["row"] for r in record["results"]] == [r.name for r in bench.rows([])]
    assert record["results"][0]["ratio"] == 1 and all(r["images_per_s"] > 0 for r in record["results"])
    assert all(r["share_of_peak"] > 0 for r in record["results"]) and record["env"]["device"] == "cpu"
    assert "plain loop" in capsys.readouterr().out


def test_a_row_that_fails_is_reported_and_the_others_go_on(bench):
    def broken(steps):
        raise RuntimeError("out of memory\nand more")

    rates = bench.measure({"good": lambda steps: None, "bad": broken}, images=8, steps=2, repetitions=3)
    assert rates["bad"] == "RuntimeError: out of memory" and rates["good"] > 0


def test_operations_count_the_attack():
    """In units of a forward: 2 for a step of the attack (to the image only), 3 for training on a point, but for the first layer."""
    x, y = torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)

    def count(**values):
        return operations_per_image(lambda: build_model("small_cnn", 3, 10, 32, width=4), x, y, TrainConfig.make("cifar10", **values))

    fgsm, one, ten = count(method="fgsm"), count(method="pgd", steps=1), count(method="pgd", steps=10)
    assert one == fgsm and ten / one == pytest.approx(23 / 5, rel=0.05)
    assert count(method="fgsm", regularizer="der") / fgsm == pytest.approx(11 / 5, rel=0.05)


def test_bf16_on_the_cpu_trains(config, tiny):
    """precision=bf16 set explicitly is used on a CPU as well: autocast, weights in float32."""
    from derkit.training import train

    run = train(config(epochs=2, precision="bf16"), tiny, verbose=False)
    plain = train(config(epochs=2, precision="fp32"), tiny, verbose=False)
    assert run.env["precision"] == "bf16" and run.env["precision_reason"] == "set in the config"
    a, b = (torch.load(r.folder / "final.pt", weights_only=True)["state"] for r in (run, plain))
    assert all(v.dtype == torch.float32 for k, v in a.items() if v.is_floating_point())
    assert run.epochs["train_loss"].iloc[-1] == pytest.approx(plain.epochs["train_loss"].iloc[-1], rel=0.1)
    assert any(not torch.equal(a[k], b[k]) for k in a), "bf16 was really used"

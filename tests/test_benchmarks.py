"""The benchmark compares like with like, operations are counted, and the small scripts run.

No time is asserted.
"""

import copy
import json

import pytest
import torch

from benchmarks import sampling
from benchmarks import throughput as bench
from benchmarks.operations import operations_per_image
from derkit.config import TrainConfig
from derkit.models import build_model
from derkit.training.loop import train_step
from derkit.training.objectives import Objective, make_regularizer
from experiments import suites
from scripts import measure_cost


@pytest.mark.parametrize("name", bench.METHODS)
def test_same_gradients_as_the_plain_loop(name, seeded):
    """In float64 from one start. DER without BatchNorm: derkit sends its points through the net
    together, the plain loop one by one, which are different batch statistics."""
    model = build_model("small_cnn", 3, 10, 32, width=4, bn="DER" not in name).double().train()
    x, y = torch.rand(8, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (8,))
    config = TrainConfig.make("cifar10", eps=0.1, **(bench.METHODS[name] | dict(steps=3)))
    twin = copy.deepcopy(model)
    bench.plain_loss(model, x, y, config, seeded(1)).backward()
    train_step(twin, x, y, Objective(config), make_regularizer(config, twin), config.strength,
               seeded(1))[0].backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


def test_quick_run_writes_a_record(tmp_path, capsys):
    out, words = tmp_path / "record.json", ["--quick", "--device", "cpu", "--model", "small_cnn"]
    assert bench.main([*words, "--method", "RS-FGSM + DER", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [row["row"] for row in record["results"]] == [row.name for row in bench.rows([])]
    assert record["results"][0]["ratio"] == 1 and record["env"]["cpu"] in capsys.readouterr().out
    assert all(row["images_per_s"] > 0 < row["share_of_peak"] for row in record["results"])


def test_the_sampler_takes_the_steps_of_a_plain_loop(tmp_path):
    sampling.main(["--n", "10", "--rounds", "1", "--out", str(tmp_path / "record.json")])
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert [row["images"] for row in rows] == [10, 40] and rows[0]["longest"] > 1
    assert all(row["same_steps"] >= 0.9 for row in rows), "rounding may move a stop by a step"


def test_operations_count_the_attack():
    """In units of a forward: 2 for a step of the attack (to the image only), 3 for training on a
    point, but for the first layer."""
    x, y = torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)

    def count(**values):
        config = TrainConfig.make("cifar10", **values)
        return operations_per_image(lambda: build_model("small_cnn", 3, 10, 32), x, y, config)

    fgsm, one, ten = (count(method="fgsm"), *(count(method="pgd", steps=n) for n in (1, 10)))
    assert one == fgsm and ten / one == pytest.approx(23 / 5, rel=0.05)
    der = count(method="fgsm", regularizer="der", variant="segment")
    assert der / fgsm == pytest.approx(11 / 5, rel=0.05)


@pytest.fixture
def toy(tmp_path, monkeypatch, config):
    """A suite of one FGSM run, its records folder inside tmp_path."""
    experiment = suites.Experiment("fgsm", config(method="fgsm", strong_size=8), seeds=(0,))
    monkeypatch.setitem(suites.SUITES, "toy", suites.Suite("", (experiment,)))
    for module in (suites, measure_cost):
        monkeypatch.setattr(module, "records_folder", lambda: tmp_path)
    return tmp_path / "toy"


def test_measure_cost(toy, monkeypatch):
    monkeypatch.setattr(measure_cost, "ROUNDS", 1)
    measure_cost.main("toy")
    assert json.loads((toy / "cost.json").read_text())["ratio"] == {"fgsm": 1.0}

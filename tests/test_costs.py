"""What a suite costs: counted operations, hours on several devices, and runs that each get a GPU."""

import json

import pytest
import torch

from derkit import costs, suite
from derkit import manifest as manifests
from derkit.config import TrainConfig
from derkit.errors import DerkitError
from derkit.manifest import read_manifest
from derkit.models import build_model
from derkit.results import records_folder

CIFAR = records_folder().parent / "suites" / "cifar10.json"


def forward_operations(size=28):
    """Operations of a forward of small_cnn, two for every weight of every output of its convolutions and its head."""
    total, model = 0, build_model("small_cnn", 1, 10, size, width=4)

    def count(module, inputs, out):
        nonlocal total
        total += 2 * module.weight[0].numel() * out[0].numel()

    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d | torch.nn.Linear):
            m.register_forward_hook(count)
    model(torch.rand(1, 1, size, size))
    return total


def config(**values):
    return TrainConfig.make("fashion_mini", **(dict(width=4, train_size=0) | values))


def test_operations_of_an_epoch():
    """Standard training is a forward and twice that backward (but for the first layer's input), for every image."""
    forward = forward_operations()
    found = costs.epoch_operations(config(method="standard"))
    assert 2.5 * forward < found / 4000 <= 3 * forward
    assert costs.epoch_operations(config(method="standard", train_size=1000)) == pytest.approx(found / 4)
    assert costs.epoch_operations(config(method="fgsm")) / found == pytest.approx(5 / 3, rel=0.1)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    costs.epoch_operations(config(method="n_fgsm", eps="8/255"))
    assert torch.equal(torch.rand(1), expected), "nothing is drawn from the global generator"


@pytest.mark.parametrize("dataset, values, images", [
    ("fashion_mini", {}, 4000), ("fashion_mini", dict(train_size=9999), 4000), ("cifar10", dict(valid_size=1000), 49000),
    ("fashion_mnist", dict(train_size=20000), 20000),
])
def test_training_images(dataset, values, images, mini):
    assert costs.training_images(config(dataset=dataset, **values)) == images
    assert costs.training_images(config()) == len(mini.train), "of the data as it is loaded"


def test_other_data_needs_calibration():
    with pytest.raises(DerkitError, match="found 'imagefolder:x'. Use --calibrate"):
        costs.training_images(config(dataset="imagefolder:x"))


@pytest.mark.parametrize("hours, devices, expected", [
    ([1, 1, 1, 1], 2, 2), ([1, 1, 1], 2, 2), ([3, 1, 1, 1], 2, 3), ([1, 1, 1, 3], 2, 4), ([2], 8, 2), ([1, 2, 3], 1, 6),
])
def test_makespan(hours, devices, expected):
    assert costs.makespan(hours, devices) == expected


def test_plan_counts_operations_and_hours(tmp_path):
    """One run of two epochs at one tenth of its operations a second: 20 seconds; what was measured goes first."""
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(dict(name="toy", preset="fashion_mini", seeds=[0, 1], set=dict(epochs=2, width=4),
                                    runs=[dict(group="A", label="fgsm", set=dict(method="fgsm")),
                                          dict(group="B", label="standard", set=dict(method="standard"))])))
    jobs = read_manifest(path)
    rate = costs.epoch_operations(jobs[0].config) * 2 / 3600
    text = "\n".join(costs.plan(jobs, {}, rate, 2))
    assert text.count("fgsm, none, eps 0.2000, 2 epochs, 0.0 P operations, 1.00 h") == 2
    assert "group A: 2 runs, 0 P operations, 2.00 h one at a time, 1.00 h on 2 devices" in text and "all: 4 runs" in text
    measured = costs.plan(jobs, {costs.cost_key(jobs[0].config): 3600})
    assert "group A: 2 runs, 4.00 h one at a time, final evaluation not counted" in measured
    assert "group B: 2 runs, cost unknown (--calibrate measures it, --rate counts it)" in measured
    assert any(line.startswith("all: 4 runs, cost unknown") for line in measured)


def test_dry_run_of_the_paper_scale_suite(capsys):
    """No data, no GPU and no calibration are needed; one seed of A: nine runs of 30 epochs of FGSM-like cost."""
    words = [str(CIFAR), "--dry-run", "--group", "A", "--seeds", "0"]
    assert suite.main([*words, "--rate", "100", "--gpus", "8"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    # PreActResNet-18: 0.56 G multiply-adds a forward, 5 forwards a step
    operations = 9 * 30 * 49000 * 5 * 2 * 0.556e9 / 1e15
    assert last.startswith("group A: 9 runs, ") and float(last.split(", ")[1].split()[0]) == pytest.approx(operations, rel=0.03)
    assert "2 runs" not in last and " on 8 devices" in last
    assert suite.main(words) == 0 and "cost unknown" in capsys.readouterr().out
    assert suite.main([*words, "--rate", "-1"]) == 2 and "must not be negative" in capsys.readouterr().err


def test_the_table_of_the_readme_is_the_plan():
    """Group, runs, operations, and hours on this CPU, one GPU and eight."""
    readme = (records_folder().parents[1] / "README.md").read_text()
    table = readme[readme.index("| group | runs | operations, 10^15 |"):].split("\n\n")[0].splitlines()
    record = json.loads((records_folder().parents[1] / "benchmarks" / "throughput-cpu.json").read_text())
    shares = [r["share_of_peak"] for r in record["results"] if r["model"] == "preact_resnet18" and "bf16" in r["row"]]
    assert "(0.38, measured)" in table[0]
    assert min(shares) * record["matmul_operations_per_s"]["bf16"] / 1e12 == pytest.approx(0.38, abs=0.005), "the slowest method's"
    rows = {cells[1]: cells[2:7] for line in table[2:] if (cells := [c.strip().removesuffix(" h") for c in line.split("|")])}
    lines = [line.split(", ") for line in costs.plan(read_manifest(CIFAR), {}, 100e12, 8) if line.startswith(("group ", "all: "))]
    plan = {parts[0].split(":")[0].removeprefix("group "): parts for parts in lines}
    assert set(rows) == set(plan) == {"A", "B1", "B2", "C", "all"}
    for group, (runs, operations, slow, one, eight) in rows.items():
        found = [f"{runs} runs", f"{operations} P operations", f"{one} h one at a time", f"{eight} h on 8 devices"]
        assert found == [plan[group][0].split(": ")[1], *plan[group][1:4]], group
        assert float(slow) == pytest.approx(float(operations) * 1e15 / 0.38e12 / 3600, rel=0.003), group


# ------------------------------------------------------------------------------------------------------------- GPUs
def test_gpus_are_those_that_the_process_sees(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert suite.gpus_to_use(0) == [] and suite.gpus_to_use(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-1f,2")
    assert suite.gpus_to_use(3) == ["5", "GPU-1f", "2"]
    assert suite.main([str(CIFAR), "--gpus", "4"]) == 2
    assert "--gpus 4: found 3 GPUs" in capsys.readouterr().err


def test_each_run_gets_a_gpu_of_its_own(tmp_path, monkeypatch, capsys):
    """Five runs, four at a time, on two GPUs: never a third on one while the other has one."""
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(dict(name="toy", preset="fashion_mini", seeds=list(range(5)),
                                    runs=[dict(label="fgsm", set=dict(method="fgsm"))])))
    busy, seen = {"0": 0, "1": 0}, []

    class Process:
        returncode = 1

        def __init__(self, command, env, **options):
            assert env["OMP_NUM_THREADS"] == "3"
            self.gpu, self.polls = env["CUDA_VISIBLE_DEVICES"], 0
            busy[self.gpu] += 1
            seen.append(dict(busy))

        def poll(self):
            self.polls += 1
            if self.polls < 2:
                return None
            busy[self.gpu] -= 1
            return 1

    monkeypatch.setattr(suite.subprocess, "Popen", Process)
    monkeypatch.setattr(suite.time, "sleep", lambda s: None)
    monkeypatch.setattr(manifests, "records_folder", lambda: tmp_path / "records")
    assert suite.run(read_manifest(path), parallel=4, threads=3, gpus=["0", "1"]) == 5, "none of them trained"
    assert len(seen) == 5 and seen[3] == {"0": 2, "1": 2} and all(abs(s["0"] - s["1"]) <= 1 for s in seen)
    assert capsys.readouterr().out.count("on GPU 1") >= 2

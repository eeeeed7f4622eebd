"""The small scripts behind records that README quotes, at toy size."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from derkit import manifest as manifests
from derkit import suite
from derkit.masking import VERDICTS

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shared_images(tmp_path, monkeypatch, capsys):
    """A data set shares its test images with itself, and none of them with its own training images."""
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["shared_images", "fashion_mini", "fashion_mini", "--size", "30", "--out", str(out)])
    assert load("shared_images").main() == 0
    record = json.loads(out.read_text())
    assert record["shared_with"] == dict(train=0, valid=0, test=30) and record["share"] == 1 and record["test_images"] == 30
    assert "'share': 1.0" in capsys.readouterr().out


def test_masking_trials(tmp_path, monkeypatch, capsys):
    """Verdicts beside what the records of finished runs say; without runs, the command that makes them."""
    toy = dict(train_size=100, epochs=1, width=4, eval_size=8, eval_steps=1, probe_size=8, final_size=20, final_steps=1, strong_size=20,
               device="cpu", method="fgsm")
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(dict(name="toy", preset="fashion_mini", set=toy, seeds=[0], runs=[dict(label="fgsm")])))
    script = load("masking_trials")
    for module in (manifests, script):
        monkeypatch.setattr(module, "records_folder", lambda: tmp_path / "records")
    monkeypatch.setattr(sys, "argv", ["masking_trials", str(path), "--images", "10"])
    with pytest.raises(SystemExit, match="python -m derkit.suite .*toy.json first"):
        script.main()
    assert suite.run(suite.read_manifest(path), threads=1) == 0
    assert script.main() == 0
    record = json.loads((tmp_path / "records" / "toy" / "masking.json").read_text())
    (row,) = record["rows"]
    assert row["label"] == "fgsm" and row["collapsed"] is False and row["verdict"] in VERDICTS and record["images"] == 10
    assert row["reasons"] == [name for name, c in row["checks"].items() if c["found"] > c["bound"]] and len(row["checks"]) == 10
    assert 0 <= row["strong"] <= row["fgsm"] <= 1 and "'verdict'" in capsys.readouterr().out

"""workflow/: the grid that is shipped, a toy grid run by Snakemake, and the table over runs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from derkit import results
from derkit.config import TrainConfig
from derkit.errors import DerkitError
from derkit.records import write_json

ROOT = Path(__file__).resolve().parents[1]
TOY = dict(epochs=1, width=4, train_size=40, batch_size=20, eval_size=16, probe_size=8, final_size=16, eval_steps=1, final_steps=1,
           strong_size=0, device="cpu", probe_every=2)


@pytest.fixture
def snakemake(tmp_path):
    if not importlib.util.find_spec("snakemake"):
        pytest.skip("snakemake is not installed: pip install derkit[grid]")
    yaml = pytest.importorskip("yaml")

    def call(*words, **settings):
        shipped = yaml.safe_load((ROOT / "workflow" / "grid.yaml").read_text())
        path = tmp_path / "grid.yaml"
        toy = dict(folder=str(tmp_path / "out"), python=sys.executable, set=TOY, seeds=[0], eps=["8/255"], minutes=1, **settings)
        path.write_text(yaml.safe_dump(shipped | toy, sort_keys=False))
        command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow" / "Snakefile"), "--configfile", str(path), "--cores", "1"]
        environment = os.environ | dict(OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(tmp_path / "cache"))
        return subprocess.run([*command, *words], capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment)

    return call


def test_dry_run_of_the_shipped_grid(snakemake):
    """2 methods alone, 2 with a regulariser and 2 weights each: 6 runs a seed and eps, and the table."""
    done = snakemake("--dry-run")
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    assert re.search(r"train +6\b", text) and re.search(r"table +1\b", text), text


def test_a_grid_of_two_runs(snakemake, tmp_path):
    """Two runs, their table, and nothing left to do afterwards."""
    methods = {"fgsm": dict(method="fgsm"), "der": dict(method="rs_fgsm", regularizer="der")}
    assert snakemake(methods=methods, **{"lambda": [4]}).returncode == 0
    out = tmp_path / "out"
    table = pd.read_csv(out / "table.csv", index_col="run")
    assert list(table.index) == ["fgsm-eps8_255", "der-eps8_255-lambda4"] and list(table["runs"]) == [1, 1]
    config = json.loads((out / "der-eps8_255-lambda4-s0" / "config.json").read_text())["train"]
    assert config["weight"] == 4 and config["regularizer"] == "der" and config["eps"] == pytest.approx(8 / 255)
    final = json.loads((out / "fgsm-eps8_255-s0" / "final.json").read_text())
    assert table.loc["fgsm-eps8_255", "pgd"] == pytest.approx(final["last"]["pgd"])
    again = snakemake("--dry-run", methods=methods, **{"lambda": [4]})
    assert again.returncode == 0 and "Nothing to be done" in again.stdout + again.stderr


def test_the_shipped_grid_names_real_fields():
    """Every run of workflow/grid.yaml is a valid config."""
    yaml = pytest.importorskip("yaml")
    grid = yaml.safe_load((ROOT / "workflow" / "grid.yaml").read_text())
    for fields in grid["methods"].values():
        for eps in grid["eps"]:
            for weight in grid["lambda"]:
                TrainConfig.make(grid["preset"], **(grid["set"] | fields | dict(eps=eps, weight=weight, seed=grid["seeds"][0])))


# ---------------------------------------------------------------------------------------------------------- the table
def finished(folder, clean, **more):
    write_json(folder / "config.json", dict(train={}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(dict(epoch=e, valid_pgd=0.5, valid_fgsm=0.5)) + "\n" for e in (1, 2)))
    last = dict(clean=clean, fgsm=0.5, pgd=0.25, dE=0.0, aae=0.0) | more
    write_json(folder / "final.json", dict(last=last, best=last | dict(clean=1.0)))


def test_table_of_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "co_onset", lambda run: None)
    for name, clean in (("a-s0", 0.5), ("a-s1", 0.75), ("b-s10", 0.25)):
        finished(tmp_path / name, clean)
    write_json(tmp_path / "c-s0" / "config.json", dict(train={}))  # not finished
    assert results.main([str(tmp_path), "--csv", str(tmp_path / "t.csv")]) == 0
    table = pd.read_csv(tmp_path / "t.csv", index_col="run")
    assert list(table.index) == ["a", "b"] and list(table["runs"]) == [2, 1] and capsys.readouterr().out == ""
    assert list(table.loc["a", ["clean", "clean min", "clean max"]]) == [0.625, 0.5, 0.75]
    assert results.main([str(tmp_path), "--runs", "b-s10", "--which", "best"]) == 0
    out = capsys.readouterr().out
    assert "1.0" in out and out.count("\n") == 2
    with pytest.raises(DerkitError, match="no finished run 'c-s0'"):
        results.grid(tmp_path, ["c-s0"])
    assert results.main([str(tmp_path / "a-s0")]) == 2 and "no finished runs" in capsys.readouterr().err

"""Suites, committed records and result tables."""

import json
import subprocess
import sys

import pytest

from derkit import manifest as manifests
from derkit import results, suite
from derkit.errors import DerkitError

MANIFEST = dict(name="toy", preset="fashion_mini",
                set=dict(width=4, train_size=64, valid_size=32, epochs=1, eval_size=16, probe_size=16, final_size=16, strong_size=8,
                         precision="fp32", eval_steps=2, final_steps=2),
                seeds=[0, 1], runs=[dict(label="RS-FGSM", set={}), dict(label="RS + DER", set=dict(regularizer="der"), seeds=[0])])


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(MANIFEST))
    return path


def test_manifest_jobs(manifest):
    jobs = suite.read_manifest(manifest)
    assert [j.slug for j in jobs] == ["rs_fgsm-s0", "rs_der-s0", "rs_fgsm-s1"]  # one seed of everything first
    assert jobs[1].config.regularizer == "der" and jobs[0].config.width == 4


def test_bad_manifests(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text("{")
    with pytest.raises(DerkitError, match="not a suite manifest"):
        suite.read_manifest(path)
    path.write_text(json.dumps(MANIFEST | dict(runs=[dict(label="a"), dict(label="A")])))
    with pytest.raises(DerkitError, match="same label"):
        suite.read_manifest(path)
    path.write_text(json.dumps(MANIFEST | dict(set=dict(epocs=3))))
    with pytest.raises(DerkitError, match="'epochs'"):
        suite.read_manifest(path)


def test_suite_runs_collects_and_skips(manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(manifests, "records_folder", lambda: tmp_path / "records")
    jobs = suite.read_manifest(manifest)
    assert suite.run(jobs, parallel=2, threads=1) == 0
    groups = results.load_records("toy", tmp_path / "records")
    assert list(groups) == ["RS-FGSM", "RS + DER"] and len(groups["RS-FGSM"]) == 2
    table = results.summary(groups)
    assert table.loc["RS-FGSM", "runs"] == 2
    low, mean, high = (table.loc["RS-FGSM", k] for k in ("clean min", "clean", "clean max"))
    assert low <= mean <= high
    assert not list((tmp_path / "records").rglob("*.pt")), "records hold no weights"
    before = (jobs[0].folder / "final.json").stat().st_mtime_ns
    assert suite.run(jobs[:1]) == 0
    assert (jobs[0].folder / "final.json").stat().st_mtime_ns == before
    assert "not trained again" in (jobs[0].folder / "train.log").read_text()


def test_a_failed_job_is_counted(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "records_folder", lambda: tmp_path / "records")
    jobs = suite.read_manifest(manifest, dict(dataset="imagefolder:/nowhere"))
    assert suite.run(jobs[:1]) == 1
    assert "does not exist" in (jobs[0].folder / "train.log").read_text()


def test_divergence_is_a_record(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "records_folder", lambda: tmp_path / "records")
    (job, *_) = suite.read_manifest(manifest, dict(lr=1e30, schedule="constant", epochs=2))
    assert suite.run([job]) == 1
    assert manifests.diverged(job, job.records) and "not finite" in json.loads((job.records / "diverged.json").read_text())["error"]
    (other, *_) = suite.read_manifest(manifest, dict(lr=1e29, schedule="constant", epochs=2))
    assert not manifests.diverged(other, job.records), "of other settings"


def test_dry_run_and_unknown_label(manifest):
    command = [sys.executable, "-m", "derkit.suite", str(manifest)]
    listing = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    assert listing.returncode == 0 and "rs_der-s0" in listing.stdout
    wrong = subprocess.run([*command, "--only", "nope"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "labels: RS-FGSM, RS + DER" in wrong.stderr


def test_unknown_records_name_the_nearest(tmp_path):
    (tmp_path / "co_fashion_mini").mkdir()
    with pytest.raises(DerkitError, match="co_fashion_mini"):
        results.load_records("co_fashion", tmp_path)

"""Committed records are whole, and say what they are records of."""

import pytest

from derkit.manifest import load_manifest
from derkit.records import load_runs
from derkit.results import load_records, records_folder

SUITES = {p.stem: load_manifest(p) for p in sorted((records_folder().parent / "suites").glob("*.json"))}
RUN = sorted(name for name in SUITES if (records_folder() / name).is_dir())
WHOLE = [name for name in RUN if name.endswith("_fashion_mini")]  # what the README's tables are made of


def test_the_bundled_suites_have_records():
    assert {"co_fashion_mini", "ro_fashion_mini", "variants_fashion_mini"} <= set(WHOLE)


def test_every_folder_of_records_has_its_manifest():
    assert {p.name for p in records_folder().iterdir() if p.is_dir()} <= set(SUITES)
    assert all(manifest.name == stem for stem, manifest in SUITES.items())


@pytest.mark.parametrize("name", RUN)
def test_records_match_their_manifest(name):
    """Every record is of a run of the manifest: its config, data hash, versions and hardware are there."""
    jobs = {j.slug: j for j in SUITES[name].jobs}
    for run in load_runs(records_folder() / name):
        job = jobs[run.name]
        assert run.finished and job.is_of(run)
        assert len(run.epochs) == run.final["last_epoch"] <= job.config.epochs
        assert len(run.config["data_sha256"]) == 64 and run.config["source"]
        assert run.env["torch"] and run.env["device"] and run.env["precision"] == run.config["train"]["precision"]


@pytest.mark.parametrize("name", WHOLE)
def test_every_run_of_the_bundled_suites_is_there(name):
    jobs = SUITES[name].jobs
    assert {j.slug for j in jobs} == {r.name for r in load_runs(records_folder() / name)}
    assert all(r.env["precision"] == "fp32" for r in load_runs(records_folder() / name))
    assert list(load_records(name)) == SUITES[name].labels

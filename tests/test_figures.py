"""Committed records are whole, and say what they are records of."""

import pytest

from derkit.config import TrainConfig
from derkit.records import load_runs
from derkit.results import load_records, records_folder
from derkit.suite import read_manifest

SUITES = sorted(p.stem for p in (records_folder().parent / "suites").glob("*.json"))


@pytest.mark.parametrize("name", SUITES)
def test_records_match_their_manifest(name):
    """Every run of the manifest has its record, with the manifest's config, data hash, versions and hardware."""
    jobs = read_manifest(records_folder().parent / "suites" / f"{name}.json")
    records = {r.name: r for r in load_runs(records_folder() / name)}
    assert {j.slug for j in jobs} == set(records)
    for job in jobs:
        run = records[job.slug]
        assert run.finished and len(run.epochs) == job.config.epochs
        assert TrainConfig(**run.config["train"]).hash() == job.config.hash()
        assert len(run.config["data_sha256"]) == 64 and run.config["source"]
        assert run.env["torch"] and run.env["device"] and run.env["precision"] == job.config.precision
    assert list(load_records(name)) == list(dict.fromkeys(j.label for j in jobs))

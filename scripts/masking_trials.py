"""Verdicts of the gradient-masking checks on the finished runs of a suite, beside what is known of those runs.

    python -m derkit.suite figures/suites/co_fashion_mini.json --jobs 2      # leaves the checkpoints under $DERKIT_HOME
    python scripts/masking_trials.py figures/suites/co_fashion_mini.json     # writes figures/records/co_fashion_mini/masking.json

A run counts as collapsed where `derkit.diagnosis.co_onset` finds it in the record; the checks see the network after the last epoch
and the first test images, nothing of the record.
"""

from __future__ import annotations

import argparse
import sys

import torch

from derkit import load_dataset, load_model
from derkit.diagnosis import co_onset
from derkit.manifest import read_manifest
from derkit.masking import gradient_masking
from derkit.records import Run, environment, write_json
from derkit.results import records_folder


def trial(job, test, images: int) -> dict:
    """One row: the run, what its record says, the verdict, and every check's two numbers."""
    run = Run(job.folder)
    report = gradient_masking(load_model(job.folder / "final.pt"), test, job.config.eps, norm=job.config.norm, images=images)
    final = run.final["last"]
    return dict(label=job.label, seed=job.config.seed, collapsed=co_onset(run) is not None, fgsm=final["fgsm"], strong=final.get("strong"),
                verdict=report.verdict, reasons=[c.name for c in report.reasons],
                checks={c.name: dict(found=round(c.found, 4), bound=round(c.bound, 4)) for c in report.checks})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [job for job in read_manifest(options.manifest) if (job.folder / "final.json").is_file()]
    if not jobs:
        sys.exit(f"no finished runs of {options.manifest} under $DERKIT_HOME: run python -m derkit.suite {options.manifest} first.")
    test = load_dataset(jobs[0].config.dataset).test
    rows = []
    for job in jobs:
        rows.append(trial(job, test, options.images))
        print({k: v for k, v in rows[-1].items() if k != "checks"}, flush=True)
    out = records_folder() / jobs[0].suite / "masking.json"
    write_json(out, dict(images=options.images, rows=rows, env=environment(torch.device("cpu"), "fp32", "the runs'")))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

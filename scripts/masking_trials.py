"""Verdicts of the gradient-masking checks on the finished runs of a suite, beside what is known.

    python -m experiments.run co_fashion_mini --jobs 2   # leaves checkpoints under $DERKIT_HOME
    python -m scripts.masking_trials co_fashion_mini     # writes figures/records/.../masking.json

A run counts as collapsed where `co_onset` finds it in the record; the checks see the network after
the last epoch and the first test images, nothing of the record.
"""

from __future__ import annotations

import argparse
import sys

import torch

from derkit.data import Split, load_dataset
from derkit.diagnosis.masking import gradient_masking
from derkit.diagnosis.overfitting import co_onset
from derkit.records import Run, environment, records_folder
from derkit.util import write_json
from experiments.suites import planned


def trial(label: str, run: Run, test: Split, images: int) -> dict:
    """One row: the run, what its record says, the verdict, and every check's two numbers."""
    train, last = run.config["train"], run.final["last"]
    report = gradient_masking(run.model(), test, train["eps"], norm=train["norm"], images=images)
    checks = {c.name: dict(found=round(c.found, 4), bound=round(c.bound, 4)) for c in report.checks}
    return dict(label=label, seed=train["seed"], collapsed=co_onset(run) is not None,
                fgsm=last["fgsm"], strong=last.get("strong"), verdict=report.verdict,
                reasons=[c.name for c in report.reasons], checks=checks)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite")
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs = [(run.label, run.finished(run.folder)) for run in planned(options.suite)]
    runs = [(label, run) for label, run in runs if run]
    if not runs:
        sys.exit(f"no finished runs: run python -m experiments.run {options.suite} first.")
    test, rows = load_dataset(runs[0][1].config["train"]["dataset"]).test, []
    for label, run in runs:
        rows.append(trial(label, run, test, options.images))
        print({k: v for k, v in rows[-1].items() if k != "checks"}, flush=True)
    env = environment(torch.device("cpu"), "fp32", "the runs'")
    out = records_folder() / options.suite / "masking.json"
    write_json(out, dict(images=options.images, rows=rows, env=env))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

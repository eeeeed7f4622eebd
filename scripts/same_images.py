"""Do the two judges agree? The strong suite on the very images that AutoAttack has seen.

    python scripts/same_images.py ro_fashion_mini

For every run of the suite that AutoAttack has judged and whose weights are in DERKIT_HOME. Writes
figures/records/<suite>/same_images.json, which docs/results.md shows.
"""

from __future__ import annotations

import argparse

from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.diagnosis.evaluation import strong_accuracy
from derkit.records import Run, environment, records_folder
from derkit.util import choose_device, write_json
from experiments.suites import planned


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite")
    suite = parser.parse_args(argv).suite
    device, rows, data = choose_device(), [], None
    for run in planned(suite):
        record = run.finished(run.records)
        last = record.final["last"] if record else {}
        if "aa" not in last or not (run.folder / "final.safetensors").is_file():
            continue
        config = TrainConfig.read(record.config["train"])
        data = data or load_dataset(config.dataset, None, device, train_size=config.train_size)
        images, model = data.test.take(slice(last["aa_images"])), Run(run.folder).model()
        strong = strong_accuracy(model.to(device), images, config.eps, norm=config.norm)
        rows.append(dict(label=run.label, seed=config.seed, images=len(images), strong=strong,
                         aa=last["aa"]))
        print(rows[-1], flush=True)
    env = environment(device, "fp32", "the precision of the weights")
    write_json(records_folder() / suite / "same_images.json", dict(rows=rows, env=env))


if __name__ == "__main__":
    main()

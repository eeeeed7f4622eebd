"""Command lines: options are ``--preset NAME`` and ``--set key=value``, as in the notebooks' parameters."""

from __future__ import annotations

import argparse
import json
import sys

from derkit.config import TrainConfig, help_text
from derkit.errors import DerkitError


def parse_sets(pairs: list[str]) -> dict[str, str]:
    """['eps=8/255', 'seed=3'] -> {'eps': '8/255', 'seed': '3'}."""
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise DerkitError(f"--set takes key=value, found {pair!r}.")
        values[key.strip()] = value.strip()
    return values


def interrupted() -> int:
    """One line after Ctrl-C, and the exit status that shells expect of it."""
    print("interrupted: finished epochs and shards are kept, the same command goes on.", file=sys.stderr)
    return 130


def main(argv: list[str] | None = None) -> int:
    """``python -m derkit.training``: train one run and print where it is and what it reached. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m derkit.training", description="Adversarial training with derkit.",
                                     epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="named recipe; default: chosen by the data set")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one field of the config; repeatable")
    parser.add_argument("--folder", help="run folder; default: DERKIT_HOME/runs/<name>-<hash>")
    parser.add_argument("--fresh", action="store_true", help="train anew even if the run exists")
    options = parser.parse_args(argv)
    from derkit import distributed

    try:
        config = TrainConfig.make(options.preset, **parse_sets(options.set))
        from derkit.training import train

        run = train(config, folder=options.folder, resume=not options.fresh)
    except (DerkitError, FloatingPointError) as error:
        distributed.report(error)
        return 2
    except KeyboardInterrupt:
        return interrupted()
    if distributed.rank() == 0:
        print(f"run folder: {run.folder}")
        print(json.dumps(run.final, indent=1))
    return 0

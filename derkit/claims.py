"""What the records of a suite are to be judged by: claims of a manifest, and published values beside its runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from derkit.config import TrainConfig
from derkit.errors import DerkitError, nearest, unknown
from derkit.results import METRICS

CLAIM_KEYS = ("text", "run", "metric", "epoch", "relation", "value", "than", "tolerance", "source", "note")
RELATIONS = ("about", ">", ">=", "<", "<=")
CLAIM_METRICS = (*METRICS, "collapsed", "gap")  # share of seeds that collapsed; PGD accuracy, best minus last epoch
PUBLISHED_FOR = ("cifar10", "cifar100", "svhn")  # data that published values are of; bundled data has none


@dataclass(frozen=True)
class Claim:
    """What the mean over seeds of a test metric of one run is expected to be: near a value, or beyond a value or other runs."""

    text: str
    run: str
    metric: str
    epoch: str = "last"
    relation: str = "about"
    value: float | None = None
    than: tuple[str, ...] = ()
    tolerance: float = 0.0
    source: str = ""
    note: str = ""
    published: bool = False  # ``value`` was published by ``source``


def read_claims(claims: list[dict[str, Any]], runs: list[dict[str, Any]], configs: dict[str, TrainConfig]) -> list[Claim]:
    """The expectations of the runs (dicts of a manifest, grids expanded) and its claims, checked. configs: by label, in order,
    of the settings that the file states. Raises DerkitError for unknown keys, labels and metrics, and claims that say nothing."""
    labels = list(configs)
    out = [_claim(c | {"run": _owner(c, run)}, labels, configs[_owner(c, run)]) for run in _owners(runs) for c in run["expect"]]
    return out + [_claim(c | {"run": name}, labels) for c in claims for name in matching(c["run"], labels)]


def known_keys(kind: str, found: dict[str, Any], allowed: Iterable[str]) -> None:
    """Raise DerkitError for a key that is not allowed, with the nearest one."""
    for key in found:
        if key not in allowed:
            raise unknown(f"key of a {kind}", key, allowed)


def matching(pattern: str, labels: Iterable[str]) -> list[str]:
    """The label, or all that match the pattern; DerkitError where none does."""
    found = [label for label in labels if label == pattern] or [label for label in labels if fnmatchcase(label, pattern)]
    if not found:
        raise DerkitError(f"no run is labelled {pattern!r}.{nearest(pattern, labels)} Labels: {', '.join(dict.fromkeys(labels))}.")
    return list(dict.fromkeys(found))


def _owners(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that carry expectations; those of a grid stand once, for the first of its combinations."""
    seen: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.get("expect"):
            member = seen.setdefault(run["template"], run | dict(members=[]))
            member["members"].append(run["label"])
    return list(seen.values())


def _owner(claim: dict[str, Any], run: dict[str, Any]) -> str:
    if "run" not in claim and len(run["members"]) > 1:
        raise DerkitError(f"an expectation of the grid {run['template']!r} needs 'run', one of: {', '.join(run['members'])}.")
    return matching(claim.get("run", run["members"][0]), run["members"])[0]


def _claim(found: dict[str, Any], labels: list[str], config: TrainConfig | None = None) -> Claim:
    """A checked claim; with a config, a published value of that run."""
    known_keys("claim", found, CLAIM_KEYS)
    metric, epoch = found["metric"], found.get("epoch", "last")
    if metric not in CLAIM_METRICS:
        raise unknown("metric", metric, CLAIM_METRICS)
    if epoch not in ("last", "best"):
        raise unknown("epoch", epoch, ("last", "best"))
    relation, than = found.get("relation", "about"), found.get("than", [])
    than = (than,) if isinstance(than, str) else tuple(than)
    if relation not in RELATIONS:
        raise unknown("relation", relation, RELATIONS)
    value, tolerance = found.get("value"), found.get("tolerance", 0.0)
    where = f"the claim on {metric} of {found['run']!r}"
    if (value is None) == (not than):
        raise DerkitError(f"{where} needs either 'value' or 'than', found {'neither' if value is None else 'both'}.")
    numbers = [v for v in (value, tolerance) if v is not None]
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers) or tolerance < 0:
        raise DerkitError(f"{where}: value and tolerance are numbers (shares, not per cent), found {value!r} and {tolerance!r}.")
    if value is not None and metric not in ("dE", "gap") and not 0 <= value <= 1:
        raise DerkitError(f"{where}: {metric} is a share in [0, 1], found {value!r}.")
    if relation == "about" and (than or not tolerance):
        raise DerkitError(f"{where}: relation 'about' needs a value and a tolerance; else use one of: {', '.join(RELATIONS[1:])}.")
    for other in than:
        if ": " not in other:
            matching(other, labels)
    if config is not None:
        if config.dataset not in PUBLISHED_FOR:
            raise DerkitError(f"{where}: published values are of {', '.join(PUBLISHED_FOR)}, not of {config.dataset}; use 'claims'.")
        if not found.get("source") or value is None:
            raise DerkitError(f"{where}: an expectation needs the published 'value' and its 'source'.")
    text = found.get("text") or f"{found['run']}: {metric}, {epoch} epoch"
    return Claim(text, found["run"], metric, epoch, relation, value, than, tolerance, found.get("source", ""), found.get("note", ""),
                 config is not None)

"""Errors that teach: what was found, what is allowed, and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DerkitError(ValueError):
    """Bad input, found before any long work starts."""


class CheckpointError(DerkitError):
    """A checkpoint that cannot be used: truncated, of another variant, or carrying code."""


class DataError(DerkitError):
    """A data set that cannot be found or read."""


def nearest(found: object, allowed: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(str(found).lower(), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(kind: str, found: object, allowed: Iterable[str]) -> DerkitError:
    """The error for a name that is not in a table."""
    allowed = list(allowed)
    return DerkitError(f"unknown {kind} {found!r}.{nearest(found, allowed)} Allowed: {', '.join(allowed)}.")


def pick(kind: str, name: str, table: dict):
    """``table[name]``, or the error that names the nearest valid choice."""
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]

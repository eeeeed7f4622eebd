"""Inception-v3, the extractor that IS, FID and KID are defined with, from a file given by path: nothing is fetched."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from derkit.data import Dataset
from derkit.data_sources import home
from derkit.errors import DerkitError
from derkit.extractor import Extractor, extractor_for, torch_fidelity

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_PREFIX = "6726825d"  # of the file's sha256
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


def find_inception(path: str | os.PathLike | None = None) -> Path | None:
    """The Inception file: ``path`` (a file or its folder), $DERKIT_INCEPTION, or torch hub's checkpoints; else None."""
    if path:
        places = [Path(path).expanduser()]
    else:
        named = os.environ.get("DERKIT_INCEPTION")
        places = [Path(named).expanduser()] if named else []
        places += [Path(torch.hub.get_dir()) / "checkpoints", home()]
    for place in places:
        file = place / INCEPTION_FILE if place.is_dir() else place
        if file.is_file():
            return file
    return None


def inception(path: str | os.PathLike | None = None, required: bool = False) -> Extractor | None:
    """Inception-v3 (the TensorFlow weights of 2015 that FID is defined with), from a file whose sha256 is checked.

    Without the file: DerkitError that says where to get it if ``required``, else one printed line and None.
    A file with another sha256 is never loaded: DerkitError.
    """
    torch_fidelity()
    file = find_inception(path)
    if file is None:
        looked = f" (not found at {path})" if path else ""
        text = (f"IS, FID and KID need {INCEPTION_FILE}{looked}. Download {INCEPTION_URL} once (91 MB) and pass its "
                "path, or set DERKIT_INCEPTION.")
        if required:
            raise DerkitError(text)
        print(f"Inception metrics are skipped: {text}")
        return None
    with open(file, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    if not sha256.startswith(INCEPTION_PREFIX):
        raise DerkitError(f"{file} has sha256 {sha256[:8]}..., expected {INCEPTION_PREFIX}...: damaged, or another "
                          f"file. Download {INCEPTION_URL} again.")
    try:  # the prefix is 32 bits, which can be forged, and torch-fidelity would run a pickle's code
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DerkitError(f"{file} holds something else than tensors: not loaded. Download {INCEPTION_URL} again.") from error
    return Extractor("inception-v3-compat", "I", sha256, path=file, info=dict(weights=INCEPTION_FILE))


def judge(dataset: Dataset, file: str | os.PathLike | None = None) -> Extractor | None:
    """What samples of a data set are judged by: Inception from ``file`` where one is given (a missing or wrong file is
    an error), else the offline extractor. Where there is none: one printed line on how to get one, and None."""
    if file:
        return inception(file, required=True)
    try:
        return extractor_for(dataset)
    except DerkitError as error:
        print(f"Distances are left out: {error}")
        return None

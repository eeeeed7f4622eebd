"""Write the table of lessons of README.md: thumbnails, minutes, and badges for Colab.

    python scripts/make_lessons.py

Thumbnails come from the executed notebooks, minutes from figures/records/notebook_times.json, the
badges' address from `Repository` in pyproject.toml. Until that is a GitHub address there are none.
"""

from __future__ import annotations

import base64
import io
import json
import re
import tomllib
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
LESSONS = {  # notebook: the question it answers, which of its figures (from 0) is the thumbnail
    "00_from_scratch": ("What are the energies of a classifier, and what is an attack? By hand, on "
                        "images of two pixels.", 2),
    "01_energy_views": ("What does an attack do to an image, and to its energy? Can one detect it "
                        "by that?", 0),
    "02_co_ro_diagnosis": ("What do catastrophic and robust overfitting look like, and which alarm "
                           "rings first?", 1),
    "03_der_training": ("What does DER change, beside the methods that people would use instead?",
                        0),
    "04_pca_guided_generation": ("How does a robust classifier draw images, and how much of it is "
                                 "the start's doing?", 0),
    "05_scorecard": ("What was claimed, what was measured, and what is still to be run?", 1)}
BLOCK = re.compile(r"(<!-- lessons -->\n).*?(?=<!-- end -->)", re.DOTALL)
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def thumbnail(name: str, which: int, width: int = 360) -> None:
    """One figure of a notebook, made small, as figures/lessons/NAME.png."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    figures = [output["data"]["image/png"] for cell in cells for output in cell.get("outputs", [])
               if "image/png" in output.get("data", {})]
    image = Image.open(io.BytesIO(base64.b64decode("".join(figures[which])))).convert("RGB")
    image.thumbnail((width, width), Image.Resampling.LANCZOS)
    image = image.quantize(128)
    path = ROOT / "figures" / "lessons" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    image.save(path, optimize=True)


def colab(name: str, repository: str) -> str:
    """A badge that opens the notebook in Colab, '' without an address on GitHub."""
    found = re.match(r"https://github\.com/([^/]+/[^/]+?)/?$", repository)
    start = f"https://colab.research.google.com/github/{found[1]}/blob/main" if found else ""
    return f"[![Open in Colab]({BADGE})]({start}/notebooks/{name}.ipynb)" if found else ""


def table(repository: str) -> str:
    """The lessons as a table in Markdown."""
    times = json.loads((ROOT / "figures/records/notebook_times.json").read_text())["notebooks"]
    lines = ["| | lesson | minutes |", "|---|---|---|"]
    for name, (question, _) in LESSONS.items():
        link = f"notebooks/{name}.ipynb"
        words = f"[{name}]({link})<br>{question} {colab(name, repository)}".rstrip()
        picture = f'<img src="figures/lessons/{name}.png" width="170">'
        lines.append(f"| [{picture}]({link}) | {words} | {times[name] / 60:.1f} |")
    return "\n".join(lines) + "\n"


def render(text: str) -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return BLOCK.sub(lambda block: block[1] + table(project["urls"]["Repository"]), text)


if __name__ == "__main__":
    for name, (_, which) in LESSONS.items():
        thumbnail(name, which)
    page = ROOT / "README.md"
    page.write_text(render(page.read_text()))

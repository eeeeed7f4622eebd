"""README and docs/: numbers are those of the records, code runs, files and links exist.

The tables that `python -m experiments.results` writes are compared in test_results.py.
"""

import ast
import re
from pathlib import Path

import pytest
import torch

import derkit
from derkit.config import TrainConfig
from derkit.records import records_folder
from derkit.util import read_json
from scripts import make_lessons

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_headlines_of_the_readme_are_those_of_the_tables():
    """The README's bullet points quote numbers of docs/results.md."""
    text = (ROOT / "README.md").read_text()
    part = text[text.index("## What was found") : text.index("## As a library")]
    quoted = re.findall(r"\b\d+\.\d+", part)
    known = set(re.findall(r"\b\d+\.\d+", (ROOT / "docs" / "results.md").read_text()))
    assert len(quoted) > 5 and set(quoted) <= known


def test_what_is_to_be_cited():
    """The papers of the README are those of CITATION.cff, which names this version."""
    citation, text = (ROOT / "CITATION.cff").read_text(), (ROOT / "README.md").read_text()
    papers = re.findall(r"arXiv (\d{4}\.\d{5})", text[text.index("## Citing") :])
    assert papers[:2] == re.findall(r"arxiv.org/abs/(\S+)\"", citation)
    assert f"version: {derkit.__version__}\n" in citation


def test_library_example_of_the_readme_runs(monkeypatch, capsys):
    """As printed, on a run of one epoch and few images."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    make = TrainConfig.make
    toy = dict(epochs=3, train_size=1000, eval_size=32, probe_size=16, final_size=32, strong_size=0)
    monkeypatch.setattr(derkit.TrainConfig, "make",
                        lambda preset, **options: make(preset, **(options | toy)))
    names: dict = {}
    exec(compile(ast.parse(code), "README", "exec"), names)
    assert names["dE"].shape == names["penalty"].shape == (200,)
    assert names["images"].shape == (20, 1, 28, 28) and names["images"].dtype == torch.uint8
    assert len([line for line in code.splitlines() if line.strip()]) <= 11
    assert capsys.readouterr().out.startswith(("None", "Onset"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_commands(page):
    """Files that a page links or runs exist, and so do the flags of `derkit`."""
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for script in re.findall(r"python ((?:scripts|benchmarks)/\w+\.py)", text):
        assert (ROOT / script).is_file(), script
    fields = {name.replace("_", "-") for config in (derkit.TrainConfig, derkit.GenerateConfig)
              for name in config.model_fields}
    known = fields | {"preset", "folder", "fresh", "checkpoint", "part", "data-dir", "dataset"}
    known |= {"measure", "inception", "autoattack", "pgd50", "strong", "images", "csv", "help"}
    for line in re.findall(r"(?:^|-m )derkit (?:train|generate|evaluate|results)(.*)", text, re.M):
        assert {flag for flag in re.findall(r"--([\w-]+)", line.split("#")[0])} <= known, line


def test_channels_last_table():
    """The page's edge is the record's: one kind of convolution, one phase, 1 to 6 channels."""
    record = read_json(records_folder() / "channels_last.json")
    assert len(record) == 3 and {found["cpu"] for found in record.values()} == {"AVX2"}
    text = (ROOT / "docs" / "channels_last.md").read_text()
    for version, found in record.items():
        assert version.split("+")[0] in text
        cases = found["unsafe"]
        assert {case["convolution"] for case in cases} == {"1x1"}
        assert {case["phase"] for case in cases} == {"backward, weights"}
        assert {case["stride"] for case in cases} == {2}
        assert {case["channels"] for case in cases} == {1, 2, 3, 4, 6}
        for width, gain in found["gain"].items():
            (line,) = [line for line in text.splitlines() if line.startswith(f"| {width} |")]
            assert f"{gain:.2f}" in line


def test_lessons_of_the_readme():
    """The table is what `scripts/make_lessons.py` writes: every notebook, its recorded minutes, a
    thumbnail, and a badge for Colab once the repository has an address on GitHub."""
    text = (ROOT / "README.md").read_text()
    assert make_lessons.render(text) == text and len(text.splitlines()) <= 120
    names = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    found = read_json(records_folder() / "notebook_times.json")
    assert [*make_lessons.LESSONS] == names == [*found["notebooks"]]
    for stated in ("{environment_gb:.0f} GB", "{test_command_minutes} min", "{row_minutes} min"):
        assert f"about {stated.format(**found)}" in text
    assert all((ROOT / "figures" / "lessons" / f"{name}.png").is_file() for name in names)
    badge = make_lessons.table("https://github.com/some/where")
    address = "https://colab.research.google.com/github/some/where/blob/main/notebooks/"
    assert all(f"({address}{name}.ipynb)" in badge for name in names)

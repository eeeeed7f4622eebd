"""The site builds without a warning, with a page for everything; links and formulas are whole."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/**/0*.ipynb")]


class Page(HTMLParser):  # anchors, links with images, and the number of formulas
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.formulas = set(), [], 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        self.links += [(tag, found[key]) for key in ("href", "src") if found.get(key)]
        self.formulas += tag == "math"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(the folder, every page by its path), built with no notebook run and no network."""
    pytest.importorskip("sphinx", reason="needs the site's packages: pip install 'derkit[docs]'")
    out = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "-c", "docs", ".", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, {path: Page(path) for path in out.rglob("*.html") if "_static" not in path.parts}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_source_has_its_page_and_every_formula_is_one(site, source):
    text = source.read_text()
    if source.suffix == ".ipynb":
        cells = [c["source"] for c in json.loads(text)["cells"] if c["cell_type"] == "markdown"]
        text = "\n\n".join(map("".join, cells))
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    page = site[1][(site[0] / source.relative_to(ROOT)).with_suffix(".html")]
    assert page.formulas == len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.DOTALL))


def test_no_link_is_broken_and_nothing_is_fetched(site):
    for path, page in site[1].items():
        for tag, link in page.links:
            target, _, anchor = link.partition("#")
            file = (path.parent / (target.partition("?")[0] or path.name)).resolve()
            inside = file.exists() and (not anchor or anchor in site[1][file].ids)
            outside = "://" in link and tag in ("a", "img")  # no script and no style
            assert inside or outside or link.startswith("data:"), f"{path}: {link}"

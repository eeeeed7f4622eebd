"""The site in a browser: every page opens without an error, with its pictures and formulas in view.

    pip install -e ".[all,browser]" && pytest scripts/check_site.py

DERKIT_CHROMIUM and DERKIT_SCREENSHOTS as in scripts/check_jupyterlab.py.
"""

import os
import subprocess
import sys
from pathlib import Path

from scripts.check_jupyterlab import ROOT, page  # noqa: F401 (a fixture)

EMPTY = """() => [...document.querySelectorAll("img, math")].filter(node =>
    node.tagName == "IMG" ? !node.src.startsWith("http") && !node.naturalWidth
                          : node.getBoundingClientRect().width < 2)
    .filter(node => node.checkVisibility()).map(node => node.outerHTML.slice(0, 120))"""


def test_every_page(tmp_path, page):  # noqa: F811
    """Folded cells are opened first. Badges of other servers are left out: nothing is fetched."""
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "-c", "docs", "."]
    subprocess.run([*command, tmp_path], cwd=ROOT, check=True, timeout=600)
    folder, errors = os.environ.get("DERKIT_SCREENSHOTS"), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route("http*://**", lambda route: route.abort())
    pages = [path for path in sorted(tmp_path.rglob("*.html")) if "_static" not in path.parts
             and "http-equiv=\"refresh\"" not in path.read_text()]
    for path in pages:
        page.goto(path.as_uri(), wait_until="load")
        page.evaluate('document.querySelectorAll("details").forEach(node => node.open = true)')
        page.evaluate('document.querySelectorAll("img").forEach(node => node.loading = "eager")')
        page.wait_for_function('[...document.images].every(node => node.complete)', timeout=30_000)
        assert page.evaluate("document.querySelector('main').innerText.length") > 50, path
        assert not page.evaluate(EMPTY) and not errors, (path, page.evaluate(EMPTY), errors)
        if folder:
            page.screenshot(path=Path(folder) / f"{path.stem}.png", full_page=True)
    assert len(pages) > 20

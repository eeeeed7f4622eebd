"""The notebooks as a person uses them: JupyterLab in a browser, Run All, look at the outputs.

    pip install -e ".[all,browser]" && pytest scripts/check_jupyterlab.py -k 01

DERKIT_CHROMIUM: the browser (default: one on the PATH, else playwright's own).
DERKIT_SCREENSHOTS: folder for a screenshot of each notebook at its last check (default: none).
DERKIT_BROWSER_HOME: the DERKIT_HOME of the notebooks, whose runs they load (default: empty).
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
MINUTES = 20  # for one notebook
pytestmark = pytest.mark.timeout(60 * MINUTES + 300)


@pytest.fixture
def server(tmp_path):
    """The address of a JupyterLab on copies: what is saved there does not reach the sources."""
    log, token = tmp_path / "server.log", secrets.token_hex(16)
    folder = shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    names = """JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR IPYTHONDIR
               JUPYTERLAB_SETTINGS_DIR JUPYTERLAB_WORKSPACES_DIR"""
    private = {name: str(tmp_path / name) for name in names.split()}
    private["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    private["DERKIT_HOME"] = os.environ.get("DERKIT_BROWSER_HOME") or os.environ["DERKIT_HOME"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
             f"--port={port}", f"--IdentityProvider.token={token}",
             f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    with open(log, "w") as out:
        watched = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}  # bars are shown
        process = subprocess.Popen(words, stdout=out, stderr=out, env=watched | private)
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.3)
        yield lambda name: f"{address}/lab/tree/{name}?token={token}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def page():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install derkit[browser]")
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    path = os.environ.get("DERKIT_CHROMIUM") or next(filter(None, found), None)
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser.new_page(viewport=dict(width=1400, height=1000))
        browser.close()


STATE = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const cells = [...panel.content.model.cells].filter(c => c.type === 'code');
    const outputs = cells.flatMap(
        c => Array.from({length: c.outputs.length}, (_, i) => c.outputs.get(i).toJSON()));
    return {status: panel.sessionContext.session?.kernel?.status ?? 'none',
            waiting: cells.filter(c => c.executionCount === null).length,
            errors: outputs.filter(o => o.output_type === 'error').map(o => o.evalue),
            text: outputs.filter(o => o.output_type === 'stream')
                         .map(o => [].concat(o.text).join('')).join('')};
}"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_run_all_in_jupyterlab(path, server, page):
    page.goto(server(path.name))
    status = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status"
    page.wait_for_function(f"() => {status} === 'idle'", timeout=120_000)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    assert page.evaluate(STATE)["text"] == ""  # what is seen afterwards is new
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    end, quiet, bars = time.monotonic() + 60 * MINUTES, 0, 0
    while quiet < 3:
        time.sleep(0.5)
        now = page.evaluate(STATE)
        bars = max(bars, page.locator(".jupyter-widgets", has_text="training ").count())
        at_rest = now["status"] == "idle" and (not now["waiting"] or now["errors"])
        quiet = quiet + 1 if at_rest else 0
        assert time.monotonic() < end, f"still {now['status']}, {now['waiting']} cells to run"
    last = page.get_by_text("PASS  ").last
    last.scroll_into_view_if_needed()
    if os.environ.get("DERKIT_SCREENSHOTS"):
        page.screenshot(path=Path(os.environ["DERKIT_SCREENSHOTS"], f"{path.stem}.png"))
    assert now["errors"] == [] and now["waiting"] == 0 and last.is_visible()
    outputs = [o for c in nbformat.read(path, 4).cells for o in c.get("outputs", [])]
    texts = now["text"], "".join(o.get("text", "") for o in outputs)
    seen, stored = ([s for s in t.splitlines() if s[:6] in ("PASS  ", "FAIL  ")] for t in texts)
    assert seen == stored != [] and not [s for s in seen if s.startswith("FAIL")]
    if "= train(" in path.read_text() and "DERKIT_BROWSER_HOME" not in os.environ:
        assert bars, "training shows no progress"
    if "notebook.slider(" in path.read_text():
        move_slider(page, path.stem)


def move_slider(page, name):
    """The picture behind the slider follows it."""
    handle, image = page.locator(".noUi-handle").first, page.locator("img.widget-image").first
    handle.scroll_into_view_if_needed()
    before = image.get_attribute("src")
    for _ in range(2):
        handle.press("ArrowRight")
    page.wait_for_function("([e, old]) => e.src !== old", arg=[image.element_handle(), before])
    image.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    if os.environ.get("DERKIT_SCREENSHOTS"):
        page.screenshot(path=Path(os.environ["DERKIT_SCREENSHOTS"], f"{name}-slider.png"))

"""The notebooks as a person uses them: JupyterLab in a browser, Run All, look at the outputs. Opt-in:

    pip install -e ".[all,browser]" && DERKIT_BROWSER=1 pytest tests/test_jupyterlab.py -k 01

DERKIT_CHROMIUM: path of the browser (default: chromium, chromium-browser or google-chrome on the PATH, else playwright's own).
DERKIT_SCREENSHOTS: folder for a screenshot of each notebook at its last check (default: none).
DERKIT_BROWSER_HOME: the DERKIT_HOME of the notebooks, where finished runs are loaded (default: empty, all is trained anew).
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
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MINUTES = 20  # for one notebook

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not os.environ.get("DERKIT_BROWSER"), reason="opt-in: set DERKIT_BROWSER=1 (JupyterLab and Chromium)"),
]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def server(tmp_path):
    """(address, token) of a JupyterLab on copies of the notebooks, so that nothing saved there reaches the sources."""
    folder, token, port = tmp_path / "lab", secrets.token_hex(16), free_port()
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (folder / "derkit").symlink_to(ROOT / "derkit")
    quiet = tmp_path / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    private = {k: str(tmp_path / k) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
                                              "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    home = os.environ.get("DERKIT_BROWSER_HOME") or os.environ["DERKIT_HOME"]
    words = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
             "--LabApp.expose_app_in_browser=True"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        words.append("--allow-root")
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], stdout=log, stderr=subprocess.STDOUT, cwd=folder,
                                   env=os.environ | private | dict(PYTHONPATH=path, DERKIT_HOME=home))
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    pytest.fail((tmp_path / "server.log").read_text()[-3000:])
                time.sleep(0.3)
        yield address, token, folder
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def page():
    """A window of headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install derkit[browser]")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("DERKIT_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser.new_page(viewport=dict(width=1400, height=1000))
        browser.close()


def state(page):
    """What the application knows about the open notebook: kernel status, cells still to run, errors, printed text."""
    return page.evaluate("""() => {
        const panel = window.jupyterapp.shell.currentWidget, kernel = panel.sessionContext.session?.kernel;
        const cells = [...panel.content.model.cells].filter(c => c.type === 'code');
        const outputs = cells.flatMap(c => Array.from({length: c.outputs.length}, (_, i) => c.outputs.get(i).toJSON()));
        return {status: kernel?.status ?? 'none', waiting: cells.filter(c => c.executionCount === null).length,
                cells: cells.length, errors: outputs.filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue),
                text: outputs.filter(o => o.output_type === 'stream').map(o => [].concat(o.text).join('')).join('')};
    }""")


def run_all(page):
    """Clear, Run All as from the menu, and wait until every cell has run (or one has failed) and the kernel is idle."""
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    assert state(page)["text"] == ""  # what is seen afterwards is new
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    end, quiet = time.monotonic() + 60 * MINUTES, 0
    while quiet < 3:
        time.sleep(0.5)
        now = state(page)
        done = now["status"] == "idle" and (not now["waiting"] or now["errors"])
        quiet = quiet + 1 if done else 0
        assert time.monotonic() < end, f"still {now['status']}, {now['waiting']} of {now['cells']} cells to run"
    return now


def screenshot(page, name):
    folder = os.environ.get("DERKIT_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_run_all_in_jupyterlab(path, server, page):
    address, token, folder = server
    page.goto(f"{address}/lab/tree/notebooks/{path.name}?token={token}")
    page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
                           timeout=120_000)
    found = run_all(page)
    page.get_by_text("PASS  ").last.scroll_into_view_if_needed()
    screenshot(page, path.stem)
    assert found["errors"] == [] and found["waiting"] == 0
    stored = "".join(o.get("text", "") for c in nbformat.read(path, 4).cells if c.cell_type == "code" for o in c.outputs)
    expected = [line for line in stored.splitlines() if line.startswith("PASS  ")]
    assert [line for line in found["text"].splitlines() if line.startswith(("PASS  ", "FAIL  "))] == expected and expected
    assert page.get_by_text("PASS  ").last.is_visible()  # on the screen, not only in the model

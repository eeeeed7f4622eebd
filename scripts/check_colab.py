"""Run a notebook as it runs after an upload to Colab: Colab's Python and packages, derkit not installed, no repository around it.

    python scripts/check_colab.py --python python3.12           # notebook 01 under torch 2.11 (about 6 GB, minutes)
    python scripts/check_colab.py --python python3.12 --notebook 01 --torch 2.11.0 --venv /tmp/colab-venv

A fresh venv gets torch, torchvision, numpy, matplotlib, seaborn, pandas, tqdm and a kernel, but not papermill, nbval, jupyterlab
or derkit. The notebook and the folder derkit/ are copied to an empty folder, the cells run there from the first on (by
nbclient, from outside), and what they check must be what the stored notebook says: the same PASS lines, no error.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("torchvision", "numpy>=2.0,<2.1", "matplotlib", "seaborn", "pandas", "tqdm", "ipykernel")  # of what Colab has
ABSENT = ("papermill", "nbval", "jupyterlab", "derkit")


def make_venv(folder: Path, python: str, torch: str) -> Path:
    """The venv's interpreter; an existing one is used as it is."""
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
        subprocess.run([interpreter, "-m", "pip", "install", "-q", f"torch=={torch}", *BESIDE], check=True)
    code = f"import importlib.util, torch, sys; found = [n for n in {ABSENT} if importlib.util.find_spec(n)]; " \
           "print('Python', sys.version.split()[0], 'torch', torch.__version__, 'found:', *found); sys.exit(bool(found))"
    if subprocess.run([interpreter, "-c", code], cwd=folder, env=clean()).returncode:
        raise SystemExit(f"{folder} is not like Colab: it can import what it should not (see above).")
    return interpreter


def clean(**more: str) -> dict[str, str]:
    """The environment without anything that would help the notebook to find derkit or earlier runs."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DERKIT_HOME", "DERKIT_DATA")} | more


def run(path: Path, interpreter: Path, scratch: Path) -> nbformat.NotebookNode:
    """The executed notebook; nothing but it and derkit/ lies in its folder."""
    content, kernels = scratch / "content", scratch / "jupyter" / "kernels" / "colab"
    shutil.copytree(ROOT / "derkit", content / "derkit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(path, content / path.name)
    kernels.mkdir(parents=True)
    argv = [str(interpreter), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(json.dumps(dict(argv=argv, display_name="colab", language="python")))
    environment = clean(JUPYTER_PATH=str(scratch / "jupyter"), TQDM_DISABLE="1", HOME=str(scratch))
    os.environ.clear()
    os.environ.update(environment)  # kernels inherit it
    notebook = nbformat.read(content / path.name, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=3600, kernel_name="colab", resources={"metadata": {"path": str(content)}}).execute()
    return notebook


def verdicts(notebook: nbformat.NotebookNode) -> list[str]:
    """Its PASS and FAIL lines."""
    text = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    return [line for line in text.splitlines() if line.startswith(("PASS  ", "FAIL  "))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notebook", default="01", help="start of its name; default: 01, which needs no records of runs")
    parser.add_argument("--python", default=sys.executable, help="3.11 or newer; Colab has 3.12")
    parser.add_argument("--torch", default="2.11.0")
    parser.add_argument("--venv", type=Path, help="kept and used again; default: made for this check only")
    options = parser.parse_args()
    path = next(p for p in sorted((ROOT / "notebooks").glob("*.ipynb")) if p.name.startswith(options.notebook))
    with tempfile.TemporaryDirectory() as scratch:
        interpreter = make_venv(options.venv or Path(scratch) / "venv", options.python, options.torch)
        try:
            found = verdicts(run(path, interpreter, Path(scratch)))
        except CellExecutionError as error:
            print(f"FAILED: {path.name}\n{error}")
            return 1
    expected = verdicts(nbformat.read(path, 4))
    print(*found, sep="\n")
    print(f"{path.name}: {len(found)} checks, as stored: {found == expected}")
    return 0 if found == expected and found else 1


if __name__ == "__main__":
    sys.exit(main())

"""Run a notebook as after an upload to Colab: Colab's Python and packages, derkit not installed.

    python scripts/check_colab.py --python python3.12    # 01 under torch 2.11 (about 6 GB, minutes)
    python scripts/check_colab.py --python python3.12 --notebook 01 --torch 2.11.0 --venv /tmp/colab

A fresh venv gets what derkit needs of Colab's packages and a kernel, but not papermill, nbval,
jupyterlab or derkit. The notebook, derkit/, experiments/ and figures/ are copied to an empty
folder, all cells run there (by nbclient, from outside), and the PASS and FAIL lines must be those
that the stored notebook holds. Where a notebook says that it leaves distances out, because Colab
has no torch-fidelity, lines may be missing; they are listed.
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
BESIDE = ("torchvision", "numpy>=2.0,<2.1", "matplotlib", "seaborn", "pandas", "tqdm", "pydantic",
          "safetensors", "filelock", "ipykernel")
ABSENT = ("papermill", "nbval", "jupyterlab", "derkit", "submitit")
HIDDEN = ("PYTHONPATH", "DERKIT_HOME", "DERKIT_DATA")
CHECK = f"""
import importlib.util, sys, torch
found = [name for name in {ABSENT} if importlib.util.find_spec(name)]
print("Python", sys.version.split()[0], "torch", torch.__version__, "found:", *found)
sys.exit(bool(found))
"""


def clean(**more: str) -> dict[str, str]:
    """The environment without what would help the notebook to find derkit or earlier runs."""
    return {k: v for k, v in os.environ.items() if k not in HIDDEN} | more


def make_venv(folder: Path, python: str, torch: str) -> Path:
    """The venv's interpreter; an existing one is used as it is."""
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
        install = [interpreter, "-m", "pip", "install", "-q", f"torch=={torch}", *BESIDE]
        subprocess.run(install, check=True)
    if subprocess.run([interpreter, "-c", CHECK], cwd=folder, env=clean()).returncode:
        sys.exit(f"{folder} is not like Colab: it can import what it should not (see above).")
    return interpreter


def run(path: Path, interpreter: Path, scratch: Path) -> nbformat.NotebookNode:
    """The executed notebook; nothing but it and those three folders lies where it runs."""
    content, kernel = scratch / "content", scratch / "jupyter" / "kernels" / "colab"
    for part in ("derkit", "experiments", "figures"):
        shutil.copytree(ROOT / part, content / part,
                        ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(path, content / path.name)
    kernel.mkdir(parents=True)
    argv = [str(interpreter), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = dict(argv=argv, display_name="colab", language="python")
    (kernel / "kernel.json").write_text(json.dumps(spec))
    environment = clean(JUPYTER_PATH=str(scratch / "jupyter"), TQDM_DISABLE="1", HOME=str(scratch))
    os.environ.clear()
    os.environ.update(environment)  # kernels inherit it
    notebook = nbformat.read(content / path.name, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=3600, kernel_name="colab",
                   resources={"metadata": {"path": str(content)}}).execute()
    return notebook


def verdicts(notebook: nbformat.NotebookNode) -> tuple[list[str], bool]:
    """Its PASS and FAIL lines, and whether it left distances out."""
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    lines = "".join(o.get("text", "") for o in outputs).splitlines()
    less = any(line.startswith("Distances are left out") for line in lines)
    return [line for line in lines if line.startswith(("PASS  ", "FAIL  "))], less


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notebook", default="01", help="start of its name; default: 01")
    parser.add_argument("--python", default=sys.executable, help="3.11 or newer; Colab has 3.12")
    parser.add_argument("--torch", default="2.11.0")
    parser.add_argument("--venv", type=Path, help="kept and used again; default: a temporary one")
    options = parser.parse_args()
    path = next((ROOT / "notebooks").glob(f"{options.notebook}*.ipynb"))
    with tempfile.TemporaryDirectory() as scratch:
        venv = options.venv or Path(scratch) / "venv"
        interpreter = make_venv(venv, options.python, options.torch)
        try:
            found, less = verdicts(run(path, interpreter, Path(scratch)))
        except CellExecutionError as error:
            print(f"FAILED: {path.name}\n{error}")
            return 1
    expected, _ = verdicts(nbformat.read(path, 4))
    missing = [line for line in expected if line not in found] if less else []
    same = found == [line for line in expected if line not in missing]
    print(*found, *(line.replace("PASS", "left out") for line in missing), sep="\n")
    print(f"{path.name}: {len(found)} checks, as stored: {same}")
    return 0 if same and found else 1


if __name__ == "__main__":
    sys.exit(main())

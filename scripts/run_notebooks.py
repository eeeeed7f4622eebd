"""Execute the notebooks with their default parameters and store the outputs in place.

    python scripts/run_notebooks.py            # all
    python scripts/run_notebooks.py 01 03      # some, by the start of their names
    python scripts/run_notebooks.py --keep 02  # use the runs in DERKIT_HOME, while text is written

Without --keep, runs start from an empty DERKIT_HOME, so that what is stored is what a fresh machine
prints.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(path: Path) -> float:
    """Run one notebook and write it back; returns the seconds it took.

    A failing cell leaves the file as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    NotebookClient(notebook, timeout=3600, kernel_name="python3", record_timing=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    nbformat.write(notebook, path)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[""])
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    folder = ROOT / "notebooks"
    for path in [*sorted(folder.glob("*.ipynb")), *sorted(folder.glob("solutions/*.ipynb"))]:
        if not path.name.startswith(tuple(options.names)):
            continue
        with tempfile.TemporaryDirectory() as home:
            if not options.keep:
                os.environ["DERKIT_HOME"] = home
            print(f"{path.name}: {execute(path):.0f} s", flush=True)


if __name__ == "__main__":
    main()

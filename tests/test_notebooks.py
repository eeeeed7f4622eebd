"""What is stored in the notebooks, and how their parameters behave under papermill."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = {"dataset", "data_dir", "download", "train_size", "model", "method", "regularizer", "variant", "weight", "eps", "epochs",
         "seed", "device"}


def code_cells(path):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def text_of(cell):
    return "".join(o.get("text", "") for o in cell.outputs if o.output_type == "stream")


def test_there_are_notebooks():
    assert {p.name[:2] for p in NOTEBOOKS} >= {"01", "02", "03"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestStored:
    def test_is_valid_and_portable(self, path):
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3"
        raw = path.read_text()
        for trace in (str(ROOT), str(Path.home()) + "/", "/tmp/"):
            assert trace not in raw, f"a path of the machine that ran it: {trace}"

    def test_every_cell_was_executed_without_error(self, path):
        counts = [c.execution_count for c in code_cells(path)]
        assert counts == list(range(1, len(counts) + 1))
        assert not [o for c in code_cells(path) for o in c.outputs if o.output_type == "error"]

    def test_checks_are_there_and_passed(self, path):
        text = "".join(text_of(c) for c in code_cells(path))
        assert text.count("PASS  ") >= 3 and "FAIL  " not in text

    def test_no_warnings_or_bars_stored(self, path):
        assert not [o for c in code_cells(path) for o in c.outputs if o.output_type == "stream" and o.name == "stderr"]

    def test_ends_with_summary_and_exercises(self, path):
        last = "\n".join(c.source for c in nbformat.read(path, 4).cells[-2:])
        assert "Summary" in last and "Exercises" in last

    def test_cells_are_short(self, path):
        lines = sorted(len(c.source.splitlines()) for c in code_cells(path))
        assert lines[-1] <= 22 and lines[len(lines) // 2] <= 8

    def test_parameters_cell_is_what_papermill_reads(self, path):
        cells = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
        assert len(cells) == 1
        for line in cells[0].source.splitlines():
            assert line.count("=") == 1 and ":" in line.split("=")[0] and "  # " in line
        names = {line.split(":")[0] for line in cells[0].source.splitlines()}
        assert names >= NAMES
        done = subprocess.run([sys.executable, "-m", "papermill", "--help-notebook", str(path)], capture_output=True, text=True)
        assert done.returncode == 0
        for name in names:
            assert f"\n  {name}: " in done.stdout


@pytest.mark.parametrize("parameter, message", [
    (("sede", "3"), "Did you mean 'seed'"),
    (("eps", "8"), "Did you mean 8/255"),
    (("eps", "-0.1"), "pixel units"),
    (("eps", "abc"), "such as 8/255"),
    (("epochs", "0"), "at least 1"),
    (("variant", "segmnt"), "Did you mean 'segment'"),
    (("dataset", "cifar11"), "Did you mean 'cifar10'"),
], ids=lambda p: "=".join(p) if isinstance(p, tuple) else "")
def test_bad_parameters_stop_before_work(parameter, message, tmp_path):
    """papermill exits 1 with one clear error; a wrong dataset is found when the data is loaded, before any training."""
    path = ROOT / "notebooks" / "03_der_training.ipynb"
    done = subprocess.run([sys.executable, "-m", "papermill", str(path), str(tmp_path / "out.ipynb"), "-p", *parameter],
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr

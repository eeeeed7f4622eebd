"""What is stored in the notebooks, and how their parameters behave under papermill."""

import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = {"dataset", "data_dir", "download", "train_size", "model", "method", "regularizer",
         "variant", "weight", "eps", "epochs", "seed", "device"}  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestStored:
    @pytest.fixture
    def notebook(self, path):
        return nbformat.read(path, 4)

    @pytest.fixture
    def code(self, notebook):
        return [c for c in notebook.cells if c.cell_type == "code"]

    def test_is_valid_and_portable(self, path, notebook):
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3"
        for trace in (str(ROOT), str(Path.home()) + "/", "/tmp/"):
            assert trace not in path.read_text(), f"a path of the machine that ran it: {trace}"

    def test_every_cell_was_executed_and_every_check_passed(self, path, code):
        assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
        outputs = [o for c in code for o in c.outputs]
        assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
        verdicts = [s[:6] for o in outputs for s in o.get("text", "").splitlines()]
        assert verdicts.count("PASS  ") >= 3 and "FAIL  " not in verdicts

    def test_cells_are_short_and_end_with_summary_and_exercises(self, path, notebook, code):
        lines = sorted(len(c.source.splitlines()) for c in code)
        middle = 10 if path.stem == "00_from_scratch" else 8  # there everything is written out
        assert lines[-1] <= 22 and lines[len(lines) // 2] <= middle
        last = "\n".join(c.source for c in notebook.cells[-2:])
        assert all(word in last for word in ("Summary", "Exercises", "Hint", "Further reading"))

    def test_parameters_cell_is_what_papermill_reads(self, path, code):
        (cell,) = [c for c in code if "parameters" in c.metadata.get("tags", [])]
        for line in cell.source.splitlines():
            assert line.count("=") == 1 and ":" in line.split("=")[0] and "  # " in line
        names = {line.split(":")[0] for line in cell.source.splitlines()}
        seen = papermill.inspect_notebook(str(path))
        wanted = {"eps", "steps", "seed"} if path.stem == "00_from_scratch" else NAMES
        assert set(seen) == names >= wanted and all(p["help"] for p in seen.values())


@pytest.mark.parametrize("name, value, message", [
    ("sede", "3", "Did you mean 'seed'"), ("dataset", "cifar11", "Did you mean 'cifar10'")])
def test_bad_parameters_stop_before_work(name, value, message, tmp_path):
    """papermill exits 1 with one clear error; a wrong data set is found before any training."""
    notebook, out = ROOT / "notebooks/03_der_training.ipynb", tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", notebook, out, "-p", name, value]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and message in done.stderr

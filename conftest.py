"""Settings for notebooks/ and tests/: a private DERKIT_HOME, no progress bars, and what nbval
leaves uncompared."""

import os
import shutil
import tempfile

os.environ["TQDM_DISABLE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: more threads than cores would crawl
    os.environ.setdefault("OMP_NUM_THREADS", "1")
_HOME = tempfile.mkdtemp(prefix="derkit-pytest-")
os.environ["DERKIT_HOME"] = _HOME  # kernels inherit it: every session starts without earlier runs


def pytest_collectstart(collector):
    """nbval compares printed text; warnings, rich displays and how many pictures a film has may
    differ between machines."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr", "text/html", "image/svg+xml", "application/pdf")
        collector.sanitize_patterns[r"<Figure size .*>"] = "<Figure>"


def pytest_unconfigure(config):
    shutil.rmtree(_HOME, ignore_errors=True)

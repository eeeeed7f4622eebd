"""pyproject.toml and environment.yml are in step, and what the package imports is declared."""

import ast
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import derkit

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
THROUGH_OTHERS = {
    "PIL": "torchvision",
    "IPython": "ipykernel",
    "nbformat": "nbclient",
}  # import name -> the package that brings it


def names(requirements):
    return {re.match(r"[A-Za-z0-9_.-]+", r)[0].lower().replace("-", "_") for r in requirements}


def imported(path, top_level_only):
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"derkit"}


def test_environment_yml_is_thin_and_in_step():
    """Names and floors stand in pyproject.toml only; conda brings Python and pip."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment == dict(
        name=PROJECT["name"],
        channels=["conda-forge"],
        dependencies=[f"python{PROJECT['requires-python']}", "pip", {"pip": ["-e .[all]"]}],
    )


def test_all_is_the_union_of_the_extras():
    """All but those that are installed by hand."""
    (everything,) = EXTRAS["all"]
    assert (
        set(re.match(r"derkit\[(.*)\]", everything)[1].split(","))
        == set(EXTRAS) - {"all", "grid", "browser"}
        == {"notebook", "test", "eval", "peers"}
    )


def test_floors_without_upper_pins():
    requirements = [*PROJECT["dependencies"], *(r for name, extra in EXTRAS.items() if name != "all" for r in extra)]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+>=[0-9.]+", r) for r in requirements), requirements
    assert len(names(requirements)) == len(requirements)
    assert len(PROJECT["dependencies"]) <= 8 and "torchattacks" not in names(requirements)


@pytest.mark.parametrize("path", sorted((ROOT / "derkit").glob("*.py")), ids=lambda p: p.stem)
def test_imports_are_declared(path):
    """Top-level imports are core dependencies; those inside functions may come from an extra."""
    core = names(PROJECT["dependencies"])
    assert imported(path, True) <= core
    extras = core | names(r for extra in EXTRAS.values() for r in extra)
    for name in imported(path, False):
        assert THROUGH_OTHERS.get(name, name.lower()) in extras | {"ipywidgets"}, name


def test_tests_import_nothing_undeclared():
    """Oracles are optional: they are reached through importorskip only."""
    declared = names(PROJECT["dependencies"]) | names(r for extra in EXTRAS.values() for r in extra)
    local = {p.stem for p in (ROOT / "tests").glob("*.py")} | {"tests"}
    for path in (ROOT / "tests").glob("*.py"):
        assert {THROUGH_OTHERS.get(n, n.lower()) for n in imported(path, False)} <= declared | local, path.name


def test_version_and_package_data():
    assert derkit.__version__ == PROJECT["version"] == version("derkit")
    text = (ROOT / "pyproject.toml").read_text()
    assert 'derkit = ["assets/*"]' in text and (ROOT / "derkit" / "assets" / "fashion_mini.npz").is_file()


def test_notebook_runs_are_private(request):
    """The top-level conftest gives notebook kernels a fresh DERKIT_HOME, no bars, and leaves stderr uncompared."""
    source = (ROOT / "conftest.py").read_text()
    for word in (
        'os.environ["DERKIT_HOME"]',
        'os.environ["TQDM_DISABLE"] = "1"',
        "pytest_collectstart",
        '"stderr"',
        '"text/html"',
    ):
        assert word in source
    plugin = next(
        p
        for p in request.config.pluginmanager.get_plugins()
        if getattr(p, "__file__", None) == str(ROOT / "conftest.py")
    )

    class Collector:
        skip_compare = ("metadata",)

    collector = Collector()
    plugin.pytest_collectstart(collector)
    assert set(collector.skip_compare) == {"metadata", "stderr", "text/html", "image/svg+xml", "application/pdf"}
    plugin.pytest_collectstart(object())  # other collectors pass through

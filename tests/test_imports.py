"""Data flows one way: the import order of the core, no cycles, a quick import."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import derkit

PACKAGE = Path(derkit.__file__).parent
MODULES = {p.stem: p for p in PACKAGE.glob("*.py") if p.stem != "__init__"}
ORDER = [  # each module imports from lines above its own only
    {"errors", "progress", "schedules", "alarms", "presets"},
    {"config", "data_sources", "augment", "distributed"},
    {"data", "records", "cli", "device", "sync_bn"},
    {"models"},
    {"energy", "checkpoint"},
    {"run_folders"},
    {"attack_losses"},
    {"attacks"},
    {"losses", "evaluation"},
    {"regularizers", "reports"},
    {"training"},
]
RANK = {name: i for i, names in enumerate(ORDER) for name in names}


def imports(path):
    """Names of derkit modules that a file imports when it is imported (not inside functions or under __main__)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "derkit":
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("derkit."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("derkit.")}
    return found


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def test_the_walk_sees_imports():
    assert {"losses", "records", "config", "reports"} <= GRAPH["training"] and "energy" in GRAPH["attacks"]


def test_core_modules_exist():
    assert set(RANK) <= set(MODULES)


@pytest.mark.parametrize("name", sorted(RANK))
def test_imports_point_upwards(name):
    """Core modules import only core modules, and only from the lines above."""
    for other in GRAPH[name]:
        assert other in RANK, f"{name} imports {other}, which stands above the core"
        assert RANK[other] < RANK[name], f"{name} imports {other}"


def test_no_cycles_and_nothing_unknown():
    assert set().union(*GRAPH.values()) <= set(MODULES)
    list(TopologicalSorter(GRAPH).static_order())  # CycleError


@pytest.mark.parametrize("name", sorted(MODULES))
def test_clean_source(name):
    """No star imports, no hard-wired device, no relative imports, a docstring on top."""
    text = MODULES[name].read_text()
    tree = ast.parse(text)
    assert ".cuda(" not in text and 'to("cuda")' not in text
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and all(a.name != "*" for a in node.names)


def test_import_is_lazy_and_every_public_name_is_there():
    code = "import sys, derkit; assert 'torch' not in sys.modules; [getattr(derkit, n) for n in derkit.__all__]"
    result = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert set(derkit.__all__) <= set(dir(derkit))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        derkit.nothing  # noqa: B018

"""The cut of the package: layers, where heavy imports may stand, sizes. Design rules as tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "orchestrator"

# A module's layer; a name ending in ".*" stands for all modules of a package and the package.
LAYERS = {
    "config": 0,
    "decisions": 0,
    "jitter": 0,
    "retries": 0,
    "checkpoint.manifest": 0,
    "checkpoint.retention": 0,
    "waits": 1,
    "communicators.*": 1,
    "launching.*": 1,
    "storage": 1,
    "kubernetes.settings": 0,
    "kubernetes.*": 1,
    "cluster": 2,
    "jobs": 2,
    "flags": 2,
    "times": 2,
    "gradients": 2,
    "optimizer": 2,
    "losses": 2,
    "empty_parts": 2,
    "statistics": 2,
    "mirrored": 2,
    "metrics": 2,
    "additive": 2,
    "watch": 2,
    "sources.*": 2,
    "data": 2,
    "weights": 2,
    "events": 2,
    "steps": 2,
    "backends": 2,
    "agreement": 2,
    "deadline": 2,
    "faults": 2,
    "fitting": 2,
    "handshake": 2,
    "checkpoint.*": 2,
    "resume.training": 3,
    "resume.settings": 0,
    "resume.*": 2,
    "preemption": 2,
    "runtime": 3,
    "evaluation": 3,
    "restoring": 3,
    "callbacks.*": 4,
    "parts": 5,
    "run_directory": 5,
    "training": 5,
    "doctor.*": 5,
    "cli": 6,
    "cli_kubernetes": 6,
}
ONLY_IN = {"horovod": "communicators.horovod", "mpi4py": "communicators.mpi"}


def module_name(path: Path) -> str:
    """`communicators.base` for orchestrator/communicators/base.py; `callbacks` for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = {name for name, path in SOURCES.items() if path.name == "__init__.py"}


def layer(module: str) -> int:
    for pattern, number in LAYERS.items():
        stem = pattern.removesuffix(".*")
        if module == stem or (pattern.endswith(".*") and module.startswith(stem + ".")):
            return number
    raise AssertionError(f"orchestrator.{module} has no layer: give it one here and in DESIGN.md")


def imported_names(path: Path, module: str) -> list[tuple[str, str]]:
    """Every import anywhere in a file, as (module, name or "")."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it absolute"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def own_imports(module: str) -> set[str]:
    """The modules of orchestrator that one imports; "" is the top package's own names."""
    result = set()
    for source, name in imported_names(SOURCES[module], module):
        if source != "orchestrator" and not source.startswith("orchestrator."):
            continue
        source = source.removeprefix("orchestrator").lstrip(".")
        child = f"{source}.{name}".lstrip(".")
        result.add(child if child in SOURCES else source)
    return result


MODULES = sorted(set(SOURCES) - {""})


def test_the_walk_sees_imports():
    assert {"config", "runtime", "training", "callbacks.monitor"} <= set(MODULES)
    assert "communicators.base" in own_imports("runtime")
    assert "storage" in own_imports("training")
    assert "callbacks" in own_imports("training")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_or_sideways(module):
    upward = {other for other in own_imports(module) - {""} if layer(other) > layer(module)}
    assert not upward, f"orchestrator.{module} imports from a layer above: {upward}"


def test_no_cycles():
    state: dict[str, str] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != "open", f"import cycle: {' -> '.join((*path, module))}"
        if module in state:
            return
        state[module] = "open"
        for other in sorted(own_imports(module) - {""}):
            visit(other, (*path, module))
        state[module] = "done"

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_its_own_package(module):
    own = module if module in PACKAGES else module.rpartition(".")[0]
    names = own_imports(module)
    assert "" not in names, f"orchestrator.{module} imports a public name from orchestrator"
    if module not in PACKAGES:
        assert own not in names, f"orchestrator.{module} imports from its package's __init__"


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_launcher_libraries_in_one_file_only(library):
    users = {
        module
        for module, path in SOURCES.items()
        for source, _ in imported_names(path, module)
        if source.split(".")[0] == library
    }
    assert users == {ONLY_IN[library]}


def test_decisions_and_config_know_no_framework():
    for module in ("config", "decisions"):
        tops = {source.split(".")[0] for source, _ in imported_names(SOURCES[module], module)}
        assert not tops & {"keras", "tensorflow", "fsspec"}, (module, tops)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_small_files_and_functions(module):
    text = SOURCES[module].read_text(encoding="utf-8")
    assert sum(1 for line in text.splitlines() if line.strip()) < 300, "split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            has_docstring = ast.get_docstring(node) is not None and len(node.body) > 1
            begin = node.body[1].lineno if has_docstring else first.lineno
            assert (node.end_lineno or 0) - begin + 1 <= 50, f"{node.name} has over 50 lines"


def test_importing_the_package_touches_nothing():
    script = """
import sys, logging, warnings
handlers, level = list(logging.root.handlers), logging.root.level
import orchestrator
for name in ("tensorflow", "keras", "horovod", "mpi4py", "numpy"):
    assert name not in sys.modules, name
assert logging.root.handlers == handlers and logging.root.level == level
assert not any(n.startswith("orchestrator") for n in logging.root.manager.loggerDict)
assert set(orchestrator.__all__) >= {"init", "evaluate", "callbacks", "train"}
try:
    orchestrator.nonesuch
except AttributeError as error:
    assert "nonesuch" in str(error)
else:
    raise AssertionError("no AttributeError")
print("quiet")
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "quiet\n"
    assert result.stderr == ""


def test_every_public_name_resolves():
    import orchestrator

    for name in orchestrator.__all__:
        assert getattr(orchestrator, name) is not None

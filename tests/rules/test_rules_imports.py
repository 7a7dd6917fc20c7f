"""Imports go one way, no method imports another, and what must be light to import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from mixtura.authoring.rooms import levels
from mixtura.methods import METHODS_DIR, PACKAGE_DIR, kinds

KINDS = {kind.name for kind in kinds()}
LEVELS = levels()
MODULES = sorted(PACKAGE_DIR.rglob("*.py"))
MOST_ENTRIES = 20


def part_of(path: Path) -> str:
    """The part of mixtura a file belongs to: its first folder, or its own name."""
    return path.relative_to(PACKAGE_DIR).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The modules of mixtura that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module or ""}
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "mixtura"}
    return {name for name in found if name.startswith("mixtura.")}


def name_of(path: Path) -> str:
    """The module that a file is."""
    parts = path.relative_to(PACKAGE_DIR).with_suffix("").parts
    return ".".join(("mixtura", *parts)).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE_DIR)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        assert not imports_of(path), "mixtura itself imports its parts when they are first used"
        return
    if part == "__main__":
        return
    assert part in LEVELS, f"{part} is a new room of mixtura: enter it in authoring/rooms.py"
    for name in imports_of(path):
        other = name.split(".")[1]
        if other in LEVELS and other != part:
            assert LEVELS[other] < LEVELS[part], f"{path.name} imports {name}, whose room is not below {part}"


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {name_of(path): path for path in MODULES}
    graph = {name: named(path, files.keys()) for name, path in files.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("files import each other in a circle: " + " -> ".join(reversed(error.args[1])))


def named(path: Path, modules: Set[str]) -> set[str]:
    """The modules that a file's imports name, each as far down as there is a file of that name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module or "" for name in inner}
    return found & modules


def test_the_package_fits_on_one_screen() -> None:
    shown = [path for path in PACKAGE_DIR.iterdir() if not path.name.startswith("__pycache__")]
    assert len(shown) <= MOST_ENTRIES, "a room holds what is for the same thing: find the one this belongs to"
    rooms = {path.stem for path in shown if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__main__"} == set(LEVELS)


def test_tests_mirror_the_rooms() -> None:
    tests = Path(__file__).parents[1]
    for folder in {path.parent for path in tests.rglob("test_*.py")} - {tests, tests / "rules"}:
        assert (PACKAGE_DIR / folder.relative_to(tests)).is_dir(), f"{folder} tests no folder of the package"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_method_imports_another(kind: str) -> None:
    for path in (METHODS_DIR / kind).glob("*.py"):
        for name in imports_of(path):
            parts = name.split(".")
            if parts[1] == "methods" and len(parts) > 3 and parts[2] in KINDS:
                assert parts[3].startswith("_"), f"{path.name} imports the method {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE_DIR)))
def test_what_a_kind_shares_is_its_own(path: Path) -> None:
    for name in imports_of(path):
        parts = name.split(".")
        if parts[1] == "methods" and len(parts) > 3 and parts[2] in KINDS and parts[3].startswith("_"):
            owner = METHODS_DIR / parts[2]
            assert path.parent == owner, f"{name} is for {parts[2]}: share it in a file beside the folder"


@pytest.mark.parametrize(
    "module", ["mixtura", "mixtura.errors", "mixtura.methods.settings", "mixtura.methods", "mixtura.cli"]
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'tokenizers', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


QUIET = """
import importlib, os, random, socket, sys
os.environ = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH")}
# What is not ours first: importing rich, for one, draws from Python's generator.
import accelerate, numpy, rich.console, rich.progress, torch, transformers, typer

def state():
    return repr((random.getstate(), numpy.random.get_state(), torch.get_rng_state().tolist()))

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        raise AssertionError(f"importing {current} does {event} {arguments}")

before, grad, threads = state(), torch.is_grad_enabled(), torch.get_num_threads()
os.chdir("/")
sys.addaudithook(refuse)
for current in sys.argv[1:]:
    importlib.import_module(current)
    assert state() == before, f"importing {current} changes a global random generator"
assert (torch.is_grad_enabled(), torch.get_num_threads()) == (grad, threads)
assert torch.get_default_dtype() == torch.float32
"""


@pytest.mark.slow
def test_importing_anything_is_quiet() -> None:
    names = [".".join(("mixtura", *path.relative_to(PACKAGE_DIR).with_suffix("").parts)) for path in MODULES]
    importable = [name.removesuffix(".__init__") for name in names if not name.endswith(".__main__")]
    done = subprocess.run(
        [sys.executable, "-c", QUIET, *importable], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""

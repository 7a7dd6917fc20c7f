"""Imports go one way, no method imports another, and what must be light to import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from sources import MODULES, name_of, nodes_of

from mixtura.authoring.rooms import levels
from mixtura.methods import METHODS_DIR, PACKAGE_DIR, kinds

KINDS = {kind.name for kind in kinds()}
LEVELS = levels()
MOST_ENTRIES = 20


def part_of(path: Path) -> str:
    """The part of mixtura a file belongs to: its first folder, or its own name."""
    return path.relative_to(PACKAGE_DIR).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The modules of mixtura that a file imports, wherever in the file."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module or ""}
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "mixtura"}
    return {name for name in found if name.startswith("mixtura.")}


def module_of(path: Path) -> str:
    """The module that a file is."""
    parts = path.relative_to(PACKAGE_DIR).with_suffix("").parts
    return ".".join(("mixtura", *parts)).removesuffix(".__init__")


def imported_upwards(path: Path) -> list[str]:
    """What a file imports from rooms that are not below its own."""
    part = part_of(path)
    if part == "__init__":
        return [f"mixtura imports {name} at once, not when it is first used" for name in imports_of(path)]
    if part == "__main__":
        return []
    if part not in LEVELS:
        return [f"{part} is a new room of mixtura: enter it in authoring/rooms.py"]
    others = {name: name.split(".")[1] for name in imports_of(path)}
    above = [
        name for name, other in others.items() if other != part and LEVELS.get(other, -1) >= LEVELS[part]
    ]
    return [f"{name_of(path)} imports {name}, whose room is not below {part}" for name in above]


def test_imports_go_one_way() -> None:
    assert [found for path in MODULES for found in imported_upwards(path)] == []


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {module_of(path): path for path in MODULES}
    graph = {name: named(path, files.keys()) for name, path in files.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("files import each other in a circle: " + " -> ".join(reversed(error.args[1])))


def named(path: Path, modules: Set[str]) -> set[str]:
    """The modules that a file's imports name, each as far down as there is a file of that name."""
    found = set()
    for node in nodes_of(path):
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


def kind_and_file(name: str) -> tuple[str, str] | None:
    """The kind and the file in its folder that an import names, if it does."""
    parts = name.split(".")
    return (parts[2], parts[3]) if parts[1] == "methods" and len(parts) > 3 and parts[2] in KINDS else None


def test_no_method_imports_another() -> None:
    found = []
    for path in (path for kind in sorted(KINDS) for path in (METHODS_DIR / kind).glob("*.py")):
        named_here = {name: kind_and_file(name) for name in imports_of(path)}
        other = [name for name, place in named_here.items() if place and not place[1].startswith("_")]
        found += [f"{name_of(path)} imports the method {name}" for name in other]
    assert found == []


def test_what_a_kind_shares_is_its_own() -> None:
    found = []
    for path in MODULES:
        for name in imports_of(path):
            place = kind_and_file(name)
            if place and place[1].startswith("_") and path.parent != METHODS_DIR / place[0]:
                found.append(f"{name_of(path)} imports {name}: share it in a file beside the folder")
    assert found == []


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

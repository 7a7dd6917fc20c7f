"""Imports go one way, no method imports another, and what must be light to import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mixtura.methods import METHODS_DIR, PACKAGE_DIR, kinds

KINDS = {kind.name for kind in kinds()}

# Each part may import those of its own line and of the lines above. A new part is entered here.
LAYERS = (
    {"errors", "units", "kept", "control_groups"},
    {"settings", "routing", "types", "digest", "tokenizer"},
    {"method", "trace"},
    KINDS,
    {"kernels"},
    {"layer"},
    {"modeling", "model"},
    {"view", "viewing", "packed", "nesting"},
    {"skeleton", "stores", "data", "summary", "applying", "contracts", "rerouting"},
    {"apply", "loading", "stream"},
    {"observe", "observing", "memory", "generation", "report"},
    {"fit", "fitting", "train", "arena", "specimen", "resolve", "scaffold", "docs"},
    {"cli"},
)
LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MODULES = sorted(PACKAGE_DIR.rglob("*.py"))


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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE_DIR)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        assert not imports_of(path), "mixtura itself imports its parts when they are first used"
        return
    assert part in LEVELS, f"{part} is a new part of mixtura: enter it in LAYERS here"
    for name in imports_of(path):
        other = name.split(".")[1]
        if other in LEVELS:
            assert LEVELS[other] <= LEVELS[part], f"{path.name} imports {name}, which lies above {part}"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_method_imports_another(kind: str) -> None:
    for path in (METHODS_DIR / kind).glob("*.py"):
        for name in imports_of(path):
            parts = name.split(".")
            if parts[1] in KINDS and len(parts) > 2:
                assert parts[2].startswith("_"), f"{path.name} imports the method {name}"
            if path.name.startswith("_") and parts[1] in KINDS:
                assert parts[1] == kind, f"{path} imports {name} of another kind"


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

"""The catalogue: a kind is a folder, a method is a file in it, its name is the file's name.

Nothing lists the methods: adding ``mixtura/methods/routers/my_router.py`` adds the router ``my_router``.
What a listing shows is read from the file's text (a literal ``METHOD`` and the docstring), so it
imports neither PyTorch nor the method. Packages outside mixtura add methods through entry points
of the group ``mixtura.<kind>`` (``my_router = "their_package.my_router"``: a module of the method's
name), and the commands take a path to a file as well.

A method's file holds::

    METHOD = {"paper": 145, "title": "...", "tags": ["..."], "gaps": {"check_...": "why"}}

``paper`` is the id in the project's list of papers (or None) and ``title`` its title. ``tags``, what
the method promises or needs, and ``gaps``, the checks of its contract it is known to fail and why,
may be left out. The class's docstring has the sections ``Shapes`` and ``Example``; ``Raises`` where a setting
can be out of range or something else is refused; ``Differences from the paper`` and ``Reference`` where there
is a paper; and others that it needs (``Cost``, where a router takes more than twice top-k's time). What there
is nothing to say of is left out. Its settings are the keyword-only arguments of its constructor.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, final

from mixtura.errors import UnknownNameError, UserError
from mixtura.methods.settings import construct, fits

METHODS_DIR = Path(__file__).resolve().parent
PACKAGE_DIR = METHODS_DIR.parent
_HEADER_TYPES: dict[str, Any] = {"paper": int | None, "title": str, "tags": list, "gaps": dict}


@final
@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of method: its folder, its abstract class, one line on what it does, and what its tags mean."""

    name: str
    base: str
    summary: str
    tags: Mapping[str, str] = field(default_factory=dict)

    def explain(self, tag: str) -> str | None:
        """What a tag of a method of this kind means, or None if the kind has no such tag.

        ``reads:x`` and the like are found under ``reads:FIELD``: what is written in capitals stands for any.
        """
        if tag in self.tags:
            return self.tags[tag]
        prefix, _, field = tag.partition(":")
        any_field = [t for t in self.tags if t.startswith(f"{prefix}:") and t.rpartition(":")[2].isupper()]
        return self.tags[any_field[0]] if field and any_field else None

    @property
    def singular(self) -> str:
        """The kind's name as a user types it for one method: ``routers`` is a ``router``."""
        return self.name.removesuffix("s") if not self.name.endswith("yses") else self.name[:-2] + "is"


@final
@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a method as its file writes it: name, type and default."""

    name: str
    type: str
    default: str


@final
@dataclass(frozen=True, slots=True)
class Header:
    """What a method's file says of itself, read without importing it."""

    kind: str
    name: str
    path: Path
    summary: str
    doc: str
    paper: int | None
    title: str
    tags: tuple[str, ...] = ()
    gaps: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()

    @property
    def sections(self) -> dict[str, str]:
        """The docstring by section; what stands before the first section is under ``""``."""
        parts = re.split(r"^([A-Z][\w ]*):\n(?=[ \n])", self.doc, flags=re.MULTILINE)
        named = dict(zip(parts[1::2], parts[2::2], strict=True))
        return {"": parts[0].strip()} | {name: inspect.cleandoc("\n" + text) for name, text in named.items()}

    def to_dict(self) -> dict[str, Any]:
        """The header as the JSON object `mixtura methods --json` prints."""
        return {
            "kind": self.kind,
            "name": self.name,
            "paper": self.paper,
            "title": self.title,
            "summary": self.summary,
            "tags": list(self.tags),
        }


def class_name(method_name: str) -> str:
    """The name of a method's class: its file name in CamelCase.

    >>> class_name("round_to_nearest")
    'RoundToNearest'
    """
    return "".join(part[:1].upper() + part[1:] for part in method_name.split("_"))


def _literal(tree: ast.Module, name: str) -> Any:
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        if any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
            return ast.literal_eval(node.value)
    return None


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a Python file that can be read: {error}") from None


@cache
def _kinds() -> dict[str, Kind]:
    found = {}
    for folder in sorted(METHODS_DIR.iterdir()):
        init = folder / "__init__.py"
        if not init.is_file():
            continue
        declared = _literal(_parse(init), "KIND")
        if declared is not None:
            found[folder.name] = Kind(
                folder.name, declared["base"], declared["summary"], declared.get("tags", {})
            )
    return found


def kinds() -> tuple[Kind, ...]:
    """Every kind of method, by name."""
    return tuple(_kinds().values())


def kind(name: str) -> Kind:
    """The kind called `name`, in the plural or the singular.

    Raises:
        UnknownNameError: there is no such kind.
    """
    for candidate in kinds():
        if name in (candidate.name, candidate.singular):
            return candidate
    raise UnknownNameError("kind of method", name, [k.name for k in kinds()])


@cache
def _entry_points(kind_name: str) -> dict[str, EntryPoint]:
    own = set(own_names(kind_name))
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=f"mixtura.{kind_name}"):
        if point.name in own or point.name in found:
            raise UserError(
                f"two {kind_name} are named {point.name!r} ({point.value} and another); rename one of them"
            )
        if point.module.rpartition(".")[2] != point.name:
            raise UserError(
                f"the entry point {point.name!r} of mixtura.{kind_name} must be a module of that name, "
                f"got {point.value!r}"
            )
        found[point.name] = point
    return found


def own_names(kind_name: str) -> tuple[str, ...]:
    """The methods of a kind that come with mixtura, by name."""
    folder = METHODS_DIR / kind(kind_name).name
    return tuple(sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith("_")))


def names(kind_name: str) -> tuple[str, ...]:
    """The methods of a kind by name, those of other packages included.

    Raises:
        UnknownNameError: there is no such kind.
        UserError: two packages offer methods of the same name.
    """
    found = kind(kind_name).name
    return tuple(sorted({*own_names(found), *_entry_points(found)}))


def locate(name: str) -> Header:
    """The header of the method called ``name`` of whatever kind, or written as ``kind/name``.

    >>> locate("lru").kind, locate("pruner/random").kind
    ('caches', 'pruners')

    Raises:
        UnknownNameError: no method has that name.
        UserError: methods of several kinds have it.
    """
    kind_name, slash, rest = name.partition("/")
    if slash:
        return header(kind_name, rest)
    found = [k.name for k in kinds() if name in names(k.name)]
    if not found:
        raise UnknownNameError("method", name, {n for k in kinds() for n in names(k.name)})
    if len(found) > 1:
        choices = " or ".join(f"{k}/{name}" for k in found)
        raise UserError(f"{len(found)} kinds have a method named {name!r}; write {choices}")
    return header(found[0], name)


def _path_of(kind_name: str, name: str) -> Path:
    if name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise UserError(f"there is no file {name}; give a method's name or the path of its .py file")
        return path
    if name in own_names(kind_name):
        return METHODS_DIR / kind_name / f"{name}.py"
    points = _entry_points(kind_name)
    if name in points:
        return _module_path(points[name].module)
    raise UnknownNameError(kind(kind_name).singular.replace("_", " "), name, names(kind_name))


def _module_path(module: str) -> Path:
    """The file of another package's module, found without importing that package."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = next((p for f in folders if (p := Path(f, *rest).with_suffix(".py")).is_file()), None)
    if path is None and spec is not None and spec.origin is not None and not rest:
        path = Path(spec.origin)
    if path is None:
        raise UserError(f"there is no module {module}, which an entry point names; reinstall {top}")
    return path


def header(kind_name: str, name: str) -> Header:
    """What the file of a method says of itself, without importing it.

    Raises:
        UnknownNameError: no such kind or method.
        UserError: the file has no literal METHOD, or one with wrong keys.
    """
    found = kind(kind_name).name
    path = _path_of(found, name)
    written = path.stat()
    return _header(found, path, written.st_mtime_ns, written.st_size)


# Adapters ask for their method's tags at every matrix of a model.
@lru_cache(maxsize=1024)
def _header(kind_name: str, path: Path, mtime_ns: int, num_bytes: int) -> Header:
    """The header of a file that was written then, with so many bytes."""
    tree = _parse(path)
    try:
        declared = _literal(tree, "METHOD")
    except ValueError:
        raise UserError(f"METHOD in {path} must be a literal of strings, numbers, lists and dicts") from None
    if not isinstance(declared, dict) or not {"paper", "title"} <= set(declared) <= set(_HEADER_TYPES):
        raise UserError(
            f"{path} needs a literal METHOD = {{...}} with paper and title, and at most tags and gaps beside"
        )
    for key, wanted in _HEADER_TYPES.items():
        if key in declared and not fits(declared[key], wanted):
            wanted_name = getattr(wanted, "__name__", str(wanted))
            raise UserError(f"{key!r} of METHOD in {path} must be {wanted_name}, got {declared[key]!r}")
    node = _class_node(tree, path)
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    return Header(
        kind=kind_name,
        name=path.stem,
        path=path,
        summary=doc.strip().splitlines()[0] if doc.strip() else "",
        doc=doc,
        paper=declared["paper"],
        title=declared["title"],
        tags=tuple(declared.get("tags", ())),
        gaps=MappingProxyType(declared.get("gaps", {})),
        settings=_settings_of(node),
    )


def _class_node(tree: ast.Module, path: Path) -> ast.ClassDef:
    wanted = class_name(path.stem)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == wanted:
            return node
    raise UserError(f"{path} must define the class {wanted}: the file's name in CamelCase")


def _settings_of(node: ast.ClassDef) -> tuple[Setting, ...]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            pairs = zip(item.args.kwonlyargs, item.args.kw_defaults, strict=True)
            return tuple(
                Setting(
                    argument.arg,
                    ast.unparse(argument.annotation) if argument.annotation else "",
                    ast.unparse(default) if default else "",
                )
                for argument, default in pairs
            )
    return ()


def load_method(kind_name: str, name: str) -> type[Any]:
    """Import a method's class by kind and name, or by the path of its file.

    Raises:
        UnknownNameError: no such kind or method.
        UserError: the file cannot be imported, or does not define the class its name asks for,
            derived from the kind's base.
    """
    found = header(kind_name, name)
    family = kind(kind_name)
    if found.path.parent == METHODS_DIR / family.name:
        module = import_module(f"mixtura.methods.{family.name}.{found.name}")
    elif not name.endswith(".py"):
        module = import_module(_entry_points(family.name)[name].module)
    else:
        module = import_file(found.path)
    cls = getattr(module, class_name(found.name))
    base = base_class(family.name)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        wanted = f"mixtura.methods.{family.name}.{family.base}"
        raise UserError(f"{found.path} must define a class {class_name(found.name)} derived from {wanted}")
    return cls


def declared_tags(cls: type[Any]) -> frozenset[str]:
    """The tags that the file of a method's class declares.

    >>> from mixtura.methods.caches.lru import Lru
    >>> declared_tags(Lru)
    frozenset()
    """
    return frozenset(getattr(sys.modules[cls.__module__], "METHOD", {}).get("tags", ()))


def base_class(kind_name: str) -> type[Any]:
    """The abstract class that every method of a kind derives from."""
    family = kind(kind_name)
    base: type[Any] = getattr(import_module(f"mixtura.methods.{family.name}"), family.base)
    return base


def import_file(path: Path) -> ModuleType:
    """The module of a user's own file.

    Raises:
        UserError: it is no Python file, or running it fails.
    """
    spec = spec_from_file_location(f"mixtura_outside_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be imported as a Python module; give a .py file")
    module = module_from_spec(spec)
    # Dataclasses and type hints look their module up by name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UserError(f"importing {path} failed: {type(error).__name__}: {error}") from error
    return module


def create(kind_name: str, name: str, /, *args: Any, **given: Any) -> Any:
    """Construct a method by kind and name; settings by keyword.

    >>> create("quantizers", "round_to_nearest", bits=4).bits
    4

    Raises:
        UnknownNameError: no such kind or method.
        SettingError: a setting is unknown, of the wrong type or out of range.
    """
    return construct(load_method(kind_name, name), *args, **given)

"""Starting a new method: a file that already keeps its kind's contract, to be changed from there."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from mixtura.errors import OutputError, UserError
from mixtura.methods import Kind, class_name, kind, names

_TEMPLATES = Path(__file__).parent / "templates"
_TEST = "test"


def new_method(kind_name: str, name: str, out: Path | None = None) -> tuple[Path, ...]:
    """Write the file of a new method, and in a checkout of mixtura its test too.

    Args:
        kind_name: the kind, in the plural or the singular.
        name: the method's name in snake_case; its class has it in CamelCase.
        out: the folder to write to. By default the kind's own in a checkout of mixtura, else the
            current one.

    Returns:
        The files written, the method's first.

    Raises:
        UserError: the name is no name, or there is a method of that name.
        OutputError: a file is there already, or the folder cannot be written.
    """
    family = kind(kind_name)
    _check_name(family, name)
    files = {_folder(family, out) / f"{name}.py": family.name}
    checkout = _checkout(Path.cwd())
    if out is None and checkout is not None:
        files[checkout / "tests" / "methods" / family.name / test_file_name(family, name)] = _TEST
    for path in files:
        if path.exists():
            raise OutputError(f"{path} is there already and is left as it is; choose another name")
    for path, template in files.items():
        _write(path, template, family, name)
    return tuple(files)


def test_file_name(family: Kind, name: str) -> str:
    """The name of the file of a method's own tests: the kind is in it, as names differ only within one."""
    return f"test_{family.singular}_{name}.py"


def template(name: str) -> Template:
    """The template of a kind's method."""
    return Template((_TEMPLATES / f"{name}.txt").read_text(encoding="utf-8"))


def _check_name(family: Kind, name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise UserError(
            f"{name!r} is no name for a method; write it in snake_case, such as my_{family.singular}"
        )
    if name in names(family.name):
        raise UserError(f"there is a {family.singular} named {name!r} already; choose another name")


def _folder(family: Kind, out: Path | None) -> Path:
    checkout = _checkout(Path.cwd())
    if out is not None:
        return out
    return Path.cwd() if checkout is None else checkout / "src" / "mixtura" / "methods" / family.name


def _checkout(folder: Path) -> Path | None:
    """The root of the checkout of mixtura that ``folder`` is in, or None."""
    roots = (folder, *folder.parents)
    return next((root for root in roots if (root / "src/mixtura/methods/__init__.py").is_file()), None)


def _write(path: Path, template_name: str, family: Kind, name: str) -> None:
    words = {"kind": family.name, "singular": family.singular, "name": name, "class_name": class_name(name)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(template(template_name).substitute(words))
    except FileExistsError:
        raise OutputError(f"{path.parent} is not a folder; give --out another") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; give --out another folder") from None

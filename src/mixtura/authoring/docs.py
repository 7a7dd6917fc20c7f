"""The generated pages: one for every method, one for every kind, an index, and parts of other pages.

``python -m mixtura.authoring.docs`` writes them; with ``--check`` it writes nothing and fails if a page is
stale, missing or too many. Parts stand between ``<!-- NAME -->`` and ``<!-- end of NAME -->``: the README's
tree of rooms and the architecture's order of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mixtura.authoring import recipes, rooms
from mixtura.authoring.contracts import checks
from mixtura.methods import PACKAGE_DIR, Header, Kind, header, kinds, own_names

DOCS_DIR = PACKAGE_DIR.parents[1] / "docs"
_NOTE = "<!-- Written by `python -m mixtura.authoring.docs`; edit the source it names instead. -->"


def pages() -> dict[str, str]:
    """Every generated page by its path below the folder of docs."""
    made = {"methods/README.md": _index()}
    for kind in kinds():
        made[f"methods/{kind.name}/README.md"] = _kind_page(kind)
        for name in own_names(kind.name):
            made[f"methods/{kind.name}/{name}.md"] = _method_page(kind, header(kind.name, name))
    return made


def stale(folder: Path = DOCS_DIR) -> list[str]:
    """Pages that differ from what they should be, are missing, or belong to no method any more."""
    wanted = pages()
    there = {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in (folder / "methods").rglob("*.md")
    }
    for name in _PARTS:
        if (folder / name).is_file():
            there[name] = (folder / name).read_text(encoding="utf-8")
            wanted[name] = _with_parts(there[name], _PARTS[name])
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def write(folder: Path = DOCS_DIR) -> list[str]:
    """Write the pages that are stale and remove those that belong to nothing; say which."""
    wanted = pages()
    changed = stale(folder)
    for name in changed:
        path = folder / name
        if name in _PARTS:
            text = path.read_text(encoding="utf-8")
            path.write_text(_with_parts(text, _PARTS[name]), encoding="utf-8")
            continue
        if name not in wanted:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[name], encoding="utf-8")
    return changed


# Pages written by hand, by their path from the folder of docs, and what in them is generated.
_PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "../README.md": {"tree": lambda: f"```\n{rooms.tree()}\n```"},
    "architecture.md": {"order": lambda: f"`{rooms.order()}`"},
    "recipes.md": {"counts": recipes.counts, "sources": recipes.sources},
}


def _with_parts(text: str, parts: Mapping[str, Callable[[], str]]) -> str:
    for name, made in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if begin in text and end in text:
            before, _, rest = text.partition(begin)
            text = before + begin + made() + "\n" + end + rest.partition(end)[2]
    return text


def _index() -> str:
    lines = [_NOTE, "", "# Methods", ""]
    lines += ["A method is one file; [a new one](../architecture.md) needs no other file to be edited.", ""]
    for kind in kinds():
        lines += [f"## [{kind.name}]({kind.name}/README.md)", "", kind.summary, ""]
        lines += _table(kind, f"{kind.name}/")
    return "\n".join(lines).rstrip() + "\n"


def _kind_page(kind: Kind) -> str:
    lines = [_NOTE, "", f"# {kind.name}", "", kind.summary, "", *_table(kind, "")]
    if kind.tags:
        lines += ["## Tags", "", "| tag | meaning |", "|---|---|"]
        lines += [f"| `{tag}` | {_markdown(meaning)} |" for tag, meaning in kind.tags.items()]
        lines.append("")
    lines += ["## What each promises", "", "| check | promise |", "|---|---|"]
    for check in checks(kind.name):
        lines.append(f"| `{check.__name__}` | {_markdown(check.__doc__ or '').splitlines()[0]} |")
    one = kind.singular
    lines += ["", f"`mixtura check {one} NAME` runs them; `mixtura new {one} NAME` starts one."]
    return "\n".join(lines) + "\n"


def _table(kind: Kind, folder: str) -> list[str]:
    lines = ["| name | what it does | from |", "|---|---|---|"]
    for name in own_names(kind.name):
        found = header(kind.name, name)
        cells = (f"[{name}]({folder}{name}.md)", _markdown(found.summary), _origin(found))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _origin(method: Header) -> str:
    """What a method is from: the title of its paper, or of what has none, and the number in our list."""
    number = "" if method.paper is None else f" (paper {method.paper})"
    return _markdown(method.title) + number


def _method_page(kind: Kind, method: Header) -> str:
    sections = method.sections
    source = f"src/mixtura/methods/{kind.name}/{method.name}.py"
    lines = [_NOTE, "", f"# {method.name}", ""]
    lines += [f"A [{kind.singular.replace('_', ' ')}](README.md). {_origin(method)}.", ""]
    lines += [_markdown(sections[""]), "", "## Settings", "", *_settings(method), ""]
    for name, text in sections.items():
        if not name:
            continue
        body = f"```python\n{text}\n```" if name == "Example" else _markdown(text)
        lines += [f"## {name}", "", body, ""]
    lines += ["## Known gaps", ""]
    lines += [f"- `{check}`: {_markdown(why)}" for check, why in method.gaps.items()] or ["None."]
    if method.tags:
        lines += ["", "Tags: " + ", ".join(f"`{tag}`" for tag in method.tags)]
    lines += ["", f"Source: [{source}](../../../{source})"]
    return "\n".join(lines) + "\n"


def _settings(method: Header) -> list[str]:
    if not method.settings:
        return ["None."]
    rows = [f"| `{s.name}` | `{s.type}` | `{s.default}` |" for s in method.settings]
    return ["| name | type | default |", "|---|---|---|", *rows]


def _markdown(text: str) -> str:
    """Docstring text as Markdown."""
    return text.replace("``", "`").replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or with ``--check`` say which are stale."""
    parser = argparse.ArgumentParser(prog="python -m mixtura.authoring.docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    parser.add_argument("--out", type=Path, default=DOCS_DIR, help="the folder of docs")
    given = parser.parse_args(arguments)
    changed = stale(given.out) if given.check else write(given.out)
    for name in changed:
        print(f"{'stale' if given.check else 'wrote'} {given.out / name}")
    if given.check and changed:
        print("write them with: python -m mixtura.authoring.docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

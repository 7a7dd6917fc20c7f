"""YAML as people mean it: 1e-3 is a number, `on` and `no` are words, and no key is given twice.

PyYAML reads YAML 1.1, in which 1e-3 is a string, 010 is eight, 1:30 is ninety and `no` is false. Here plain
words are read by the core schema of YAML 1.2, with Python's underscores between digits besides.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from mixtura.errors import UserError

_TAG = "tag:yaml.org,2002:"
# What plain words are: the tag, how they are written, the characters they may begin with.
_WORDS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


def parse_yaml(text: str, what: str) -> Any:
    """The value that a YAML text holds.

    >>> parse_yaml("{rate: 1e-3, bf16: no, steps: 010, at: 1:30}", "this")
    {'rate': 0.001, 'bf16': 'no', 'steps': 10, 'at': '1:30'}

    Raises:
        UserError: PyYAML is not installed, or the text is not YAML or gives a key twice; names ``what``.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        raise UserError("reading YAML needs pyyaml; pip install 'mixtura[train]'") from None
    try:
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{what} is not YAML: {reason[:300]}") from None


@cache
def _loader() -> Any:
    """PyYAML's safe loader with these rules for plain words."""
    import yaml

    loader: Any = type("CoreLoader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": {}})
    for name, pattern, first in _WORDS:
        loader.add_implicit_resolver(f"{_TAG}{name}", re.compile(rf"^(?:{pattern})$"), first)
    loader.add_constructor(f"{_TAG}int", lambda self, node: _int(self.construct_scalar(node)))
    loader.add_constructor(f"{_TAG}map", _mapping)
    return loader


def _int(word: str) -> int:
    digits = word.replace("_", "")
    # Python knows 0o and 0x, but refuses a plain number that begins with 0.
    return int(digits, 0) if digits[:2] in ("0o", "0x") else int(digits)


def _mapping(loader: Any, node: Any) -> Any:
    """A mapping; PyYAML itself keeps the last of equal keys without a word."""
    from yaml.constructor import ConstructorError

    found: dict[Any, Any] = {}
    yield found
    words = [key for key, _ in node.value if isinstance(key.value, str) and key.tag != f"{_TAG}merge"]
    for place, key in enumerate(words):
        if (key.tag, key.value) in ((earlier.tag, earlier.value) for earlier in words[:place]):
            raise ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
    found.update(loader.construct_mapping(node))

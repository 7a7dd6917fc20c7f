"""The model card of a new checkpoint: what it was made from, by what plan, how it is loaded."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from huggingface_hub import ModelCardData, metadata_load

import mixtura
from mixtura.report.units import format_bytes
from mixtura.types import Plan, Quantize

_KEPT_METADATA = ("license", "license_name", "license_link", "language")
_SNAPSHOT = re.compile(r"models--(?P<repo>.+)")

_ORDINARY = """\
This is an ordinary checkpoint of its family; transformers and whatever else reads the family load it:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```
"""
_PACKED = """\
Its experts are stored in the mixtura format, so it is loaded with
mixtura and is a transformers model from then on:

```python
import mixtura

model = mixtura.load("{name}")
```

or used from the command line: `mixtura generate {name} "a prompt"`.
"""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a model card says. ``num_experts`` is by decoder layer, before any drop."""

    name: str
    source: Path
    source_name: str
    plan: Plan
    num_experts: dict[int, int]
    num_bytes_before: int
    num_bytes_after: int
    ordinary: bool


def name_of_source(source: Path) -> str:
    """A model's name for people: the hub's ``owner/name@revision`` of a cached model, else the folder's.

    >>> name_of_source(Path("/cache/models--allenai--OLMoE-1B-7B/snapshots/0123456789ab"))
    'allenai/OLMoE-1B-7B@0123456'
    >>> name_of_source(Path("/models/tiny"))
    'tiny'
    """
    # A link may have the cache's name, or lead into the cache.
    for path in (source.absolute(), source.resolve()):
        parts = path.parts
        if len(parts) > 3 and parts[-2] == "snapshots" and (match := _SNAPSHOT.fullmatch(parts[-3])):
            return f"{match['repo'].replace('--', '/')}@{parts[-1][:7]}"
    return source.resolve().name


def model_card(facts: CardFacts) -> str:
    """``README.md`` of the new checkpoint, the same text for the same facts."""
    load = (_ORDINARY if facts.ordinary else _PACKED).format(name=facts.name)
    lines = [
        "---",
        _metadata(facts),
        "---",
        "",
        f"# {facts.name}",
        "",
        f"Made from `{facts.source_name}` by mixtura "
        f"{mixtura.__version__}; the weights take {format_bytes(facts.num_bytes_after)} "
        f"instead of {format_bytes(facts.num_bytes_before)}. Nothing was trained.",
        "",
        "| experts | number |",
        "|---|---|",
        *(f"| {what} | {number} |" for what, number in _counts(facts)),
        "",
        *_dropped_lines(facts.plan),
        f"Every tensor outside the experts is the source's, byte for byte{_except_routers(facts.plan)}. "
        "`plan.json` says what was done to each expert.",
        "",
        "## Use",
        "",
        load,
        "## Source",
        "",
        f"- model: `{facts.source_name}`",
        f"- digest: `{facts.plan.source_digest}`",
        "- licence: the source's; its licence files are beside this one where it had any",
        "",
    ]
    return "\n".join(lines)


def _metadata(facts: CardFacts) -> str:
    kept: dict[str, Any] = {k: v for k, v in _source_metadata(facts.source).items() if k in _KEPT_METADATA}
    base, _, _ = facts.source_name.partition("@")
    if "/" in base:
        kept["base_model"] = base
    library = "transformers" if facts.ordinary else "mixtura"
    data = ModelCardData(library_name=library, tags=["mixture-of-experts", "mixtura"], **kept)
    return data.to_yaml().strip()


def _source_metadata(source: Path) -> dict[str, Any]:
    """What stands at the head of the source's card; nothing where there is none or it is not YAML."""
    card = source / "README.md"
    if not card.is_file():
        return {}
    try:
        found = metadata_load(card)
    except Exception:
        # A card that cannot be read says nothing about the weights; the licence files still go along.
        return {}
    return found if isinstance(found, dict) else {}


def _counts(facts: CardFacts) -> list[tuple[str, int]]:
    """How many experts were treated in which way, the commonest first."""
    total = sum(facts.num_experts.values())
    dropped = sum(len(experts) for experts in facts.plan.dropped().values())
    ways = Counter(_way(action) for action in facts.plan.quantized().values())
    rows = sorted(ways.items(), key=lambda item: (-item[1], item[0]))
    kept = total - dropped - sum(ways.values())
    return [*rows, ("kept as they were", kept), ("dropped", dropped), ("before", total)]


def _way(action: Quantize) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in sorted(action.settings.items()))
    return f"`{action.quantizer}` ({settings})" if settings else f"`{action.quantizer}`"


def _dropped_lines(plan: Plan) -> list[str]:
    lines = [
        f"- layer {layer}: {len(experts)} dropped ({', '.join(map(str, experts))})"
        for layer, experts in plan.dropped().items()
    ]
    return [*lines, ""] if lines else []


def _except_routers(plan: Plan) -> str:
    return ", but for the routers' entries of dropped ones" if plan.dropped() else ""

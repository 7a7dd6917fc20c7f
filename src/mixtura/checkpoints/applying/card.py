"""The model card of a new checkpoint: what it was made from, by what plan, how it is loaded."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from huggingface_hub import ModelCardData, metadata_load

import mixtura
from mixtura.report import counted, human_number, human_percent
from mixtura.report.units import format_bytes
from mixtura.types import Plan, Quantize, QuantizeMatrix

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
class MeasuredLoss:
    """What a result was measured to lose against its source.

    Attributes:
        kl: the Kullback-Leibler divergence to the source, in nats per token.
        kl_interval: its 95 % interval.
        same_token: the share of tokens for which both find the same one likeliest.
        perplexity: of the result.
        num_tokens: how many tokens of text that was.
        text: what the text was.
        chose: whether the plan was chosen by that text, so that on other text it may lose more.
        details: a sentence on where there is more of it.
    """

    kl: float
    kl_interval: tuple[float, float] | None = None
    same_token: float | None = None
    perplexity: float | None = None
    num_tokens: int | None = None
    text: str | None = None
    chose: bool = False
    details: str | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a model card says.

    ``num_experts`` is by decoder layer, before any drop. ``left_out`` are the beginnings of names of layers
    that did not go along. ``measured`` is how much was lost, if somebody measured it.
    """

    name: str
    source: Path
    source_name: str
    plan: Plan
    num_experts: dict[int, int]
    num_bytes_before: int
    num_bytes_after: int
    ordinary: bool
    left_out: tuple[str, ...] = ()
    measured: MeasuredLoss | None = None


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
        card_metadata(
            facts.source, facts.source_name, library="transformers" if facts.ordinary else "mixtura"
        ),
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
        *_merged_lines(facts.plan),
        *_left_out_lines(facts),
        *_matrix_lines(facts.plan),
        *_trimmed_lines(facts.plan),
        f"Every {_other(facts)}tensor outside the experts is the source's, byte for "
        f"byte{_except_routers(facts.plan)}. "
        "`plan.json` says what was done to each expert.",
        "",
        *_measured_lines(facts.measured),
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


def card_metadata(source: Path, source_name: str, *, library: str) -> str:
    """The YAML at the head of a card: what stands at the head of the source's that is true here, too."""
    kept: dict[str, Any] = {k: v for k, v in _source_metadata(source).items() if k in _KEPT_METADATA}
    base, _, _ = source_name.partition("@")
    if "/" in base and not base.startswith(("/", ".")):
        kept["base_model"] = base
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
    merges = [merge for groups in facts.plan.merged().values() for merge in groups]
    merged = sum(len(merge.experts) for merge in merges)
    rounded = set(facts.plan.quantized())
    averages = sum((merge.layer, merge.experts[0]) in rounded for merge in merges)
    kept = total - dropped - merged - (sum(ways.values()) - averages)
    groups = [(f"merged into {len(merges)}", merged)] if merges else []
    return [*rows, *groups, ("kept as they were", kept), ("dropped", dropped), ("before", total)]


def _merged_lines(plan: Plan) -> list[str]:
    lines = [
        f"- layer {layer}: merged {', '.join('+'.join(map(str, merge.experts)) for merge in merges)}"
        for layer, merges in plan.merged().items()
    ]
    return [*lines, ""] if lines else []


def _way(action: Quantize | QuantizeMatrix) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in sorted(action.settings.items()))
    return f"`{action.quantizer}` ({settings})" if settings else f"`{action.quantizer}`"


def _dropped_lines(plan: Plan) -> list[str]:
    lines = [
        f"- layer {layer}: {len(experts)} dropped ({', '.join(map(str, experts))})"
        for layer, experts in plan.dropped().items()
    ]
    return [*lines, ""] if lines else []


def _other(facts: CardFacts) -> str:
    return "other " if facts.left_out or facts.plan.matrices() else ""


def _matrix_lines(plan: Plan) -> list[str]:
    """Which matrices outside the experts are in fewer bits."""
    ways = Counter(_way(action) for action in plan.matrices().values())
    lines = [f"- weights outside the experts: {counted(n, 'tensor')} by {way}" for way, n in ways.items()]
    return [*lines, ""] if lines else []


def _trimmed_lines(plan: Plan) -> list[str]:
    """How much narrower experts are."""
    gone = [len(neurons) for neurons in plan.trimmed().values()]
    return [f"- neurons taken out of every expert: {gone[0]}", ""] if gone else []


def _left_out_lines(facts: CardFacts) -> list[str]:
    if not facts.left_out:
        return []
    names = ", ".join(f"`{name}*`" for name in facts.left_out)
    return [
        f"Left out: {names}, which the source has for predicting several tokens ahead. They have as many "
        "experts as the layers had before, and `config.json` has one number for both; it now says that there "
        "are none.",
        "",
    ]


def _measured_lines(measured: MeasuredLoss | None) -> list[str]:
    if measured is None:
        return []
    interval = (
        ""
        if measured.kl_interval is None
        else ", 95 % interval {} to {}".format(*map(human_number, measured.kl_interval))
    )
    lines = [f"- KL divergence to the source: {human_number(measured.kl)} nats per token{interval}"]
    if measured.same_token is not None:
        lines.append(f"- same most likely token: {human_percent(measured.same_token)}")
    if measured.perplexity is not None:
        lines.append(f"- perplexity: {human_number(measured.perplexity)}")
    much = "" if measured.num_tokens is None else f"{counted(measured.num_tokens, 'token')} of "
    chosen = "was" if measured.chose else "was not"
    lines = [f"On {much}{measured.text or 'text'}, which the plan {chosen} chosen by:", "", *lines, ""]
    if measured.details is not None:
        lines += [measured.details, ""]
    return ["## Measured loss", "", *lines]


def _except_routers(plan: Plan) -> str:
    return ", but for the routers' entries of dropped ones" if plan.dropped() else ""

"""The model card of an upcycled model: what it was made of and how, what was measured, how it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mixtura
from mixtura.checkpoints.applying.card import card_metadata
from mixtura.checkpoints.upcycling.targets import OWN
from mixtura.fitting.quality import ALL
from mixtura.fitting.upcycling.records import Upcycled, listed
from mixtura.report import counted, human_number
from mixtura.report.units import format_bytes

_USE = """\
This is an ordinary {family} checkpoint; transformers and whatever else reads the family load it:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```
"""

_USE_OWN = """\
This is a model of mixtura's own, for what no ordinary family has:

```python
import mixtura

model = mixtura.load("{name}")
```
"""


def card_of(
    made: Upcycled, name: str, paths: Sequence[Path], digests: Sequence[str], *, has_plan: bool = True
) -> str:
    """``README.md`` of the result, the same text for the same facts."""
    settings = ", ".join(f"{key}={value}" for key, value in sorted(made.settings.items()))
    method = f"`{made.method}`" + (f" ({settings})" if settings else "")
    experts = f"{counted(made.num_experts, 'expert')} of width {made.d_expert}, {made.top_k} for a token"
    shared = f", and one of width {made.shared_width} that every token visits" if made.shared_width else ""
    made_of = f"the new layers {listed(made)}" if made.added_layers else f"in each layer {experts}{shared}"
    lines = [
        "---",
        card_metadata(paths[0], made.sources[0], library="transformers"),
        "---",
        "",
        f"# {name}",
        "",
        f"Made of {' and '.join(f'`{source}`' for source in made.sources)} by mixtura {mixtura.__version__}, "
        f"method {method}: {made_of}. The weights take {format_bytes(made.bytes_after)}, those of one "
        f"source {format_bytes(made.bytes_before)}. Nothing was trained."
        + (" `plan.json` says what each part was made of." if has_plan else ""),
        "",
        *_measured(made),
        "## Use",
        "",
        (_USE_OWN if made.family == OWN else _USE).format(family=made.family, name=name),
        "## Sources",
        "",
        *(f"- `{source}`: {digest}" for source, digest in zip(made.sources, digests, strict=True)),
        "- licences: the sources'; files of the first one's are beside this one where it had any",
        "",
    ]
    return "\n".join(lines)


def _measured(made: Upcycled) -> list[str]:
    if made.after is None:
        return []
    columns = [*made.before, made.after]
    names = [f"`{one.name}`" for one in made.before] + ["this model"]
    lines = [
        "## Measured",
        "",
        f"Perplexity on {counted(made.after.num_tokens, 'token')} of held-out text:",
        "",
        f"| | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for domain in made.after.perplexity:
        shown = domain if domain != ALL else "all"
        values = " | ".join(human_number(one.perplexity[domain]) for one in columns)
        lines.append(f"| {shown} | {values} |")
    if made.beside is not None:
        lines += ["", f"KL divergence to `{made.sources[0]}`: {human_number(made.beside.kl)} nats per token."]
    return [*lines, ""]

"""The page of the arena of pruners or mergers: what was run and the tables; every measurement as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from mixtura.fitting.arena.entries import MERGERS, PRUNERS, REFERENCE, Entry, entries
from mixtura.fitting.arena.standings import MIDDLE, Standing
from mixtura.fitting.quality import ALL
from mixtura.report import counted

_COLUMNS = (
    ("equal top token", "equal_top", ".1%"),
    ("exact answers", "exact_answers", ".1%"),
    ("tasks", "task_accuracy", ".1%"),
    ("same words", "agreement", ".1%"),
)
_DECIDES = {
    PRUNERS: "Every pruner decides which of the {experts} experts of each of the {layers} layers of {model} "
    "go",
    MERGERS: "Every merger decides which of the {experts} experts of each of the {layers} layers of {model} "
    "are stored as one, their average, the router still choosing among all of them; pruners that leave as "
    "many experts, so as many bytes, stand beside",
}
_ABOUT = (
    "Written by `mixtura arena {kind}`. {decides} ({top_k} are chosen for a token), from one pass over "
    "{tokens:,} tokens of calibration text: code, prose and tasks, a third each. What is left is measured "
    "without any training on other text of the three domains. {seeds}: each has calibration and held-out "
    "text of its own, and other lots for `random`. Hardware: {hardware}. {versions}. {day}."
)
_SIZE = (
    "A model of this size trained on so little text ranks criteria for itself; run the command on yours with "
    "`--model DIRECTORY`."
)
_LEGEND = (
    "**KL**: divergence to the original on held-out text, nats a token; **± 95%** of the mean over seeds. "
    "**to frequency**: the KL over that of `frequency` with the same text, geometric mean; **verdict** "
    "compares its logarithm with the spread of such logarithms, pooled over all entries but `random`, whose "
    "lots have a spread of their own, at 5% over all comparisons of a table together (Holm's correction). "
    "**perplexity** by domain. **equal top token**: positions whose likeliest token is the original's. "
    "**exact answers**: held-out tasks each token of whose worked answer is the likeliest one. **tasks**: "
    "those whose answer is right when the model writes freely. **same words**: the part of the original's "
    "greedy continuations of code and prose that is written alike, up to the first other token. Baselines "
    "are in italics."
)
_WRONG = (
    "At {middle:.0%} of the experts each pruner also planned from one domain's part of the calibration text "
    "alone, a third of the tokens. The KL on a domain's held-out text, mean over domains: where the pruner "
    "saw that domain, all three, or one of the others."
)


def markdown(table: Sequence[Standing], original: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The page: what was run, a table for each share of the experts, and calibration on other domains."""
    seeds = counted(facts["num_seeds"], "seed")
    kind = facts["kind"]
    decides = _DECIDES[kind].format(**facts)
    about = _ABOUT.format(**facts, **_here(), seeds=seeds, decides=decides)
    texts = [f"# The arena: {kind}", about, _SIZE]
    for keep in dict.fromkeys(one.keep for one in table):
        texts += [
            f"## {keep:.0%} of the experts",
            _table([one for one in table if one.keep == keep], original, kind),
        ]
    texts.append(_LEGEND)
    domains = [one for one in table if one.keep == MIDDLE and one.by_domain]
    if domains:
        texts += ["## Calibrated on the wrong domain", _WRONG.format(middle=MIDDLE), _domain_table(domains)]
    told = [line for one in entries([row.name for row in table], kind) if (line := _how(one))]
    if told:
        texts += ["## How each was set", "All others have their own defaults.", "\n".join(told)]
    return "\n\n".join(texts) + "\n"


def as_json(
    results: Sequence[Mapping[str, Any]], original: Mapping[str, Any], facts: Mapping[str, Any]
) -> str:
    """Every measurement, one a line, with what they were made on."""
    lines = ",\n".join("  " + json.dumps(_shortened(row)) for row in results)
    head = json.dumps({**facts, **_here()})
    return (
        f'{{"about": {head},\n "original": {json.dumps(_shortened(original))},\n "cases": [\n{lines}\n]}}\n'
    )


def _here() -> dict[str, str]:
    import torch
    import transformers

    from mixtura.machine.processor import processor_name

    return {
        "hardware": f"{os.cpu_count()} cores, {processor_name()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "day": date.today().isoformat(),
    }


def _table(rows: Sequence[Standing], original: Mapping[str, Any], kind: str) -> str:
    domains = [name for name in original["perplexity"] if name != ALL]
    heads = [
        "",
        kind.removesuffix("s"),
        "KL",
        "± 95%",
        "to frequency",
        "verdict",
        *(f"perplexity, {d}" for d in domains),
    ]
    heads += [title for title, _, _ in _COLUMNS]
    first = ["", "*all experts*", "0", "", "", "", *_perplexities(original["perplexity"], domains)]
    lines = [_line(heads), "|" + "---|" * len(heads), _line([*first, *_cells(original)])]
    for place, one in enumerate(rows, start=1):
        name = f"*{one.name}*" if one.baseline else f"`{one.name}`"
        ratio = "" if one.name == REFERENCE else f"{one.ratio:.2f}"
        spread = "" if one.half_width is None else f"{one.half_width:.4f}"
        cells = [str(place), name, f"{one.values['kl']:.4f}", spread, ratio, one.verdict]
        lines.append(_line([*cells, *_perplexities(one.perplexity, domains), *_cells(one.values)]))
    return "\n".join(lines)


def _domain_table(rows: Sequence[Standing]) -> str:
    lines = [_line(["pruner", "own domain", "all domains", "another", "another / own"]), "|" + "---|" * 5]
    for one in sorted(rows, key=lambda row: row.by_domain["own"]):
        own, other = one.by_domain["own"], one.by_domain["another"]
        cells = [f"{one.by_domain[key]:.4f}" for key in ("own", "all", "another")]
        lines.append(_line([f"`{one.name}`", *cells, f"{other / own:.1f}" if own else "–"]))
    return "\n".join(lines)


def _perplexities(found: Mapping[str, float], domains: Sequence[str]) -> list[str]:
    return [f"{found[name]:.2f}" for name in domains]


def _cells(values: Mapping[str, Any]) -> list[str]:
    return ["–" if values.get(key) is None else format(values[key], form) for _, key, form in _COLUMNS]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _how(entry: Entry) -> str:
    """A line on how an entry differs from the method by its defaults; empty where it does not."""
    if not entry.settings and not entry.protects:
        return ""
    said = [f"{name} {value}" for name, value in entry.settings.items()]
    said += ["super experts protected"] if entry.protects else []
    return f"- `{entry.name}`: `{entry.method}` with {', '.join(said)}"


def _shortened(row: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers with six digits, which is more than what they are good for."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        return {key: short(one) for key, one in value.items()} if isinstance(value, Mapping) else value

    return {key: short(value) for key, value in row.items() if not key.endswith("seconds")}

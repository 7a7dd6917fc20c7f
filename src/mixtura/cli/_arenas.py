"""What each kind's arena is held by, and how its table is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, final

import typer

from mixtura.errors import SettingError, UserError

if TYPE_CHECKING:
    from mixtura.running.composing.tables import ReplayTable


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked of an arena; ``tokens`` is None where nothing was said."""

    kind: str
    names: tuple[str, ...]
    seeds: int
    tokens: int | None
    model: Path | None
    out: Path
    runs: Path
    table: Path | None = None
    cards: Path | None = None
    about: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ON_TABLES and (self.table or self.cards or self.about):
            raise SettingError(
                f"--table, --cards and --about are for {' and '.join(ON_TABLES)}, not for {self.kind}"
            )

    def shared(self) -> dict[str, Any]:
        """What arenas take whose single runs are kept."""
        more = {} if self.tokens is None else {"num_tokens": self.tokens}
        return {
            "only": self.names,
            "num_seeds": self.seeds,
            "runs": self.runs,
            "out": self.out,
        } | more

    def checkpoint(self) -> Path | None:
        """The model, where it is to be a checkpoint.

        Raises:
            UserError: it is none.
        """
        if self.model is not None and not self.model.is_dir():
            raise UserError(
                f"--model of the arena of {self.kind} takes the directory of a checkpoint, got {self.model}"
            )
        return self.model


@final
@dataclass(frozen=True, slots=True)
class Arena:
    """Holds an arena, writes its page, and prints the table that comes of it."""

    hold: Callable[[Asked], list[Any]]
    show: Callable[[list[Any]], None]


def _notify(line: str) -> None:
    typer.echo(line, err=True)


def _train(asked: Asked) -> list[Any]:
    from mixtura.train.arena.run import Contest, hold
    from mixtura.train.arena.scale import Scale

    scale = Scale.read(asked.model) if asked.model else Scale()
    return [*hold(Contest(kind=asked.kind, scale=scale, **asked.shared()), _notify)]


def _shrink(asked: Asked) -> list[Any]:
    from mixtura.fitting.arena.run import Contest, hold

    return [*hold(Contest(kind=asked.kind, model=asked.checkpoint(), **asked.shared()), _notify)]


def _round(asked: Asked) -> list[Any]:
    from mixtura.fitting.arena.rounding.run import Contest, hold

    return [*hold(Contest(model=asked.checkpoint(), **asked.shared()), _notify)]


def _answer(asked: Asked) -> list[Any]:
    from mixtura.running.decoders.arena.run import Contest, hold

    if asked.tokens is not None:
        raise SettingError("--tokens is for trainings and texts; decoders answer whole questions")
    return [*hold(Contest(model=asked.checkpoint(), **asked.shared()), _notify)]


def _replay(asked: Asked) -> list[Any]:
    from mixtura.running.tiers.arena import hold
    from mixtura.running.tiers.page import as_csv, markdown

    return _recorded(asked, hold, markdown, as_csv)


def _guess(asked: Asked) -> list[Any]:
    from mixtura.running.tiers.guessing import as_csv, hold, markdown

    return _recorded(asked, hold, markdown, as_csv)


def _estimate(asked: Asked) -> list[Any]:
    from datetime import date

    import sklearn
    import torch

    from mixtura.machine.processor import processor_name
    from mixtura.running.estimating.arena import as_csv, hold, markdown

    if asked.tokens is not None or asked.model is not None:
        raise SettingError("--tokens and --model are for models of text; estimators have data of their own")
    table = hold(asked.names, asked.seeds, asked.runs, _notify)
    versions = f"scikit-learn {sklearn.__version__}, PyTorch {torch.__version__}"
    day = date.today().isoformat()
    facts = (
        f"{processor_name()}, {versions}, {day}. No times are measured, so a busy machine changes nothing."
    )
    _write(asked, markdown(table, asked.seeds, facts), as_csv(table))
    return table


def _tune(asked: Asked) -> list[Any]:
    from mixtura.train.arena.paired import as_csv
    from mixtura.train.tuning.arena.page import markdown, picture
    from mixtura.train.tuning.arena.run import COLUMNS, TOKENS_PER_STEP, hold

    if asked.model is not None:
        raise SettingError("the arena of adapters tunes the specimen; leave --model out")
    steps = max(2, (asked.tokens or _TUNED_TOKENS) // TOKENS_PER_STEP)
    table, absent = hold(asked.names, asked.seeds, steps, asked.runs, _notify)
    _write(asked, markdown(table, absent, asked.seeds, steps, _facts()), as_csv(table, COLUMNS))
    (asked.out / f"{asked.kind}.svg").write_text(picture(table), encoding="utf-8")
    return table


def _upcycle(asked: Asked) -> list[Any]:
    from mixtura.fitting.upcycling.arena.models import TOKENS_PER_STEP, Steps
    from mixtura.fitting.upcycling.arena.page import markdown, picture
    from mixtura.fitting.upcycling.arena.run import COLUMNS, Contest, hold
    from mixtura.train.arena.paired import as_csv

    if asked.model is not None:
        raise SettingError("the arena of upcyclers trains its dense models; leave --model out")
    steps = Steps()
    if asked.tokens is not None:
        steps = Steps(further=max(3, asked.tokens // TOKENS_PER_STEP))
    contest = Contest(only=asked.names, num_seeds=asked.seeds, steps=steps, runs=asked.runs)
    table = hold(contest, _notify)
    _write(asked, markdown(table, asked.seeds, steps, _facts()), as_csv(table, COLUMNS))
    (asked.out / f"{asked.kind}.svg").write_text(picture(table), encoding="utf-8")
    return table


def _facts() -> str:
    """On what it was measured, and when."""
    from datetime import date

    import torch

    from mixtura.machine.processor import processor_name

    return f"{processor_name()}, PyTorch {torch.__version__}, {date.today().isoformat()}."


def _recorded(
    asked: Asked, hold: Callable[..., Any], markdown: Callable[..., str], as_csv: Callable[..., str]
) -> list[Any]:
    """An arena on what a model chose on texts."""
    from mixtura.data import specimen

    model, texts = asked.checkpoint(), (asked.seeds, asked.tokens or _REPLAYED_TOKENS)
    table = hold(model or specimen.path(), asked.names, *texts, _notify)
    page = markdown(table, "the specimen" if model is None else model.name, *texts)
    _write(asked, page, as_csv(table))
    return [*table]


def _compose(asked: Asked) -> list[Any]:
    from mixtura.running.composing.arena import hold
    from mixtura.running.composing.page import markdown
    from mixtura.running.composing.standings import as_csv

    source, about = _answers(asked, num_samples=1)
    table = hold(source, asked.names, asked.seeds, _notify)
    _write(asked, markdown(table, source, asked.seeds, about), as_csv(table))
    return [*table]


def _aggregate(asked: Asked) -> list[Any]:
    from mixtura.running.composing.policies import hold_policies
    from mixtura.running.composing.policy_page import markdown
    from mixtura.running.composing.standings import as_csv

    source, about = _answers(asked, num_samples=5)
    table = hold_policies(source, asked.names, _notify)
    _write(asked, markdown(table, source, about), as_csv(table))
    return [*table]


def _answers(asked: Asked, num_samples: int) -> tuple[ReplayTable, str]:
    """The table of answers that was asked for, or the made-up one, and what it is."""
    from mixtura.running.composing.planted import planted
    from mixtura.running.composing.reading import read_table

    if asked.tokens is not None or asked.model is not None:
        raise SettingError(
            f"--tokens and --model are for models that run; the arena of {asked.kind} takes --table"
        )
    if asked.table is None:
        made = planted(_PLANTED_PROMPTS, num_samples=num_samples)
        return made, asked.about or "A made-up table with four tasks."
    return read_table(asked.table, asked.cards), asked.about


def _write(asked: Asked, page: str, numbers: str) -> None:
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / f"{asked.kind}.md").write_text(page, encoding="utf-8")
    (asked.out / f"{asked.kind}.csv").write_text(numbers, encoding="utf-8")


def _show_trained(table: list[Any]) -> None:
    rows = []
    for one in table:
        bits = one.values.get("bits_per_byte")
        shown = "not trained" if bits is None else f"{bits:.4f}"
        said = one.error if bits is None else one.verdict
        rows.append([one.name, shown, said + ("  (leaking)" if one.leaks else "")])
    _show(["name", "bits per byte", "verdict"], rows, left=(0, 2))


def _show_shrunk(table: list[Any]) -> None:
    rows = [
        [f"{one.keep:.0%}", one.name, f"{one.values['kl']:.4f}", f"{one.ratio:.2f}", one.verdict]
        for one in table
    ]
    _show(["experts", "name", "KL", "to frequency", "verdict"], rows, left=(1, 4))


def _show_rounded(table: list[Any]) -> None:
    rows = [
        [f"{one.rung:g}", one.name, one.settings, f"{one.bits:.3f}", f"{one.kl:.3g}", one.verdict]
        for one in table
    ]
    _show(["at most", "name", "settings", "bits", "KL", "verdict"], rows, left=(1, 2, 5))


def _show_answered(table: list[Any]) -> None:
    rows = [
        [one.name, f"{one.accuracy:.1%}", f"{one.gained}, {one.lost}", f"{one.tokens:.0f}", one.verdict]
        for one in table
    ]
    _show(["name", "right", "gained, lost", "tokens run", "verdict"], rows, left=(0, 4))


def _show_replayed(table: list[Any]) -> None:
    from mixtura.report.units import format_bytes

    rows = []
    for one in table:
        rate, read, over = (sum(v) / len(v) for v in (one.hit_rates, one.missed_bytes, one.over_bound))
        rows.append([f"{one.share:.0%}", one.name, f"{rate:.1%}", format_bytes(read), f"{over:.2f}"])
    _show(["room", "name", "hit rate", "read a token", "misses to belady"], rows, left=(1,))


def _show_composed(table: list[Any]) -> None:
    rows = [
        [
            one.name,
            f"{one.area:.4f}",
            f"{one.over_hull:+.4f}",
            f"{one.quality:.4f}",
            f"{one.cost:.4g}",
            one.verdict,
        ]
        for one in table
    ]
    _show(["name", "area", "over hull", "quality", "$ a thousand", "verdict"], rows, left=(0, 5))


def _show_guessed(table: list[Any]) -> None:
    from mixtura.report.units import format_bytes

    rows = []
    for one in table:
        hits, wasted, late, gained = (
            sum(v) / len(v) for v in (one.hit_rates, one.wasted_bytes, one.late, one.gained)
        )
        shown = [f"{one.share:.0%}", one.name, f"{hits:.1%}", format_bytes(wasted), f"{late:.0%}"]
        rows.append([*shown, f"{gained:.0%}"])
    _show(["room", "name", "hit rate", "wasted a token", "late", "of the oracle's gain"], rows, left=(1,))


def _show_estimated(table: list[Any]) -> None:
    rows = [
        [one.problem, one.name, f"{one.mean:.4f}", f"{one.difference:+.4f}", one.verdict] for one in table
    ]
    _show(["problem", "name", "score", "to the best baseline", "verdict"], rows, left=(0, 1, 4))


def _show_paired(table: list[Any]) -> None:
    rows = [
        [one.group, one.name, f"{one.mean('loss'):.4f}", f"{one.difference:+.4f}", one.verdict]
        for one in table
    ]
    _show(["of", "name", "held-out loss", "to the reference", "verdict"], rows, left=(0, 1, 4))


def _show_aggregated(table: list[Any]) -> None:
    rows = [
        [
            one.name,
            f"{one.score:.4f}",
            f"{one.over_mix:+.4f}",
            f"{one.cost:.4g}",
            f"{one.calls:.1f}",
            one.verdict,
        ]
        for one in table
    ]
    _show(["name", "score", "over mix", "$ a thousand", "calls", "verdict"], rows, left=(0, 5))


def _show(heads: list[str], rows: list[list[str]], left: tuple[int, ...]) -> None:
    from mixtura.report.screen import screen, show_table

    show_table(screen(), heads, rows, left=left)


_REPLAYED_TOKENS: Final = 2048
_PLANTED_PROMPTS: Final = 600
_TUNED_TOKENS: Final = 8192
# What an arena of whole models is held on.
Table = Annotated[
    Path | None,
    typer.Option(
        help="Of model_routers, aggregators: a table of outcomes (.jsonl, .csv, .parquet); else one made up."
    ),
]
Cards = Annotated[Path | None, typer.Option(help="With --table: cards of the table's models (JSON).")]
About = Annotated[str, typer.Option(help="With --table: a sentence on the table's source, for the page.")]
_TRAINED, _SHRUNK = Arena(_train, _show_trained), Arena(_shrink, _show_shrunk)
ARENAS: Final[Mapping[str, Arena]] = {
    "routers": _TRAINED,
    "balancers": _TRAINED,
    "mixers": _TRAINED,
    "experts": _TRAINED,
    "forms": _TRAINED,
    "attentions": _TRAINED,
    "pruners": _SHRUNK,
    "mergers": _SHRUNK,
    "quantizers": Arena(_round, _show_rounded),
    "decoders": Arena(_answer, _show_answered),
    "caches": Arena(_replay, _show_replayed),
    "model_routers": Arena(_compose, _show_composed),
    "prefetchers": Arena(_guess, _show_guessed),
    "aggregators": Arena(_aggregate, _show_aggregated),
    "estimators": Arena(_estimate, _show_estimated),
    "adapters": Arena(_tune, _show_paired),
    "upcyclers": Arena(_upcycle, _show_paired),
}
# Kinds whose arena is held on a table of answers.
ON_TABLES: Final = ("model_routers", "aggregators")

"""Numbers that say something about a model's routing: from a pass over text, from several, or by running it.

An analysis reads one `Evidence`, whose parts are there or not; its tags say which it reads, and so what a
command has to make first. What the hard ones came to:

====================================  ====================================================================
two sets of texts told apart (69)     ``trace.domain_sequences``: each text's experts, and whose it is
checkpoints of a training (83, 199)   ``series``: traces of the same text, and the step of each
others in the batch (98)              ``study.run`` of several rows in one pass, also as in training
a choice forbidden (124)              ``study.run`` under a `Steering` for each row
every path of a token (138)           ``study.run`` with a steering of the last token alone
all experts on one token (142)        ``study.outputs``, ``study.experts``
results of benchmarks (24, 169, 173)  ``runs``: a table of one row a run
====================================  ====================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, final, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from mixtura.errors import UserError, suggest
from mixtura.methods.decoders import LayerFacts
from mixtura.types.steering import Steering
from mixtura.types.trace import Trace

KIND = {
    "base": "Analysis",
    "summary": "Says something about a model's routing from what was seen of it, or by running it again.",
    "tags": {
        "statistic:NAME": "Reads this statistic of every assignment.",
        "needs:choices": "Reads every token's experts, text by text, and which token it is.",
        "needs:logits": "Reads the logits of routers, of a sample of the tokens.",
        "needs:series": "Reads traces of several checkpoints of one training, on the same text.",
        "needs:study": "Runs the model again on the text that was observed.",
        "needs:runs": "Reads a table of runs instead of a trace.",
        "steers": "Runs it routed otherwise, so that it must be a model whose routers mixtura can steer.",
        "simulates": "Reads nothing: what it says is of data that it draws itself.",
        "label_dependent": "What it says depends a little on the numbers that experts happen to have.",
    },
}
# Rows of a pass at most where a method runs many ways of the same text: what a pass takes is reckoned by it.
ROWS_AT_ONCE = 16

Cell = float | int | str | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of numbers and words; None where there is nothing to say."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Curves by name, of points (x, y), or scattered points where not ``joined``."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[tuple[float, float], ...]]
    joined: bool = True
    log_x: bool = False
    log_y: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A map of coloured cells; None leaves a cell empty. ``signed`` values lie on both sides of 0."""

    title: str
    values: tuple[tuple[float | None, ...], ...]
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    row_name: str = "layer"
    column_name: str = "expert"
    signed: bool = False


@final
@dataclass(frozen=True, slots=True)
class Report:
    """What an analysis found.

    Every row has the same columns; ``layer``, the decoder layer's number, is the first. Values are
    finite, or `None` where there is nothing to measure.

    Attributes:
        scalars: numbers for all of it.
        rows: a row of numbers per MoE layer; none where it is not about layers.
        sentences: what it comes to in words.
        tables: whatever is not by layer.
        figures: what there is to look at.
    """

    scalars: Mapping[str, float | None]
    rows: tuple[Mapping[str, float | None], ...] = ()
    sentences: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Lines | Grid, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of a row."""
        return tuple(self.rows[0]) if self.rows else ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; what figures show is left to who draws them."""
        made: dict[str, Any] = {"scalars": dict(self.scalars), "rows": [dict(row) for row in self.rows]}
        if self.sentences:
            made["sentences"] = list(self.sentences)
        if self.tables:
            made["tables"] = [
                {"title": one.title, "columns": list(one.columns), "rows": [list(row) for row in one.rows]}
                for one in self.tables
            ]
        return made


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One sequence of the text that was observed, and the domain it is of."""

    token_ids: tuple[int, ...]
    domain: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What a model made of one row of tokens.

    Attributes:
        logits: of the token after each.
        chosen: by decoder layer, each token's experts as they ran; absent ones are E or more.
        weights: by decoder layer, what these were weighted by.
        inputs: by decoder layer, what the experts were given.
        scores: by decoder layer, the logits of the router; only where they were asked for.
    """

    logits: Float[Tensor, "T V"]
    chosen: Mapping[int, Int[Tensor, "T K"]]
    weights: Mapping[int, Float[Tensor, "T K"]]
    inputs: Mapping[int, Float[Tensor, "T D"]]
    scores: Mapping[int, Float[Tensor, "T E"]] = field(default_factory=dict)


@runtime_checkable
class Study(Protocol):
    """A model at hand, to be run again: as it is, or routed otherwise."""

    @property
    def passages(self) -> tuple[Passage, ...]:
        """The text that was observed."""

    @property
    def layers(self) -> tuple[LayerFacts, ...]:
        """Layers with experts, in order; for the tag ``steers`` those that can be steered."""

    def words(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Each token as text."""

    def run(
        self,
        rows: Sequence[Sequence[int]],
        *,
        steering: Sequence[Mapping[int, Steering]] = (),
        last_only: bool = False,
        training: bool = False,
        scores: bool = False,
    ) -> tuple[Read, ...]:
        """Read rows of equally many tokens, all in one pass.

        Args:
            rows: token ids of each.
            steering: of each row, by decoder layer; none for the model as it is.
            last_only: the steering is for each row's last token alone.
            training: route as in training, with the same draws every time; nothing is learnt.
            scores: also give the routers' logits.
        """

    def matrices(self, index: int, expert: int) -> Mapping[str, Float[Tensor, "F D"]]:
        """An expert's matrices ``up``, ``down`` (one row a neuron) and, where there is one, ``gate``."""

    def router(self, index: int) -> Float[Tensor, "E D"]:
        """The rows of a layer's router."""

    def outputs(self, index: int, inputs: Float[Tensor, "T D"]) -> Float[Tensor, "E T D"]:
        """What every expert of a layer makes of every row, not weighted."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What an analysis may read; `mixtura.analyze` and the commands make what its tags ask for.

    Attributes:
        traces: of checkpoints of one training on the same text, the last one last; or of one model.
        steps: of training, one a trace; counted from 0 where they are not known.
        study: the model of the last trace.
        runs: one row a run, by the names of its columns.
    """

    traces: tuple[Trace, ...] = ()
    steps: tuple[float, ...] = ()
    study: Study | None = None
    runs: tuple[Mapping[str, Cell], ...] = ()

    @staticmethod
    def of(*traces: Trace) -> Evidence:
        """That of traces alone."""
        return Evidence(traces=traces)

    @property
    def trace(self) -> Trace:
        """The last trace.

        Raises:
            UserError: there is none.
        """
        if not self.traces:
            raise UserError("there is no trace to analyse; observe a model, or give the file of a trace")
        return self.traces[-1]

    def series(self, least: int = 2) -> tuple[tuple[float, Trace], ...]:
        """Steps and traces, of ``least`` checkpoints or more, of the same layers and the same text.

        Raises:
            UserError: there are fewer, or they are of other models or other text.
        """
        if len(self.traces) < least:
            raise UserError(
                f"this analysis compares {least} checkpoints or more, and there "
                f"{'is' if len(self.traces) == 1 else 'are'} {len(self.traces)}; observe each with --save, "
                "on the same text, and give all traces to 'mixtura analyze'"
            )
        steps = self.steps or tuple(map(float, range(len(self.traces))))
        if len(steps) != len(self.traces) or list(steps) != sorted(steps):
            raise UserError(
                f"there are {len(self.traces)} traces and the steps {list(steps)}; give one step a trace, "
                "in rising order"
            )
        for one in self.traces[:-1]:
            _require_alike(one, self.trace)
        return tuple(zip(steps, self.traces, strict=True))

    def model(self) -> Study:
        """The model at hand.

        Raises:
            UserError: there is none.
        """
        if self.study is None:
            raise UserError(
                "this analysis runs the model again, and a trace alone has none; use 'mixtura observe MODEL "
                "--analysis NAME', or give analyze a model"
            )
        return self.study

    def table(self, *columns: str, least: int = 2) -> tuple[Mapping[str, Cell], ...]:
        """The runs that have all of these columns.

        Raises:
            UserError: there are fewer than ``least``.
        """
        rows = tuple(row for row in self.runs if all(row.get(name) is not None for name in columns))
        if len(rows) >= least:
            return rows
        if not self.runs:
            raise UserError(
                f"this analysis reads a table of runs with the columns {', '.join(columns)}; give it by "
                "--runs"
            )
        known = {name for row in self.runs for name in row}
        missing = [name for name in columns if name not in known]
        why = f"{len(rows)} rows of the table have them all"
        if missing:
            why = f"the table has no column {missing[0]!r}; {suggest(missing[0], known)}"
        raise UserError(f"this analysis needs {least} runs or more with {', '.join(columns)}, and {why}")


def _require_alike(one: Trace, last: Trace) -> None:
    """Refuse traces that cannot be checkpoints of one training seen on the same text."""
    shapes = [[(x.index, x.shape.num_experts, x.top_k) for x in trace.layers] for trace in (one, last)]
    if one.model_type != last.model_type or shapes[0] != shapes[1]:
        raise UserError(
            f"the traces are of models of different layers ({one.model_type or 'unknown'} and "
            f"{last.model_type or 'unknown'}); give traces of checkpoints of one training"
        )
    if one.num_tokens != last.num_tokens or not _same(one.token_ids, last.token_ids):
        raise UserError(
            "the traces are of different text; observe every checkpoint on the same text, with the same "
            "--tokens and --length"
        )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two texts are the same as far as both are known."""
    return one is None or other is None or (one.shape == other.shape and bool((one == other).all()))


class Analysis(ABC):
    """Says something about a model's routing.

    A method names what it reads as tags: statistics (``"statistic:output_norm"``), what else must have been
    recorded (``"needs:choices"``), several checkpoints, the model itself, or a table. One that reads a table
    has an ``example`` of it, with every column that it knows.
    """

    example: ClassVar[tuple[Mapping[str, Cell], ...]] = ()

    @abstractmethod
    def measure(self, evidence: Evidence) -> Report:
        """The numbers.

        Raises:
            UserError: the evidence lacks what the analysis needs.
        """

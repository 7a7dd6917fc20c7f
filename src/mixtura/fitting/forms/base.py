"""The seam between a search and what it chooses among.

A form says what the parts of a model are, what each can be stored as, what that costs in bytes and in
predicted loss, how a candidate runs, and how it is written. Searching, measuring and showing know no more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.fitting.budget import Allowance
from mixtura.fitting.clock import Clock, Notify
from mixtura.fitting.journal import Journal
from mixtura.fitting.records import Candidate, Observed, Prices, Quality, Request
from mixtura.fitting.texts import Texts
from mixtura.fitting.verifying import Verified, continued
from mixtura.running.stream import Streamed
from mixtura.types import Plan


@final
@dataclass(frozen=True, slots=True)
class Tools:
    """What a form works with while a fit runs: where things are kept, the time there is, who is told."""

    journal: Journal
    clock: Clock
    notify: Notify


@final
@dataclass(frozen=True, slots=True)
class Told:
    """What a candidate is, for the reader of a result.

    Attributes:
        plan: what is done to the source; None where it is not of mixtura's actions.
        choice_map: by row, the option of each part by name; the row's name comes first.
        columns: names of the parts of a row; their numbers where it is empty.
        untouched: tensors that stay as they are.
        commands: how the result is run, by what it runs in.
        settings: whatever else makes the same result again.
    """

    plan: Plan | None
    choice_map: Mapping[str, tuple[str, ...]]
    untouched: tuple[str, ...]
    commands: Mapping[str, str]
    columns: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


class Form(ABC):
    """What the parts of a model can be stored as, what it costs, and how it is decoded and written.

    Args:
        request: what the user asked for.
        view: the model.
    """

    # Whether generating with the source can be measured in what the result runs in.
    runs_source = True

    def __init__(self, request: Request, view: CheckpointView) -> None:
        self.request = request
        self.view = view
        # For the reader of the result, a sentence each.
        self.notes: list[str] = []
        self._tools: Tools | None = None
        self._prices: Prices | None = None

    @property
    def tools(self) -> Tools:
        """What `begin` was given."""
        assert self._tools is not None
        return self._tools

    @property
    def prices(self) -> Prices:
        """What observing found."""
        assert self._prices is not None
        return self._prices

    def price_with(self, prices: Prices) -> None:
        """Take bytes and errors from here: candidates choose among these options."""
        self._prices = prices

    def begin(self, tools: Tools) -> None:
        """Start to work."""
        self._tools = tools

    @abstractmethod
    def allowance(self) -> Allowance:
        """What the budget leaves, and what the unchanged model takes.

        Raises:
            UserError: the model cannot be stored so, or the budget is too small for anything.
        """

    @abstractmethod
    def in_time(self, texts: Texts) -> Texts:
        """As much of a text as the time allows to be read."""

    @abstractmethod
    def observed(self, texts: Texts) -> Observed:
        """Run the original on calibration text and price every option of every part."""

    @abstractmethod
    def original(self) -> Streamed:
        """The source as candidates are compared with it."""

    @abstractmethod
    def streamed(self, candidate: Candidate) -> Streamed:
        """A candidate as it will compute, from the source's files."""

    @abstractmethod
    def account_bytes(self, candidate: Candidate) -> int:
        """Bytes of weights, cache and buffers."""

    @abstractmethod
    def active_bytes(self, candidate: Candidate) -> float:
        """Bytes of weights that a token reads, on average."""

    @abstractmethod
    def weights_bytes(self, candidate: Candidate) -> int:
        """Bytes of weights."""

    @abstractmethod
    def write(self, candidate: Candidate, directory: Path, quality: Quality | None) -> None:
        """Write a candidate to a new directory, whole or not at all; ``quality`` is for its card."""

    @abstractmethod
    def verify(
        self, directory: Path, name: str, key: str, *, context: int, needed_bytes: int = 0
    ) -> Verified:
        """Generate with what was written, in a process of its own; journalled under a key."""

    @abstractmethod
    def told(self, candidate: Candidate, directory: Path) -> Told:
        """What a candidate is; ``directory`` is where the result will lie."""

    def answers(self, directory: Path, tokenizer: Any, prompts: Sequence[str], context: int) -> list[str]:
        """What the result writes after some prompts, greedily."""
        return continued(directory, tokenizer, prompts, context)

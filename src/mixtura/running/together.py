"""All batches of a text through a streamed model at once, one decoder layer after the other.

`Streamed` reads the whole model once for every batch. Here the batches go side by side: each runs the
model's own forward in a thread of its own, and only one thread moves at a time. They wait for each other
before every decoder layer, whose weights are then read once for all of them, and where experts are to run,
which then run once on the tokens of all batches together. So a text of any length costs one reading of the
model, and whoever watches the experts sees the whole text in one call per layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mixtura.data.tokens import TokenBatch
from mixtura.running.observing.catching import Caught
from mixtura.running.observing.recorder import Cursor
from mixtura.running.stream import DEFAULT_WORKING_BYTES, Streamed

# One batch is never cut again inside of the model.
_UNBOUNDED = 1 << 62
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
# From the number of an MoE layer, which call of it this is, its experts' forward and that one's three
# arguments (tokens, experts, weights) to the layer's output.
RunLayer = Callable[[int, int, Forward, Tensor, Tensor, Tensor], Tensor]


def run_together(
    streamed: Streamed,
    tokens: TokenBatch,
    cursor: Cursor,
    run_layer: RunLayer,
    *,
    caught: Mapping[int, Caught] | None = None,
    on_states: Callable[[Tensor], None] = lambda _: None,
    max_bytes: int = DEFAULT_WORKING_BYTES,
) -> None:
    """Run a text through a model so that every decoder layer and every expert is read once.

    Args:
        streamed: the model, with observers attached to its experts (`mixtura.running.observing.attach`).
        tokens: the text; padding belongs on the right.
        cursor: told which tokens the experts that run see.
        run_layer: runs the experts of an MoE layer, whose number among ``view.layers`` it is given, on the
            tokens of all batches; it may do without where it knows what comes out.
        caught: by number of the MoE layer, what is caught of it as it runs; joined over batches as well.
        on_states: given what each batch comes to before the head, the cursor being on its tokens.
        max_bytes: bound on the activations of one batch inside a decoder layer.
    """
    rows = list(streamed.batches(*tokens.input_ids.shape, max_bytes=max_bytes))
    _Together(streamed, tokens, rows, cursor, run_layer, dict(caught or {}), on_states).run()


@final
class _StoppedError(BaseException):
    """The others have failed or were interrupted, so this batch ends where it is."""


@final
@dataclass(slots=True)
class _Place:
    """Where a batch waits: before a decoder layer, or with its tokens where experts are to run."""

    block: nn.Module | None = None
    layer: int = -1
    given: tuple[Tensor, Tensor, Tensor] | None = None
    caught: dict[str, Tensor] = field(default_factory=dict)


@final
class _Batch(threading.Thread):
    """One batch: a thread that runs while it has the turn and gives it back wherever it waits."""

    def __init__(self, work: Callable[[_Batch], None], rows: Int[Tensor, " s"]) -> None:
        super().__init__(daemon=True)
        self.rows = rows
        self.place: _Place | None = None
        self.answer: Tensor | None = None
        self.error: BaseException | None = None
        self.is_over = self.is_stopped = False
        self._work = work
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        """The thread's own part."""
        self._go.acquire()
        try:
            if not self.is_stopped:
                self._work(self)
        except _StoppedError:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.is_over, self.place = True, None
            self._waits.release()

    def wait_at(self, place: _Place) -> Tensor | None:
        """In the thread: give the turn away and wait to be let go on; the answer that was left."""
        self.place = place
        self._waits.release()
        self._go.acquire()
        if self.is_stopped:
            raise _StoppedError
        self.place, answer, self.answer = None, self.answer, None
        return answer

    def move(self) -> None:
        """From outside: let it go on to where it waits next; raises what it failed with."""
        if self.is_over:
            return
        self._go.release()
        self._waits.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """From outside: end it where it waits."""
        if self.is_alive() and not self.is_over:
            self.is_stopped = True
            self._go.release()
            self._waits.acquire()


@final
class _Together:
    """The batches of one text, moved from layer to layer."""

    def __init__(
        self,
        streamed: Streamed,
        tokens: TokenBatch,
        rows: Sequence[Int[Tensor, " _"]],
        cursor: Cursor,
        run_layer: RunLayer,
        caught: dict[int, Caught],
        on_states: Callable[[Tensor], None],
    ) -> None:
        self._streamed = streamed
        self._tokens = tokens
        self._cursor = cursor
        self._run_layer = run_layer
        self._caught = caught
        self._on_states = on_states
        self._batches = [_Batch(self._work, one) for one in rows]
        self._current = self._batches[0]
        self._forwards: list[Forward] = []
        self._calls: dict[int, int] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Move all batches on until they are through."""
        with ExitStack() as stack:
            for number, layer in enumerate(self._streamed.view.layers):
                module: Any = self._streamed.model.get_submodule(layer.name)
                self._forwards.append(module.forward)
                module.forward = self._arriving(number)
                stack.callback(delattr, module, "forward")
            for block in self._streamed.blocks:
                handle = block.register_forward_pre_hook(self._before_block, prepend=True)
                stack.callback(handle.remove)
            for batch in self._batches:
                batch.start()
                stack.callback(batch.stop)
            kept = stack.enter_context(ExitStack())
            self._move()
            while (place := self._where()) is not None:
                if place.block is not None:
                    kept.close()
                    kept.enter_context(self._streamed.kept(place.block))
                else:
                    self._answer(place.layer)
                self._move()

    def _work(self, batch: _Batch) -> None:
        """One batch through the model, in its thread."""
        mask = self._tokens.attention_mask[batch.rows]
        states = self._streamed.hidden(self._tokens.input_ids[batch.rows], mask, max_bytes=_UNBOUNDED)
        self._on_states(states)

    def _move(self) -> None:
        for batch in self._batches:
            self._current = batch
            self._look_at(batch.rows)
            batch.move()

    def _where(self) -> _Place | None:
        """Where all batches wait; None where all are through."""
        places = [batch.place for batch in self._batches]
        here = {None if place is None else (id(place.block), place.layer) for place in places}
        assert len(here) == 1, "all batches take the same way through a model"
        return places[0]

    def _look_at(self, rows: Int[Tensor, " s"] | slice) -> None:
        """Tell the cursor which sequences run."""
        valid = self._tokens.attention_mask[rows].bool()
        domains = self._tokens.domains[rows][:, None].expand_as(valid)
        before = self._cursor.previous
        self._cursor.move(valid.reshape(-1), domains.reshape(-1))
        self._cursor.previous = before

    def _before_block(self, block: nn.Module, _: Any) -> None:
        self._current.wait_at(_Place(block=block))

    def _arriving(self, number: int) -> Forward:
        """What stands in for the forward of experts: it waits for the other batches."""

        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            seen = self._caught.get(number)
            found = {} if seen is None else {"residual": seen.residual, "logits": seen.logits}
            caught = {name: value for name, value in found.items() if value is not None}
            place = _Place(layer=number, given=(hidden, index, weights), caught=caught)
            answer = self._current.wait_at(place)
            assert answer is not None
            return answer

        return forward

    def _answer(self, number: int) -> None:
        """Run the experts of a layer on the tokens of all batches."""
        places = [batch.place for batch in self._batches]
        parts = [place.given for place in places if place is not None and place.given is not None]
        hidden, index, weights = (torch.cat(one) for one in zip(*parts, strict=True))
        if number in self._caught:
            for name in ("residual", "logits"):
                held = [place.caught[name] for place in places if place is not None and name in place.caught]
                setattr(self._caught[number], name, torch.cat(held) if held else None)
        call = self._calls[number] = self._calls.get(number, -1) + 1
        self._look_at(slice(None))
        outputs = self._run_layer(number, call, self._forwards[number], hidden, index, weights)
        sizes = [len(part[0]) for part in parts]
        for batch, part in zip(self._batches, outputs.split(sizes), strict=True):
            batch.answer = part

"""Router replay: train on the experts that were chosen when the text was generated.

An inference engine and a training forward choose other experts for some tokens, by rounding alone,
which upsets reinforcement learning. The choices of generation are recorded and made again in training;
weights come from the live router's scores of those experts, so its gradients are whole.

Two families cannot replay, and say so. Phi-3.5-MoE (``phimoe``) draws its experts one after the other, each
from what masks of the one before leave, and estimates its gradient for exactly those draws: another expert
would have weight 0 or a gradient of something else. DiffusionGemma routes, beside the text, a canvas of
tokens that is drawn anew in every pass, so that choices do not belong to tokens of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixtura.errors import CheckpointError, UserError
from mixtura.rerouting.core import Rerouting
from mixtura.rerouting.passes import Pass
from mixtura.types import Routing

# A generated text's last token was never fed to the model, so it has no recorded choice.
_UNFED = 1


@final
@dataclass(slots=True)
class Recording:
    """The experts chosen for the tokens of each sequence that was generated or read.

    Attributes:
        tokens: of each sequence, padding left out.
        choices: for each sequence, by decoder layer, the experts of each token.
    """

    tokens: list[Int[Tensor, " _"]] = field(default_factory=list)
    choices: list[dict[int, Int[Tensor, "_ _"]]] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file."""
        tensors = {f"{row}.tokens": tokens for row, tokens in enumerate(self.tokens)}
        for row, layers in enumerate(self.choices):
            tensors |= {f"{row}.{layer}": chosen.contiguous() for layer, chosen in layers.items()}
        save_file(tensors, str(path))

    @staticmethod
    def load(path: str | Path) -> Recording:
        """Read what `save` wrote.

        Raises:
            CheckpointError: there is no such file, or it is damaged.
        """
        try:
            tensors = load_file(str(path))
            rows = 1 + max((int(name.partition(".")[0]) for name in tensors), default=-1)
            made = Recording([tensors.pop(f"{row}.tokens") for row in range(rows)], [{} for _ in range(rows)])
            for name, chosen in tensors.items():
                row, _, layer = name.partition(".")
                made.choices[int(row)][int(layer)] = chosen
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{path} is no recording that can be read: {error}") from None
        return made


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Recording]:
    """Record which experts are chosen for every token while this context lasts, also by ``generate``.

    A pass without a cache begins new sequences; one with a cache goes on with those it holds. Beam search
    moves sequences between rows and cannot be recorded; draw samples instead.

    Raises:
        UnsupportedModelError: the model is dense or of a family that mixtura cannot work on.
        UserError: rows of a cache are not those that were recorded.
    """
    rerouting = Rerouting.of(model)
    if rerouting.swaps:
        raise UserError("only a model's own routers can be recorded; restore(model) first")
    recorder = _Recorder()
    rerouting.listeners.append(recorder)
    try:
        yield recorder.recording
    finally:
        rerouting.listeners.remove(recorder)


@contextmanager
def replay_routing(model: nn.Module, recording: Recording) -> Iterator[None]:
    """Let every forward pass in this context choose the experts that were recorded for its text.

    Each row must be a recorded text or the beginning of one, padded on either side or not, or one
    recorded text with the one token more that generation returns but never reads; that token goes where
    the live router sends it. Weights are the live router's own of the replayed experts, with gradients.
    Layers that activation checkpointing computes again in the backward pass, perhaps after this context
    has ended, replay the same.

    Raises:
        UserError: a row's text is not one that was recorded.
    """
    rerouting = Rerouting.of(model)
    if rerouting.swaps:
        raise UserError("only a model's own routers can replay; restore(model) first")
    replayer = _Replayer(recording)
    rerouting.listeners.append(replayer)
    try:
        yield
    finally:
        rerouting.listeners.remove(replayer)


@final
class _Recorder:
    def __init__(self) -> None:
        self.recording = Recording()
        self._first = 0
        self._rows = 0

    def before(self, here: Pass) -> None:
        """Ask for what routers return."""
        _require_tokens(here, "recorded")
        here.collecting = True

    def after(self, here: Pass, routings: Mapping[int, Routing]) -> Float[Tensor, ""] | None:
        """Keep each row's tokens and choices."""
        assert here.shape is not None
        assert here.valid is not None
        assert here.token_ids is not None
        rows, columns = here.shape
        made = self.recording
        if here.past == 0:
            self._first, self._rows = len(made.tokens), rows
            made.tokens += [torch.empty(0, dtype=torch.int32) for _ in range(rows)]
            made.choices += [{} for _ in range(rows)]
        elif rows != self._rows:
            raise UserError(
                f"{rows} rows go on from a cache of which {self._rows} were recorded; "
                "record from the first token on"
            )
        valid = here.valid.view(rows, columns)
        tokens = here.token_ids.view(rows, columns)
        for row in range(rows):
            place = self._first + row
            kept = tokens[row][valid[row]].to("cpu", torch.int32)
            made.tokens[place] = torch.cat([made.tokens[place], kept])
        for index, seen in here.seen.items():
            assert seen.expert_ids is not None
            if seen.expert_ids.flatten(0, -2).shape[0] != rows * columns:
                raise UserError(
                    f"layer {index} routed {len(seen.expert_ids)} rows for {rows * columns} tokens, "
                    "so its choices cannot be told apart by token; this family's routing cannot be recorded"
                )
            chosen = seen.expert_ids.detach().reshape(rows, columns, -1)
            for row in range(rows):
                kept = chosen[row][valid[row]].to("cpu", torch.int32)
                layers = made.choices[self._first + row]
                layers[index] = torch.cat([layers[index], kept]) if index in layers else kept
        return None

    def finish_step(self) -> None:
        """Nothing to do."""


@final
class _Replayer:
    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def before(self, here: Pass) -> None:
        """Force the choices recorded for this text."""
        _require_tokens(here, "replayed")
        assert here.shape is not None
        assert here.valid is not None
        assert here.token_ids is not None
        if here.past:
            raise UserError("routing is replayed on whole texts, not while decoding; leave the cache out")
        rows, columns = here.shape
        device = here.token_ids.device
        valid = here.valid.view(rows, columns)
        tokens = here.token_ids.view(rows, columns)
        for row in range(rows):
            text = tokens[row][valid[row]].to("cpu", torch.int32)
            found = self._find(text, row)
            places = valid[row].nonzero().squeeze(-1)
            for index, chosen in self._recording.choices[found].items():
                count = min(len(chosen), len(text))
                if index not in here.forced:
                    here.forced[index] = torch.full((rows * columns, chosen.shape[1]), -1, device=device)
                where = row * columns + places[:count]
                here.forced[index][where] = chosen[:count].to(device, torch.long)

    def after(self, here: Pass, routings: Mapping[int, Routing]) -> Float[Tensor, ""] | None:
        """Nothing to add."""
        return None

    def finish_step(self) -> None:
        """Nothing to do."""

    def _find(self, text: Int[Tensor, " n"], row: int) -> int:
        """The recorded sequence of this text; the one in the same row where several are alike."""
        known = self._recording.tokens
        order = sorted(range(len(known)), key=lambda place: place != row)
        for place in order:
            length = min(len(text), len(known[place]))
            if len(text) <= len(known[place]) + _UNFED and torch.equal(text[:length], known[place][:length]):
                return place
        agreed = [_agreeing(text, tokens) for tokens in known]
        best = max(agreed, default=0)
        raise UserError(
            f"row {row} is not a text that was recorded: of {len(known)} recorded, the nearest agrees with "
            f"its first {best} of {len(text)} tokens; replay the very text that was generated"
        )


def _agreeing(first: Int[Tensor, " n"], second: Int[Tensor, " m"]) -> int:
    length = min(len(first), len(second))
    differing = (first[:length] != second[:length]).nonzero()
    return int(differing[0]) if len(differing) else length


def _require_tokens(here: Pass, done: str) -> None:
    if here.token_ids is None:
        raise UserError(
            f"routing is {done} by token ids, and the model was given none; call it with input_ids"
        )

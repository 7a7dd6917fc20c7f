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
from mixtura.rerouting.recording import Recorder, require_tokens, sequences_of
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

    A pass without a cache begins new sequences, several in a row where they are packed; one with a cache goes
    on with those it holds, whatever other caches are used in between. Tokens that are cropped from a cache
    again, such as rejected candidates of assisted generation, are taken out of the recording. Beam search
    moves sequences between rows and is refused; draw samples instead.

    Raises:
        UnsupportedModelError: the model is dense or of a family that mixtura cannot work on.
        UserError: a cache holds what was not recorded, or its rows are moved.
    """
    rerouting = Rerouting.of(model)
    if rerouting.swaps:
        raise UserError("only a model's own routers can be recorded; restore(model) first")
    recording = Recording()
    recorder = Recorder(recording.tokens, recording.choices)
    rerouting.listeners.append(recorder)
    try:
        yield recording
    finally:
        recorder.leave()
        rerouting.listeners.remove(recorder)


@contextmanager
def replay_routing(model: nn.Module, recording: Recording) -> Iterator[None]:
    """Let every forward pass in this context choose the experts that were recorded for its text.

    Each row, or each sequence of those packed in one, must be a recorded text or the beginning of one, padded
    on either side or not, or one recorded text with the one token more that generation returns but never
    reads; that token goes where the live router sends it. Weights are the live router's own of the replayed
    experts, with gradients. Layers that activation checkpointing computes again in the backward pass, perhaps
    after this context has ended, replay the same.

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
class _Replayer:
    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def before(self, here: Pass) -> None:
        """Force the choices recorded for this text."""
        require_tokens(here, "replayed")
        assert here.token_ids is not None
        if here.past:
            raise UserError("routing is replayed on whole texts, not while decoding; leave the cache out")
        device, num_tokens = here.token_ids.device, len(here.token_ids)
        for number, places in enumerate(sequences_of(here)):
            text = here.token_ids[places].to("cpu", torch.int32)
            found = self._find(text, number)
            for index, chosen in self._recording.choices[found].items():
                count = min(len(chosen), len(text))
                if index not in here.forced:
                    here.forced[index] = torch.full((num_tokens, chosen.shape[1]), -1, device=device)
                here.forced[index][places[:count]] = chosen[:count].to(device, torch.long)

    def after(self, here: Pass, routings: Mapping[int, Routing]) -> Float[Tensor, ""] | None:
        """Nothing to add."""
        return None

    def finish_step(self) -> None:
        """Nothing to do."""

    def _find(self, text: Int[Tensor, " n"], row: int) -> int:
        """The recorded sequence of this text; the one of the same number where several are alike."""
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

"""Learning with which weights a layer's experts are best averaged into one feed-forward part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.data.tokens import TokenBatch
from mixtura.errors import SettingError, check_range
from mixtura.report.units import format_bytes
from mixtura.running.memory.available import available_bytes

_BATCH_TOKENS = 2048
_LEARNING_RATE = 0.05
_IGNORED = -100
_PARTS = ("gate_proj", "up_proj", "down_proj")


@final
class MixedExperts(nn.Module):
    """Logits of every layer's shares, and the matrices that an average by them is.

    Args:
        view: the MoE model; all of its experts are read.
        first: the share of expert 0 in every layer, which is not learned; None to learn that, too.

    Raises:
        SettingError: ``first`` is not in [0, 1).
    """

    def __init__(self, view: CheckpointView, first: float | None = None) -> None:
        super().__init__()
        if first is not None:
            check_range("condensing", "first", first, 0, 1)
            if first == 1:
                raise SettingError("first must be below 1, or nothing is left to learn")
        self.first = first
        self._stacks: dict[int, dict[str, Tensor]] = {}
        self.logits = nn.ParameterDict()
        for layer in view.layers:
            experts = [layer.expert(number) for number in range(layer.num_experts)]
            parts = {
                "gate_proj": [one.gate for one in experts if one.gate is not None],
                "up_proj": [one.up for one in experts],
                "down_proj": [one.down for one in experts],
            }
            self._stacks[layer.index] = {name: torch.stack(found).float() for name, found in parts.items()}
            # One for all, as the published code begins.
            self.logits[str(layer.index)] = nn.Parameter(torch.ones(layer.num_experts - (first is not None)))

    def shares(self, layer: int) -> Float[Tensor, " E"]:
        """The shares of a layer's experts, which sum to one."""
        learned: Tensor = self.logits[str(layer)].softmax(0)
        if self.first is None:
            return learned
        return torch.cat([learned.new_tensor([self.first]), (1 - self.first) * learned])

    def matrices(self) -> dict[str, Tensor]:
        """The feed-forward parts, by their names in the dense model."""
        return {
            f"model.layers.{layer}.mlp.{name}.weight": torch.einsum("e,erc->rc", self.shares(layer), stack)
            for layer, parts in self._stacks.items()
            for name, stack in parts.items()
        }


def check_memory(view: CheckpointView) -> None:
    """Refuse a model whose experts are not in memory all at once, in float32.

    Raises:
        SettingError: says how much they take.
    """
    needed = 4 * sum(
        layer.num_experts * len(_PARTS) * layer.shape.d_model * layer.shape.d_expert for layer in view.layers
    )
    if needed > available_bytes():
        raise SettingError(
            f"shares are learned with all experts in memory, which take {format_bytes(needed)} of the "
            f"{format_bytes(available_bytes())} there are; average by --shares load, or on a larger machine"
        )


def learned_shares(
    view: CheckpointView,
    dense: Any,
    tokens: TokenBatch,
    *,
    first: float | None = None,
    passes: int = 4,
    notify: Callable[[str], None] | None = None,
) -> Mapping[int, Sequence[float]]:
    """The shares with which the dense model predicts a text best, by gradients; nothing else is changed.

    Args:
        view: the MoE model.
        dense: the dense model of any average of its experts, in memory.
        tokens: the text.
        first: the share of expert 0, which is then not learned.
        passes: over the text.
        notify: told the loss of each pass.

    Returns:
        By decoder layer, the share of each expert.
    """
    mixed = MixedExperts(view, first)
    dense.float().requires_grad_(False)
    optimizer = torch.optim.Adam(mixed.parameters(), lr=_LEARNING_RATE)
    with torch.enable_grad():
        for number in range(passes):
            total, count = 0.0, 0
            for ids, mask in _batches(tokens):
                labels = ids.masked_fill(~mask, _IGNORED)[:, 1:]
                given = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
                logits = functional_call(dense, mixed.matrices(), kwargs=given).logits[:, :-1]
                loss = F.cross_entropy(
                    logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORED, reduction="sum"
                )
                predicted = int((labels != _IGNORED).sum())
                optimizer.zero_grad()
                (loss / predicted).backward()
                optimizer.step()
                total, count = total + float(loss.detach()), count + predicted
            if notify is not None:
                notify(f"pass {number + 1} of {passes}: loss {total / count:.4f}")
    with torch.no_grad():
        found = {layer.index: mixed.shares(layer.index).double() for layer in view.layers}
    return {index: (own / own.sum()).tolist() for index, own in found.items()}


def _batches(tokens: TokenBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences that have something to predict."""
    for batch in tokens.split(_BATCH_TOKENS):
        mask = batch.attention_mask.bool()
        if bool(mask[:, 1:].any()):
            yield batch.input_ids, mask

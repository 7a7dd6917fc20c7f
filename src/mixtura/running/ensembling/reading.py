"""Texts as several models read them: each model runs when it is asked, with a cache of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.machine.releases import returned_cache, with_cache
from mixtura.methods.ensembles import Change
from mixtura.running.decoders.skipping import decoder_layers


class _Read(NamedTuple):
    """What a model says of columns up to the newest that it has read, and what it keeps of them."""

    num_columns: int
    logits: Tensor
    hidden: Tensor
    cache: Any


@final
class Reading:
    """Rows of text that begin side by side, padded on the right; see `mixtura.methods.ensembles.Text`.

    Args:
        models: that read it, frozen; of a method's own model, which is last, gradients are kept.
        token_ids: the first columns.
        valid: 1 where they are no padding.
        prompt: by row, how many tokens at the beginning are the prompt.
        has_own: whether the last model is the method's own.
        grows: whether columns will follow, for which models keep what they have read.

    Attributes:
        token_ids: the new columns.
        valid: 1 where they are no padding.
        seen: the same of all columns.
        prompt: by row, how many tokens at the beginning are the prompt.
        num_models: that are asked, the method's own left out.
        own: the place of the method's own model, after all others.
        num_passes: by model, forward passes so far.
        num_tokens: by model, tokens that it has run.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        token_ids: Int[Tensor, "S T"],
        valid: Int[Tensor, "S T"] | None = None,
        prompt: Int[Tensor, " S"] | None = None,
        *,
        has_own: bool = False,
        grows: bool = False,
    ) -> None:
        self.token_ids = self._all = token_ids
        self.valid = self.seen = torch.ones_like(token_ids) if valid is None else valid
        self.prompt = self.seen.sum(1) if prompt is None else prompt
        self.num_models = len(models) - has_own
        self.own = self.num_models
        self.num_passes = [0] * len(models)
        self.num_tokens = [0] * len(models)
        self._models = models
        self._grows = grows
        self._read: dict[int, _Read] = {}
        self._states: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def extend(self, token_ids: Int[Tensor, "S T"]) -> None:
        """Columns that follow, without padding; they are the new ones now."""
        self.token_ids, self.valid = token_ids, torch.ones_like(token_ids)
        self._all = torch.cat([self._all, token_ids], dim=1)
        self.seen = torch.cat([self.seen, self.valid], dim=1)
        self._states = {}

    def logits(self, model: int) -> Tensor:
        """What a model says comes after each new column, in float32."""
        return self._up_to_here(model).logits[:, -self.token_ids.shape[1] :]

    def hidden(self, model: int) -> Tensor:
        """What a model's output layer is given for each new column."""
        return self._up_to_here(model).hidden[:, -self.token_ids.shape[1] :]

    def states(self, model: int, stacks: int) -> tuple[Tensor, ...]:
        """What the last layer of each of so many stacks returned, for all columns from the first."""
        known = self._states.get((model, stacks))
        if known is None:
            kept: list[Tensor] = []

            def keep(stack: int, states: Tensor) -> Tensor:
                del stack
                kept.append(states)
                return states

            with torch.no_grad(), changing(self._models[model], stacks, keep):
                self._run(model, self._all, None)
            known = self._states[model, stacks] = tuple(kept)
        return known

    def changed(self, model: int, stacks: int, rows: Tensor, change: Change) -> Tensor:
        """What a model says of the new columns of some rows where ``change`` replaces these states."""
        with changing(self._models[model], stacks, change):
            output = self._run(model, self._all[rows], None, self.seen[rows])
        logits: Tensor = output.logits[:, -self.token_ids.shape[1] :].float()
        return logits

    def _up_to_here(self, model: int) -> _Read:
        known = self._read.get(model)
        behind = self._all.shape[1] - (0 if known is None else known.num_columns)
        if known is None or behind:
            learns = torch.is_grad_enabled() and model == self.own
            with torch.set_grad_enabled(learns):
                output = self._run(model, self._all[:, -behind:], known)
            cache = returned_cache(output) if self._grows else None
            known = self._read[model] = _Read(
                self._all.shape[1], output.logits.float(), output.hidden_states[-1].float(), cache
            )
        return known

    def _run(self, model: int, token_ids: Tensor, known: _Read | None, valid: Tensor | None = None) -> Any:
        """A forward pass over columns, after those that the model has read."""
        module = self._models[model]
        valid = self.seen if valid is None else valid
        options: dict[str, Any] = with_cache(None if known is None else known.cache)
        if not bool(valid.all()):
            options["attention_mask"] = valid.to(module.device)
        self.num_passes[model] += 1
        self.num_tokens[model] += int(valid[:, -token_ids.shape[1] :].sum())
        return module(
            input_ids=token_ids.to(module.device),
            use_cache=self._grows and valid is self.seen,
            output_hidden_states=True,
            return_dict=True,
            **options,
        )


def ends_of_stacks(num_layers: int, stacks: int) -> list[int]:
    """The last layer of each of so many stacks of about as many layers.

    >>> ends_of_stacks(5, 2)
    [1, 4]
    """
    return [num_layers * (place + 1) // stacks - 1 for place in range(stacks)]


@contextmanager
def changing(model: PreTrainedModel, stacks: int, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Passes in here go on from what ``change`` makes of what the last layers of stacks return."""
    layers = decoder_layers(model)

    def hook_of(stack: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, given: Any, output: Any) -> Any:
            del module, given
            if isinstance(output, tuple):
                return (change(stack, output[0]), *output[1:])
            return change(stack, output)

        return hook

    ends = ends_of_stacks(len(layers), stacks)
    hooks = [layers[layer].register_forward_hook(hook_of(stack)) for stack, layer in enumerate(ends)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()

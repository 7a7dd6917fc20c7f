"""What the arguments of a model's forward say of its tokens: padding, positions, sequences, labels, cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from mixtura.machine.releases import given_cache
from mixtura.rerouting.masks import Padding, Size, padding_of
from mixtura.rerouting.passes import Pass

_IGNORED = -100
# How collators for packed rows say where sequences begin, counted through all rows.
_LENGTHS = "cu_seq_lens_q"
# Or, for layers with a state, which sequence a token is of.
_NUMBERS = "seq_idx"


def described(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> Pass:
    """A pass of a model that was given these arguments.

    Raises:
        UserError: it cannot be told which tokens are padding.
    """
    made = Pass(number=number, training=model.training and torch.is_grad_enabled())
    given = _bound(type(model).forward, model, args, kwargs)
    made.num_labels, total = num_labels(model, given), given.get("num_items_in_batch")
    if total is not None and made.num_labels is not None:
        made.num_items = torch.as_tensor(total, device=made.num_labels.device)
    ids = given.get("input_ids")
    shown = ids if isinstance(ids, Tensor) else given.get("inputs_embeds")
    if not isinstance(shown, Tensor):
        return made
    cache = given_cache(given)
    size = Size(shown.shape[0], shown.shape[1], _length(cache))
    padding = padding_of(given.get("attention_mask"), size, shown.device)
    made.shape, made.past = (size.rows, size.columns), size.past
    made.cache = cache if is_cache(cache) else None
    valid = padding.known[:, -size.columns :]
    made.valid = valid.reshape(-1)
    places = _positions(given.get("position_ids"), size)
    begun = _begun(given, padding, places, size)
    made.sequence_ids = begun.reshape(-1).cumsum(0) - 1
    made.prompt = _prompt(given, made)
    if places is None:
        places = (padding.known.cumsum(-1) - 1).clamp(min=0)[:, -size.columns :]
        if _LENGTHS in given:
            places = places - torch.where(begun, places, 0).cummax(-1).values
    made.positions = places.reshape(-1)
    made.token_ids = ids.reshape(-1) if isinstance(ids, Tensor) else None
    return made


def is_cache(value: Any) -> bool:
    """Whether it is a cache of keys and values that says how long it is."""
    return hasattr(value, "get_seq_length")


def cache_of(output: Any) -> Any:
    """The cache that a model has returned; None where it has none."""
    values = output if isinstance(output, tuple) else getattr(output, "values", tuple)()
    return next((value for value in values if is_cache(value)), None)


def _bound(
    forward: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    try:
        bound = inspect.signature(forward).bind_partial(model, *args, **kwargs).arguments
    except TypeError:
        return dict(kwargs)
    return dict(bound) | dict(bound.get("kwargs", {}))


def _length(cache: Any) -> int:
    """Tokens in a cache of keys and values."""
    return int(cache.get_seq_length()) if is_cache(cache) else 0


def _positions(given: Any, size: Size) -> Int[Tensor, "R T"] | None:
    """Positions in the text, where the model was given any; those of pictures alone are none."""
    if not isinstance(given, Tensor):
        return None
    # Some models are given places in text, time, height and width, the text's first.
    places = given[0] if given.ndim == 3 and len(given) == 4 else given
    if places.ndim > 2 or places.shape[-1] != size.columns:
        return None
    return places.expand(size.rows, size.columns)


def _begun(
    given: Mapping[str, Any], padding: Padding, places: Int[Tensor, "R T"] | None, size: Size
) -> Bool[Tensor, "R T"]:
    """Where sequences begin: with every row, and within one that several are packed in."""
    valid = padding.known[:, -size.columns :]
    begun = torch.zeros_like(valid)
    begun[:, 0] = True
    if size.past:
        return begun
    columns = torch.arange(size.columns, device=valid.device)
    last = torch.where(valid, columns, -1).cummax(-1).values
    previous = torch.cat([last.new_full((len(last), 1), -1), last[:, :-1]], dim=1)
    inside = valid & (previous >= 0)
    if places is not None:
        step = places - places.gather(-1, previous.clamp(min=0))
        # transformers keeps apart what does not go on, where no mask says otherwise.
        begun |= inside & ((step <= 0) | (step.ne(1) if not padding.told else step.le(0)))
    if padding.linked is not None:
        begun |= inside & ~padding.linked
    starts, numbers = given.get(_LENGTHS), given.get(_NUMBERS)
    if isinstance(starts, Tensor):
        begun.view(-1)[starts[starts < begun.numel()].long()] = True
    if isinstance(numbers, Tensor) and numbers.shape[-1] == size.columns:
        begun[:, 1:] |= numbers.expand(size.rows, -1).diff(dim=-1) != 0
    return begun


def _prompt(given: Mapping[str, Any], here: Pass) -> Bool[Tensor, " T"] | None:
    """Which tokens come before all that the labels of their sequence ask for, the last of them included."""
    labels, shifted = given.get("labels"), given.get("shift_labels")
    known = shifted if isinstance(shifted, Tensor) else labels
    ids = here.sequence_ids
    if not isinstance(known, Tensor) or ids is None or here.shape is None or known.shape != here.shape:
        return None
    asked = known.ne(_IGNORED)
    if not isinstance(shifted, Tensor):
        # A token's label is what the one before it is to predict.
        asked = torch.cat([asked[:, 1:], torch.zeros_like(asked[:, :1])], dim=1)
    last = torch.cat([ids[1:] != ids[:-1], ids.new_ones(1, dtype=torch.bool)])
    counted = (asked.reshape(-1) & ~last).long()
    before = counted.cumsum(0) - counted
    first = torch.cat([ids.new_ones(1, dtype=torch.bool), last[:-1]])
    return before == torch.where(first, before, 0).cummax(0).values


def num_labels(model: Any, given: Mapping[str, Any]) -> Int[Tensor, ""] | None:
    """The labels that the model's loss is over; None where it was given none."""
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if not isinstance(labels, Tensor):
        return None
    if isinstance(shifted, Tensor):
        labels = shifted
    elif LOSS_MAPPING.get(getattr(model, "loss_type", None)) in (ForCausalLMLoss, None) and labels.ndim > 1:
        labels = labels[..., 1:]
    return labels.ne(_IGNORED).sum()


@final
@dataclass(frozen=True, slots=True)
class Labels:
    """Labels counted before a step is trained on: of this process, and of all that train together."""

    own: int = 0
    whole: int = 0

    def plus(self, more: Tensor | None) -> Labels:
        """With those of another pass."""
        return self if more is None else Labels(self.own + int(more), self.whole + int(more))

    def over_processes(self) -> Labels:
        """With those of all processes."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        whole = torch.tensor(self.own, device=device)
        dist.all_reduce(whole)
        return Labels(self.own, int(whole))

    def scale(self, here: Pass) -> float:
        """By what a loss that is a part of all processes' is to be multiplied.

        A caller that divides by the labels of all processes multiplies by the number of processes what these
        then average; one that divides by each process's own averages only.
        """
        total = None if here.num_items is None else float(here.num_items)
        if not total:
            return 0.0
        averages = abs(total - self.own) < abs(total - self.whole)
        return float(dist.get_world_size()) if averages and self.own else 1.0

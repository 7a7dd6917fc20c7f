"""Teaching a router that serves all layers which experts' neurons a dense model's tokens activate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.checkpoints.dense.view import DenseView
from mixtura.data.tokens import TokenBatch
from mixtura.errors import UserError
from mixtura.methods import create
from mixtura.running.dense_overlaps import overlaps
from mixtura.running.dense_tracing import Group
from mixtura.types import LayerShape, RouterInput
from mixtura.types.upcycling import Build, Fill, Recipe, UpcycleShape, array_name

# Sequences of a step.
_ROWS = 8
_RATE = 3e-3


def by_domain(tokens: TokenBatch) -> tuple[TokenBatch, ...]:
    """The sequences of each domain."""
    parts = []
    for number, name in enumerate(tokens.domain_names):
        own = tokens.domains == number
        if bool(own.any()):
            zeros = torch.zeros(int(own.sum()), dtype=tokens.domains.dtype)
            parts.append(TokenBatch(tokens.input_ids[own], tokens.attention_mask[own], zeros, (name,)))
    return tuple(parts)


def taught(
    view: DenseView,
    recipe: Recipe,
    shape: UpcycleShape,
    groups: Sequence[Group],
    notify: Callable[[str], None],
) -> Recipe:
    """The recipe with its router's parameters, where it asks for lessons; else as it is.

    Each step the router reads sequences, and the loss of its `distillation` is summed over layers.

    Raises:
        UserError: the router is none that can be taught so.
    """
    if not recipe.lessons:
        return recipe
    choice = dict(recipe.own["moe"]["router"])
    name = choice.pop("name")
    width = LayerShape(d_model=view.shape.d_model, d_expert=1, num_experts=shape.num_experts)
    router: Any = create("routers", name, width, **choice)
    if not hasattr(router, "distillation"):
        raise UserError(f"the router {name} has no loss that it could be taught by; choose read_me")
    tokens = [group.tokens for group in groups]
    notify("counting which experts' neurons the text activates")
    neurons = _neurons(recipe, view.shape.num_layers)
    targets = [overlaps(view, batch, neurons) for batch in tokens]
    optimizer = torch.optim.AdamW(router.parameters(), lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.lessons)
    generator = torch.Generator().manual_seed(shape.seed % (1 << 63))
    places = [(part, row) for part, batch in enumerate(tokens) for row in range(batch.num_sequences)]
    with torch.enable_grad():
        for step in range(recipe.lessons):
            notify(f"teaching the router, step {step + 1} of {recipe.lessons}")
            drawn = torch.randint(len(places), (_ROWS,), generator=generator).tolist()
            loss = torch.stack([_loss(router, tokens, targets, *places[one]) for one in drawn]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return _filled(recipe, router)


def _neurons(recipe: Recipe, num_layers: int) -> list[list[Tensor]]:
    found: list[list[Tensor]] = [[] for _ in range(num_layers)]
    for action in recipe.actions:
        if isinstance(action, Build) and action.expert is not None:
            found[action.layer].append(recipe.arrays[str(action.neurons)])
    return found


def _loss(
    router: Any, tokens: Sequence[TokenBatch], targets: Sequence[Tensor], part: int, row: int
) -> Float[Tensor, ""]:
    """The loss of one sequence, a mean over its tokens and a sum over layers."""
    valid = tokens[part].attention_mask[row].bool()
    words = tokens[part].input_ids[row][valid]
    nothing = torch.zeros(len(words), router.shape.d_model)
    told = RouterInput.of(nothing, token_ids=words, positions=torch.arange(len(words)), training=True)
    logits = router(told).state
    return torch.stack([router.distillation(logits, layer[row][valid]) for layer in targets[part]]).sum()


def _filled(recipe: Recipe, router: Any) -> Recipe:
    arrays = dict(recipe.arrays)
    actions = list(recipe.actions)
    for name, parameter in router.named_parameters():
        value = parameter.detach().contiguous()
        arrays[array_name(value)] = value
        actions.append(Fill(0, name, values=array_name(value)))
    return replace(recipe, actions=tuple(actions), arrays=arrays)

"""An independent record of a model's routing, and text to make it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.checkpoints.view import open_model
from mixtura.data.tokens import TokenBatch

VOCAB = 60


def text(lengths: list[int], domains: list[int], seed: int = 0) -> TokenBatch:
    """Random tokens as sequences of the given lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.zeros((len(lengths), width), dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, :length] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, :length] = 1
    names = tuple(f"domain{number}" for number in range(max(domains) + 1))
    return TokenBatch(input_ids, mask, torch.tensor(domains), names)


@dataclass
class Seen:
    """What entered one experts module for one token of the text."""

    domain: int
    hidden: Tensor
    experts: list[int]
    weights: list[float]


@torch.no_grad()
def record(model: nn.Module, tokens: TokenBatch) -> dict[str, list[Seen]]:
    """What enters each experts module, sequence by sequence without any padding, by its name."""
    found: dict[str, list[Seen]] = {layer.name: [] for layer in open_model(model).layers}
    domain = 0

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
            for hidden, experts, weights in zip(*inputs, strict=True):
                found[name].append(Seen(domain, hidden.clone(), experts.tolist(), weights.tolist()))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in found]
    try:
        for row in range(tokens.num_sequences):
            domain = int(tokens.domains[row])
            ids = tokens.input_ids[row][tokens.attention_mask[row].bool()]
            if ids.numel():
                model(input_ids=ids[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def expert_output(experts: Any, hidden: Tensor, expert: int) -> Tensor:
    """One expert's output for one token by transformers' own eager experts, with weight 1."""
    index = torch.tensor([[expert]])
    return experts(hidden[None], index, torch.ones((1, 1), dtype=hidden.dtype))[0]

"""Tiny models that share a tokenizer, and texts of which it is written down what models say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from mixtura.authoring.contracts._decoded import tokenizer
from mixtura.methods.ensembles import Change, Ensemble, Facts
from mixtura.running.ensembling.team import Team

VOCABULARY = 64
_WIDTH = 4


@final
@dataclass(slots=True, eq=False)
class Said:
    """A text after each column of which every model says the same; see `mixtura.methods.ensembles.Text`."""

    token_ids: Tensor
    valid: Tensor
    seen: Tensor
    prompt: Tensor
    num_models: int
    own: int
    facts: Facts
    says: Tensor

    def logits(self, model: int) -> Tensor:
        """What was written down."""
        return self.says[model].expand(*self.token_ids.shape, -1)

    def hidden(self, model: int) -> Tensor:
        """Ones."""
        del model
        return torch.ones(*self.token_ids.shape, _WIDTH)

    def states(self, model: int, stacks: int) -> tuple[Tensor, ...]:
        """Ones."""
        return (self.hidden(model),) * stacks

    def changed(self, model: int, stacks: int, rows: Tensor, change: Change) -> Tensor:
        """What was written down, and what is added to states."""
        states = before = self.hidden(model)[rows]
        for stack in range(stacks):
            states = change(stack, states)
        return self.logits(model)[rows] + (states - before).sum(-1, keepdim=True)


def said(
    logits: Float[Tensor, "M V"], token_ids: Sequence[int] = (0,), own: Float[Tensor, " V"] | None = None
) -> Said:
    """One row of text, of whose every column models say this, a method's own model ``own``."""
    ids = torch.tensor([list(token_ids)])
    says = logits if own is None else torch.cat([logits, own[None]])
    facts = Facts(vocabulary=logits.shape[1], widths=(_WIDTH,) * len(says), num_layers=(2,) * len(says))
    return Said(
        token_ids=ids,
        valid=torch.ones_like(ids),
        seen=torch.ones_like(ids),
        prompt=torch.tensor([1]),
        num_models=len(logits),
        own=len(logits),
        facts=facts,
        says=says,
    )


def tiny(family: str, seed: int) -> PreTrainedModel:
    """A tiny model that says much."""
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes |= {"vocab_size": VOCABULARY, "intermediate_size": 48, "max_position_embeddings": 128}
    sizes |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: PreTrainedModel = (
            LlamaForCausalLM(LlamaConfig(hidden_size=32, **sizes))
            if family == "llama"
            else Qwen2ForCausalLM(Qwen2Config(hidden_size=24, **sizes))
        )
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
    return made.eval()


def team(ensemble: Ensemble, *, equal: bool = False) -> Team:
    """Two models of two families, or one twice, and one of the method's own where it needs one."""
    first = tiny("llama", 1)
    made = Team((first, first if equal else tiny("qwen2", 2)), tokenizer(), ("first", "second"))
    return made.with_own(ensemble, tiny("llama", 3))


def built(ensemble: Ensemble, of: Team, *, apart: float = 0.0) -> Ensemble:
    """The ensemble with its parts as they begin; ``apart`` moves each of them, as training would."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        ensemble.build(of.facts)
        for one in ensemble.parameters():
            one.add_(apart * torch.randn_like(one))
    return ensemble.eval()

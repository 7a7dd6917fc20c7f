"""Who takes part in the arena of adapters, each made as large as the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch

from mixtura.data import specimen
from mixtura.data.examples import Example
from mixtura.methods import header

# Trained parameters of LoRA of rank 4 on all experts of the specimen.
TRAINED: Final = 688_128
NONE, FULL = "no tuning", "full fine-tuning"
PEFT_EXPERTS, PEFT_ATTENTION = "PEFT LoRA on experts", "PEFT LoRA on attention"
BASELINES: Final = (NONE, PEFT_EXPERTS, PEFT_ATTENTION, FULL)
REFERENCE: Final = PEFT_EXPERTS
# One rate for all, but for what trains matrices of the base in full size.
RATE, RATE_OF_MATRICES = 2e-3, 2e-4
_LARGEST_RANK = 1024
_TRIED = (16, 32)


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """A method or baseline, with the settings by which it has about as many trained parameters as asked."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Its learning rate."""
        whole = self.name == FULL or (
            self.name not in BASELINES and "trains_base" in header("adapters", self.name).tags
        )
        return RATE_OF_MATRICES if whole else RATE


def base() -> Any:
    """The specimen in float32, as PEFT's own adapters need it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(specimen.path(), dtype=torch.float32)


def sized(name: str, examples: Sequence[Example], seed: int) -> Entry:
    """An adapter with the rank by which it trains about `TRAINED` parameters.

    Raises:
        UserError: the method does not suit the specimen.
    """
    known = {setting.name for setting in header("adapters", name).settings}
    if "rank" not in known:
        # What trains whole experts has as few of them as it can.
        return Entry(name, {"top_p": 0.01} if "top_p" in known else {})

    def of_size(size: int) -> Entry:
        # Where a rank is not what is trained, a budget says what is.
        rank = 2 * size if "budget" in known else size
        more = {"budget": size} if "budget" in known else {}
        return Entry(name, {"rank": rank, **({"alpha": 2.0 * rank} if "alpha" in known else {}), **more})

    # All are sums of products of a rank: two sizes say the third.
    few, more = (num_trained(adapted(of_size(size), examples, seed)) for size in _TRIED)
    each = max((more - few) / (_TRIED[1] - _TRIED[0]), 1.0)
    return of_size(min(max(1, round(_TRIED[0] + (TRAINED - few) / each)), _LARGEST_RANK))


def adapted(entry: Entry, examples: Sequence[Example], seed: int) -> Any:
    """The specimen with what an entry puts on it.

    Raises:
        UserError: the method does not suit the specimen.
    """
    from peft import LoraConfig, get_peft_model

    import mixtura
    from mixtura.train.tuning.run import first_tokens

    if entry.name == NONE:
        return base().requires_grad_(False)
    if entry.name == FULL:
        return base()
    if entry.name in BASELINES:
        where: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 64}
        if entry.name == PEFT_EXPERTS:
            parameters = ["experts.gate_up_proj", "experts.down_proj"]
            where = {"target_modules": [], "target_parameters": parameters, "r": 4}
        return get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", lora_alpha=2 * where["r"], **where))
    model = mixtura.load(specimen.path(), dtype=torch.float32)
    given = header("adapters", entry.name)
    settings = dict(entry.settings) | ({"seed": seed} if "seed" in {s.name for s in given.settings} else {})
    config = mixtura.AdapterConfig(method=entry.name, settings=settings, task_type="CAUSAL_LM")
    if "trains_base" in given.tags:
        config = config.chosen_from(mixtura.observe(model, first_tokens(examples, 4096, 256), progress=False))
    return get_peft_model(model, config)


def num_trained(model: Any) -> int:
    """How many parameters get gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

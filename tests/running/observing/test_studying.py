"""Running a model again for analyses: what is read, and that it is as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from analysed_models import FAMILIES, TEXT, studied
from families import tiny_model
from recording import expert_output, record

from mixtura.checkpoints.view import open_model
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.methods import create
from mixtura.methods.analyses import Evidence
from mixtura.running.observing.analyzing import analyze


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_study_reads_is_what_the_model_does(family: str) -> None:
    """Logits, choices, weights and the experts' inputs, against hooks of the test's own; and all put back."""
    model: Any = tiny_model(family)
    before, hooks = copy.deepcopy(model.state_dict()), _num_hooks(model)
    seen = record(model, TEXT)
    ids = TEXT.input_ids[0].tolist()
    with studied(model, steers=True) as study:
        read = study.run([ids], scores=True)[0]
        torch.testing.assert_close(read.logits, model(TEXT.input_ids[:1], use_cache=False).logits[0])
        for layer in open_model(model).layers:
            own = seen[layer.name][: len(ids)]
            assert [sorted(one.experts) for one in own] == [
                sorted(x) for x in read.chosen[layer.index].tolist()
            ]
            hidden = torch.stack([one.hidden for one in own])
            torch.testing.assert_close(read.inputs[layer.index], hidden)
            assert read.scores[layer.index].shape == (len(ids), layer.num_experts)
            made = study.outputs(layer.index, hidden[:2])
            plain = expert_output(model.get_submodule(layer.name), hidden[1], 3)
            torch.testing.assert_close(made[3, 1], plain)
    assert _num_hooks(model) == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_study_leaves_the_mode_of_every_module(model: Any) -> None:
    one = copy.deepcopy(model).train()
    one.model.layers[0].eval()
    modes = [module.training for module in one.modules()]
    with studied(one, steers=True) as study:
        study.run([[3, 4, 5]], training=True)
    assert [module.training for module in one.modules()] == modes


def test_what_cannot_be_steered_is_said() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(UnsupportedModelError):
        analyze(None, "route_explainer", model=dense, tokens=TEXT)
    with pytest.raises(UserError, match="give analyze both model and tokens"):
        analyze(None, "route_explainer", model=dense)
    with pytest.raises(UserError, match="mixtura observe MODEL"):
        create("analyses", "batch_leak").measure(Evidence())


def _num_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

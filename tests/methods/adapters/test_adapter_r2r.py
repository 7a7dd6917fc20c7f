"""What the adapter r2r promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapting.adapted_models import dense, stir
from methods.adapters.adapter_inputs import SEQUENCES, X, added, by_shares, given, prompt_means, stirred
from methods.adapters.adapter_sites import linear_site
from peft import get_peft_model

import mixtura
from mixtura.errors import UserError


def test_r2r_gives_a_query_one_lora_from_the_probed_layer_on() -> None:
    below, here = stirred("r2r", linear_site(1), rank=3), stirred("r2r", linear_site(2), rank=3, alpha=5.0)
    assert below.change(given()).matrices == {}
    assert [name for name, _ in below.named_parameters()] == ["layers.0", "layers.1"]
    chosen = []
    for mean in prompt_means(X):
        logits = here.layers[1] @ (here.layers[0] @ mean).clamp(min=0)
        chosen.append(int(logits.argmax()))
    shares = [[float(e == chosen[int(s)]) for e in range(3)] for s in SEQUENCES]
    change = here.change(given())
    torch.testing.assert_close(added(change), by_shares(here, shares, 5.0 / 3), rtol=1e-8, atol=1e-10)
    change.shares.square().sum().backward()
    assert here.layers[0].grad.abs().sum() > 0


def test_guidance_is_the_cross_entropy_with_the_task_however_many_layers_lie_below() -> None:
    settings = {"rank": 2, "probe": 1.0, "task": 2, "guidance": 0.7}
    config = mixtura.AdapterConfig(method="r2r", settings=settings, task_type="CAUSAL_LM")
    model = get_peft_model(dense(), config).double().train()
    stir(model)
    seen: list[torch.Tensor] = []
    q_proj = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    ids = torch.arange(10).view(2, 5)
    labels = ids.clone()
    labels[:, :3] = -100
    made = model(input_ids=ids, labels=labels)
    router: Any = model.get_submodule(
        "base_model.model.model.layers.0.self_attn.q_proj.mixtura_adapter.default.layers"
    )
    total = 0.0
    for row in range(2):
        logits = router[1] @ (router[0] @ seen[0][row, :3].mean(0)).clamp(min=0)
        total += float((torch.logsumexp(logits, 0) - logits[2]).detach()) / 2
    shifted = torch.nn.functional.cross_entropy(
        made.logits[:, :-1].double().reshape(-1, 32), labels[:, 1:].reshape(-1)
    )
    assert float(made.loss) - float(shifted) == pytest.approx(0.7 * total, rel=1e-5)


def test_layers_below_the_probe_alone_are_refused() -> None:
    config = mixtura.AdapterConfig(method="r2r", settings={"probe": 1.0}, layers_to_transform=[0])
    with pytest.raises(UserError, match="what it changes begins in layer 1 of layers 0 to 1; put"):
        get_peft_model(dense(), config)

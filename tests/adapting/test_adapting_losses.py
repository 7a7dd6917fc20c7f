"""What adapters add to the loss: its value, its scale, and its gradient in every way of computing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapting.adapted_models import adapted, plain
from families import tiny_inputs

from mixtura.adapting.layers import ExpertsLayer
from mixtura.adapting.linears import LinearLayer
from mixtura.errors import SettingError
from mixtura.machine.releases import checkpoint_layers
from mixtura.methods.adapters import expert_lora
from mixtura.methods.adapters.expert_lora import ExpertLora
from mixtura.types import Change, RouterInput

SETTINGS = {"rank": 2, "num_experts": 3, "top_k": 1, "balance": 0.5, "seed": 4}
IDS = tiny_inputs(plain("qwen3_moe"))["input_ids"]
GATE = "base_model.model.model.layers.0.self_attn.q_proj.mixtura_adapter.default.gate"


def model_of(balance: float = 0.5) -> torch.nn.Module:
    """A model with LoRA experts that are kept in use."""
    return adapted("qwen3_moe", "moe_lora", settings=SETTINGS | {"balance": balance}).train()


def test_the_loss_is_the_models_and_the_mean_of_every_layers() -> None:
    model = model_of()
    found: list[torch.Tensor] = []

    def look(layer: LinearLayer, args: tuple[torch.Tensor]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        found.append(layer.adapter("default").change(RouterInput.of(rows, training=True)).losses["balance"])

    for module in model.modules():
        if isinstance(module, LinearLayer):
            module.register_forward_pre_hook(look)
    loss = model(input_ids=IDS, labels=IDS).loss
    alone = model_of(0.0)(input_ids=IDS, labels=IDS).loss
    assert len(found) > 1
    torch.testing.assert_close(loss, alone + torch.stack(found).mean())


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_its_gradient_is_scaled_as_the_loss_is(reentrant: bool | None) -> None:
    """What balancing adds to a gradient, once for the loss and once for three times the loss."""
    parts = []
    for factor in (1.0, 3.0):
        found = []
        for balance in (0.5, 0.0):
            model = model_of(balance)
            if reentrant is not None:
                model.enable_input_require_grads()
                checkpoint_layers(model, use_reentrant=reentrant)
            (factor * model(input_ids=IDS, labels=IDS, use_cache=False).loss).backward()
            found.append(dict(model.named_parameters())[GATE].grad)
        parts.append(found[0] - found[1])
    assert float(parts[0].abs().max()) > 1e-6
    torch.testing.assert_close(parts[1], 3.0 * parts[0], rtol=1e-3, atol=1e-6)


def test_nothing_is_added_where_nothing_is_learned() -> None:
    model = model_of().eval()
    with torch.no_grad():
        loss = model(input_ids=IDS, labels=IDS).loss
        torch.testing.assert_close(loss, model_of(0.0).eval()(input_ids=IDS, labels=IDS).loss)


@pytest.mark.parametrize("implementation", ["mixtura", "eager"])
def test_losses_of_changes_of_experts_are_added_too(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of experts that punishes large matrices: loss and gradient have the punishment."""
    monkeypatch.setitem(expert_lora.METHOD, "tags", ["changes:experts", "mergeable", "adds_loss"])
    unpunished = ExpertLora.change

    def punished(adapter: ExpertLora, inputs: RouterInput) -> Change:
        sizes = [matrix.square().mean() for matrix in adapter.parameters()]
        return replace(unpunished(adapter, inputs), losses={"size": torch.stack(sizes).sum()})

    losses, gradients = [], []
    for change in (unpunished, punished):
        monkeypatch.setattr(ExpertLora, "change", change)
        model = adapted("qwen3_moe", "expert_lora", implementation).train()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    layers = [module for module in model.modules() if isinstance(module, ExpertsLayer)]
    assert len(layers) > 1
    wanted = sum(p.square().mean() for one in layers for p in one.adapter("default").parameters()) / len(
        layers
    )
    torch.testing.assert_close(losses[1] - losses[0], wanted.detach(), rtol=1e-3, atol=1e-5)
    parameters = dict(model.named_parameters())
    for name, gradient in gradients[1].items():
        matrix = parameters[name]
        more = 2 * matrix.detach() / matrix.numel() / len(layers)
        torch.testing.assert_close(gradient - gradients[0][name], more, rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_not_told_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    change = ExpertLora.change
    lost = {"size": torch.ones(())}
    monkeypatch.setattr(ExpertLora, "change", lambda self, inputs: replace(change(self, inputs), losses=lost))
    model = adapted("qwen3_moe", "expert_lora").train()
    with pytest.raises(SettingError, match="ExpertLora has a loss of its own; it needs the tag adds_loss"):
        model(input_ids=IDS, labels=IDS)

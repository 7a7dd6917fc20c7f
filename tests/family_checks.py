"""What must hold for every family; the tests and the table in docs/families.md both run these."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from families import tiny_inputs, tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.checkpoints.view import ExpertLayout, MemoryView, ModelView, drop_experts, masked, open_model
from mixtura.checkpoints.viewing.edits import TensorEdit
from mixtura.kernels import register_backend

TOLERANCE = 1e-5


def run(model: nn.Module) -> Tensor:
    """The model's logits on fixed token ids, or its last hidden state where it has none."""
    # diffusion_gemma draws a random canvas when it is given none.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        output = model(**tiny_inputs(model))
    return output.logits if getattr(output, "logits", None) is not None else output[0]


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))


def drops_for(view: ModelView, each: int = 2, seed: int = 0) -> dict[int, list[int]]:
    """As many random experts in every layer whose router is learned, evenly from its groups."""
    generator = torch.Generator().manual_seed(seed)
    drops: dict[int, list[int]] = {}
    for layer in view.layers:
        if layer.hash_routed:
            continue
        size = layer.num_experts // layer.num_groups
        count = max(each // layer.num_groups, 1)
        drops[layer.index] = [
            group * size + int(expert)
            for group in range(layer.num_groups)
            for expert in torch.randperm(size, generator=generator)[:count]
        ]
    return _same_where_shared(view, drops)


def _same_where_shared(view: ModelView, drops: dict[int, list[int]]) -> dict[int, list[int]]:
    if not isinstance(view, MemoryView):
        return drops
    first: dict[int, int] = {}
    for layer in view.layers:
        owner = first.setdefault(layer.tensor(layer.expert_parameters[0]).data_ptr(), layer.index)
        if owner in drops:
            drops[layer.index] = drops[owner]
    return drops


def check_view_memory(family: str) -> None:
    """Experts, router rows and biases read and written through the view are the model's own."""
    model = tiny_model(family)
    view = open_model(model)
    assert view.layers
    for layer in view.layers:
        for expert in range(layer.num_experts):
            _check_expert_is_what_runs(layer.experts, layer.layout, layer.expert(expert), expert)
        _check_round_trip(layer)


def _check_expert_is_what_runs(experts: Any, layout: ExpertLayout, weights: Any, expert: int) -> None:
    """The canonical weights, multiplied out by hand, give what the family's own module gives."""
    x = torch.randn(3, weights.up.shape[1], generator=torch.Generator().manual_seed(expert))
    with torch.no_grad():
        up = F.linear(x, weights.up, weights.up_bias)
        if weights.gate is None:
            hidden = experts.act_fn(up)
        elif layout.custom_gate:
            gate = F.linear(x, weights.gate, weights.gate_bias)
            fused = (
                torch.stack([gate, up], -1).flatten(-2) if layout.interleaved else torch.cat([gate, up], -1)
            )
            hidden = experts._apply_gate(fused)
        else:
            hidden = experts.act_fn(F.linear(x, weights.gate, weights.gate_bias)) * up
        expected = F.linear(hidden, weights.down, weights.down_bias)
        if layout.has_post_norm:
            expected = experts.post_expert_norm(expected)
        index = torch.full((3, 1), expert)
        got = experts(x, index, torch.ones(3, 1))
    assert distance(expected, got) < TOLERANCE


def _check_round_trip(layer: Any) -> None:
    before = [tuple(layer.tensor(name).clone() for name in layer.expert_parameters)]
    swapped = {name: value.clone() for name, value in layer.expert(1).tensors().items()}
    layer.set_expert(0, layer.expert(1))
    assert all(torch.equal(swapped[name], value) for name, value in layer.expert(0).tensors().items())
    for old, name in zip(before[0], layer.expert_parameters, strict=True):
        assert torch.equal(layer.tensor(name)[1:], old[1:])
        assert torch.equal(layer.tensor(name)[0], old[1])
    rows = torch.arange(layer.router_weight().numel(), dtype=torch.float32).view_as(layer.router_weight())
    layer.set_router_weight(rows)
    assert torch.equal(layer.tensor(layer.site.router_weight)[: layer.num_experts], rows)
    if layer.correction_bias() is not None:
        layer.set_correction_bias(torch.arange(float(layer.num_experts)))
        held = layer.tensor(layer.site.correction_bias).flatten()[: layer.num_experts]
        assert torch.equal(held, torch.arange(float(layer.num_experts)))
    assert layer.site.router_weight in layer.per_expert_tensors()


def check_view_disk(family: str, folder: Path) -> None:
    """The saved model, in either of transformers' formats, reads as the model in memory does."""
    model = tiny_model(family)
    in_memory = open_model(model)
    for original in (False, True):
        path = folder / f"original_{original}"
        model.save_pretrained(path, save_original_format=original)
        on_disk = open_model(path)
        assert [layer.site for layer in on_disk.layers] == [layer.site for layer in in_memory.layers]
        assert on_disk.stored_dtype == "float32"
        for ours, theirs in zip(on_disk.layers, in_memory.layers, strict=True):
            for expert in range(ours.num_experts):
                for a, b in zip(ours.native_expert(expert), theirs.native_expert(expert), strict=True):
                    assert (a is None) == (b is None)
                    assert a is None or (b is not None and torch.equal(a, b))
            for name in (*ours.per_expert_tensors(), *ours.shared_experts):
                assert torch.equal(ours.tensor(name), theirs.tensor(name)), name
            sizes = sum(value.nbytes for value in theirs.native_expert(0) if value is not None)
            assert ours.expert_num_bytes == sizes
            named = [ours.expert_tensor_names(expert) for expert in range(ours.num_experts)]
            assert len({name for names in named for name in names}) == sum(map(len, named))
            assert bool(named[0]) != bool(ours.fused_tensor_names())


def check_prune_equals_mask(family: str) -> None:
    """Dropping experts gives the logits that masking their selection scores gives, and changes them."""
    model = tiny_model(family)
    drops = drops_for(open_model(model))
    whole = run(model)
    with masked(model, drops):
        hidden = run(model)
    assert torch.equal(run(model), whole), "the mask was not taken off"
    pruned = run(drop_experts(copy.deepcopy(model), drops))
    assert distance(whole, pruned) > 100 * TOLERANCE, "the dropped experts were not used"
    assert distance(hidden, pruned) < TOLERANCE


def check_save_reload(family: str, folder: Path) -> None:
    """A pruned model, saved and loaded by plain transformers, gives the same bits."""
    model = tiny_model(family)
    pruned = drop_experts(model, drops_for(open_model(model)))
    expected = run(pruned)
    pruned.save_pretrained(folder)
    loaded = type(pruned).from_pretrained(folder, experts_implementation="eager").eval()
    # Tensors mapped from a file may start anywhere; kernels choose their order of summation by
    # alignment, so that only a copy in memory of its own can agree to the last bit.
    assert torch.equal(run(copy.deepcopy(loaded)), expected)
    assert [layer.site for layer in open_model(folder).layers] == [
        layer.site for layer in open_model(pruned).layers
    ]


# inkling2's router casts its input, but not its weight, to single precision.
_GRADIENT_PRECISION = {"inkling2": (torch.float32, 1e-3)}


def check_backend(family: str) -> None:
    """The experts backend gives eager's outputs and every parameter's gradient.

    In double precision: gradients that cancel to almost nothing would be rounding noise in single.
    """
    register_backend()
    dtype, tolerance = _GRADIENT_PRECISION.get(family, (torch.float64, TOLERANCE))
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    for implementation in ("eager", "mixtura"):
        model = tiny_model(family, dtype=dtype)
        model.set_experts_implementation(implementation)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = model(**tiny_inputs(model))
            value = output.logits if getattr(output, "logits", None) is not None else output[0]
            (value * torch.randn_like(value)).sum().backward()
        outputs[implementation] = value.detach()
        gradients[implementation] = {
            name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
        }
    assert distance(outputs["eager"], outputs["mixtura"]) < TOLERANCE
    assert gradients["eager"].keys() == gradients["mixtura"].keys()
    for parameter in open_model(model).layers[0].layout.parameters:
        assert any(name.endswith(f"experts.{parameter}") for name in gradients["eager"])
    for name, gradient in gradients["eager"].items():
        assert distance(gradient, gradients["mixtura"][name]) < tolerance, name


def check_edits(family: str, folder: Path) -> None:
    """The checkpoint edited tensor by tensor loads as the model that lost its experts in memory."""
    model = tiny_model(family)
    drops = drops_for(open_model(model))
    for original in (False, True):
        source, target = folder / f"source_{original}", folder / f"target_{original}"
        model.save_pretrained(source, save_original_format=original)
        view = open_model(source)
        edits = view.edits(drops)
        written: dict[str, Tensor] = {}
        for name in view.tensor_names:
            edit = edits.get(name, TensorEdit(name))
            if edit.name is not None:
                tensor = view.tensor(name)
                written[edit.name] = edit.apply(tensor)
                assert edit.apply(tensor.to("meta")).shape == written[edit.name].shape
        target.mkdir()
        save_file(written, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps(view.pruned_config(drops)))
        loaded, info = type(model).from_pretrained(
            target, experts_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        pruned = drop_experts(copy.deepcopy(model), drops)
        assert torch.equal(run(copy.deepcopy(loaded).eval()), run(pruned))

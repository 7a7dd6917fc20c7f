"""The backend against transformers' own eager loop: outputs, every gradient, every layout and dtype."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from expert_layouts import (
    LAYOUTS,
    ROUNDED,
    batch,
    experts_module,
    forward_and_gradients,
    norm_error,
    relative_error,
    with_implementation,
)
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mixtura.kernels import backend, experts

ALL_LAYOUTS = list(LAYOUTS)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(13, 3), (1, 3), (40, 1), (2, 6)])
def test_float64_equals_eager_with_every_gradient(layout: str, num_tokens: int, top_k: int) -> None:
    module = experts_module(layout)
    inputs = batch(module, num_tokens, top_k)
    expected = forward_and_gradients(with_implementation(module, "eager"), *inputs)
    found = forward_and_gradients(module, *inputs)
    assert found.keys() == expected.keys()
    tolerance = 2e-5 if layout in ROUNDED else 1e-11
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == value.dtype
        assert relative_error(found[name], value) < tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [name for name in ALL_LAYOUTS if name not in ROUNDED])
def test_no_less_exact_than_eager(layout: str, dtype: torch.dtype) -> None:
    module = experts_module(layout, dtype)
    inputs = batch(module, 60, 3, dtype)
    exact = with_implementation(module, "eager").double()
    hidden, ids, weights = inputs
    truth = forward_and_gradients(exact, hidden.double(), ids, weights.double())
    eager = forward_and_gradients(with_implementation(module, "eager"), *inputs)
    found = forward_and_gradients(module, *inputs)
    with torch.no_grad():
        found_without_grad = module(*inputs)
    found["outputs without grad"] = found_without_grad
    truth["outputs without grad"], eager["outputs without grad"] = truth["outputs"], eager["outputs"]
    eps = torch.finfo(dtype).eps
    for name, value in truth.items():
        ours, theirs = (without_edges(made[name], value) for made in (found, eager))
        assert ours < 1.2 * theirs + 0.2 * eps, name
        assert ours < 20 * eps, name


def without_edges(value: Tensor, truth: Tensor) -> float:
    """`norm_error` without the tenth of the numbers where it is largest.

    Where an activation is cut off, the gradient jumps, and whoever rounds may be on either side of the jump:
    a token and, of an expert's matrix, a feature are then off.
    """
    value, truth = value.detach().double().flatten(), truth.detach().double().flatten()
    kept = (value - truth).abs().argsort()[: max(1, len(truth) * 9 // 10)]
    return norm_error(value[kept], truth[kept])


@pytest.mark.parametrize(
    "layout", [name for name in ALL_LAYOUTS if name not in ("post_norm", "two_argument_gate")]
)
def test_gradcheck(layout: str) -> None:
    module = experts_module(
        layout,
        hidden_size=4,
        moe_hidden_size=4,
        moe_latent_size=3,
        intermediate_size=3,
        moe_intermediate_size=3,
    )
    hidden, ids, weights = batch(module, 4, 2)
    ids[1, 0], ids[3, 1] = 6, -1
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(hidden: Tensor, weights: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (hidden, ids, weights))

    inputs = [hidden, weights, *(parameter.detach() for parameter in parameters)]
    assert torch.autograd.gradcheck(run, [value.clone().requires_grad_() for value in inputs])


@pytest.mark.parametrize("absent", [6, 7, 1000, -1, -1000])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("layout", ["default", "interleaved", "ungated"])
def test_absent_choices_add_nothing_and_get_no_gradient(
    layout: str, id_dtype: torch.dtype, absent: int
) -> None:
    module = experts_module(layout)
    hidden, ids, weights = batch(module)
    gone = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    gone[4] = True
    expected = forward_and_gradients(
        with_implementation(module, "eager"), hidden, ids, weights.masked_fill(gone, 0.0)
    )
    expected["weights"][gone] = 0.0
    for weight_of_absent in (float("nan"), float("inf"), 1e30, 0.0):
        marked = weights.masked_fill(gone, weight_of_absent)
        found = forward_and_gradients(module, hidden, ids.masked_fill(gone, absent).to(id_dtype), marked)
        assert torch.equal(found["outputs"][4], torch.zeros_like(hidden[4]))
        for name, value in expected.items():
            assert relative_error(found[name], value) < 1e-11, name
            assert not found[name].isnan().any()


@pytest.mark.parametrize("layout", ["default", "interleaved"])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_to_do(layout: str, num_tokens: int) -> None:
    module = experts_module(layout)
    hidden, ids, weights = batch(module, num_tokens)
    found = forward_and_gradients(module, hidden, torch.full_like(ids, 6), weights)
    assert found["outputs"].shape == hidden.shape
    assert all(not value.any() for value in found.values())
    with torch.no_grad():
        assert not module(hidden, torch.full_like(ids, 6), weights).any()


def test_the_same_expert_twice_counts_twice() -> None:
    module = experts_module("default")
    hidden, ids, weights = batch(module, 5, 2)
    ids[:, 1] = ids[:, 0]
    once = module(hidden, ids[:, :1], weights.sum(1, keepdim=True))
    assert relative_error(module(hidden, ids, weights), once) < 1e-12


def _strided(tensor: Tensor, way: str) -> Tensor:
    if way == "transposed":
        return tensor.t().contiguous().t()
    if way == "every_other":
        return torch.stack((tensor, tensor + 1), dim=-1).flatten(-2)[:, ::2]
    wider = torch.cat((tensor, tensor), dim=1)
    return wider[:, : tensor.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["transposed", "every_other", "sliced"])
def test_strides_do_not_matter(way: str, dtype: torch.dtype) -> None:
    module = experts_module("default", dtype)
    inputs = batch(module, dtype=dtype)
    expected = forward_and_gradients(module, *inputs)
    hidden, ids, weights = (_strided(tensor, way) for tensor in inputs)
    assert not hidden.is_contiguous()
    outputs = module(hidden, ids, weights)
    assert torch.equal(outputs, expected["outputs"])
    with torch.no_grad():
        strided = module(hidden, ids, weights)
        assert torch.equal(strided, module(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_any_strides(dtype: torch.dtype) -> None:
    module = experts_module("default", dtype)
    inputs = batch(module, dtype=dtype)
    expected = forward_and_gradients(module, *inputs)
    for name in ("gate_up_proj", "down_proj"):
        parameter = getattr(module, name)
        parameter.data = parameter.data.mT.contiguous().mT
        assert not parameter.is_contiguous()
    found = forward_and_gradients(module, *inputs)
    for name, value in expected.items():
        assert relative_error(found[name], value) < 20 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("layout", ["default", "interleaved", "post_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(layout: str, dtype: torch.dtype) -> None:
    module = experts_module(layout, dtype)
    inputs = batch(module, 100, dtype=dtype)
    first = forward_and_gradients(module, *inputs)
    for _ in range(3):
        again = forward_and_gradients(module, *inputs)
        assert all(torch.equal(again[name], value) for name, value in first.items())


def test_wide_routing_weights_keep_their_bits() -> None:
    module = experts_module("default", torch.bfloat16)
    hidden, ids, weights = batch(module, 200, 3, torch.bfloat16)
    weights = weights.float() * 1.0037
    truth = with_implementation(module, "eager").double()(hidden.double(), ids, weights.double())
    eager = with_implementation(module, "eager")(hidden, ids, weights)
    found = module(hidden, ids, weights)
    assert found.dtype == torch.bfloat16
    difference, own = (found.double() - truth).norm(), (eager.double() - truth).norm()
    assert difference < own
    gradients = forward_and_gradients(module, hidden, ids, weights)
    assert gradients["weights"].dtype == torch.float32


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["one by one", "together"])
def test_tokens_wider_than_the_experts_are_cast(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FEW_ELEMENTS_16_BIT", "_CACHED_BYTES"):
        monkeypatch.setattr(experts, name, limit)
    module = experts_module("default", torch.bfloat16)
    hidden, ids, weights = batch(module, dtype=torch.bfloat16)
    narrow = module(hidden, ids, weights)
    found = forward_and_gradients(module, hidden.float(), ids, weights.float())
    assert found["outputs"].dtype == found["hidden"].dtype == torch.float32
    assert norm_error(found["outputs"], narrow) < 0.01
    with torch.no_grad():
        outputs = module(hidden.float(), ids, weights.float())
    assert outputs.dtype == torch.float32
    assert norm_error(outputs, narrow) < 0.01


def test_frozen_experts_get_no_gradient_and_nothing_is_kept_without_one() -> None:
    module = experts_module("default").requires_grad_(False)
    hidden, ids, weights = batch(module)
    outputs = module(hidden, ids, weights)
    assert outputs.grad_fn is None
    hidden.requires_grad_()
    module(hidden, ids, weights).sum().backward()
    assert hidden.grad is not None
    assert all(parameter.grad is None for parameter in module.parameters())
    twin = with_implementation(module, "eager")
    expected = hidden.detach().clone().requires_grad_()
    twin(expected, ids, weights).sum().backward()
    assert expected.grad is not None
    assert relative_error(hidden.grad, expected.grad) < 1e-11


def test_some_parameters_frozen() -> None:
    module = experts_module("interleaved")
    module.gate_up_proj.requires_grad_(False)
    module.down_proj_bias.requires_grad_(False)
    inputs = batch(module)
    module(*inputs).pow(2).sum().backward()
    twin = with_implementation(module, "eager")
    twin.zero_grad()
    twin(*inputs).pow(2).sum().backward()
    for (name, parameter), (_, other) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None) == (not parameter.requires_grad), name
        if parameter.grad is not None and other.grad is not None:
            assert relative_error(parameter.grad, other.grad) < 1e-11, name


def test_inputs_are_left_as_they_were() -> None:
    module = experts_module("interleaved")
    inputs = batch(module)
    before = [tensor.clone() for tensor in inputs]
    module(*inputs).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_autocast_leaves_the_experts_in_their_own_dtype() -> None:
    module = experts_module("default", torch.float32)
    hidden, ids, weights = batch(module, dtype=torch.float32)
    expected = forward_and_gradients(module, hidden, ids, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = forward_and_gradients(module, hidden, ids, weights)
        with torch.no_grad():
            outputs = module(hidden, ids, weights)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert relative_error(outputs, expected["outputs"]) < 1e-5


def test_checkpointing_gives_the_same_gradients() -> None:
    module = experts_module("default")
    hidden, ids, weights = batch(module)
    expected = forward_and_gradients(module, hidden, ids, weights)
    leaf = hidden.clone().requires_grad_()
    twin = copy.deepcopy(module)
    grad = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.utils.checkpoint.checkpoint(twin, leaf, ids, weights, use_reentrant=False).backward(grad)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected["hidden"])
    assert torch.equal(twin.gate_up_proj.grad, expected["gate_up_proj"])


def test_meta_tensors_pass_through() -> None:
    module = experts_module("default").to("meta")
    hidden, ids, weights = (tensor.to("meta") for tensor in batch(module))
    assert module(hidden, ids, weights).shape == hidden.shape


def test_from_pretrained_by_name(tmp_path: str) -> None:
    backend.register()
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=36,
        moe_intermediate_size=18,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_experts=6,
        num_experts_per_tok=2,
        head_dim=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = {}
    for name in ("eager", "mixtura"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, experts_implementation=name, dtype=torch.float64
        )
        assert model.config._experts_implementation == name
        with torch.no_grad():
            logits[name] = model(ids).logits
    assert relative_error(logits["mixtura"], logits["eager"]) < 1e-5


def test_the_kernels_need_no_transformers() -> None:
    code = "import sys, mixtura.kernels; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

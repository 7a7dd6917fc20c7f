"""Models whose weights are brought for a forward only: offloaded by accelerate, sharded by FSDP or ZeRO-3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rerouting_process
import torch
from accelerate import cpu_offload, disk_offload
from rerouted import assert_alike, gates, logits_of, model_of, texts
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

import mixtura
from mixtura.errors import UnsupportedModelError, UserError

BATCH = {"input_ids": texts()}
# With a family's own formula, with rows beside the matrix, with a bias beside it, with scales after it.
ROUTERS = (
    ("qwen3_moe", "top_k"),
    ("qwen3_moe", "ada_moe"),
    ("gpt_oss", "top_k"),
    ("deepseek_v3", "deepseek_v3"),
)


def offloaded(family: str, folder: Path | None = None) -> Any:
    """A model whose weights are elsewhere between forwards."""
    model, device = model_of(family), torch.device("cpu")
    return cpu_offload(model, device) if folder is None else disk_offload(model, str(folder), device)


@pytest.mark.parametrize(("family", "router"), ROUTERS)
@pytest.mark.parametrize("disk", [False, True])
def test_an_offloaded_model_routes_as_one_in_memory(
    family: str, router: str, disk: bool, tmp_path: Path
) -> None:
    plain, model = model_of(family), offloaded(family, tmp_path if disk else None)
    own = logits_of(plain, BATCH)
    for one in (plain, model):
        mixtura.set_router(one, router)
    expected = logits_of(plain, BATCH)
    for _ in range(2):
        torch.testing.assert_close(logits_of(model, BATCH), expected)
    mixtura.restore(model)
    torch.testing.assert_close(logits_of(model, BATCH), own)


def test_a_router_set_before_the_model_is_offloaded_is_offloaded_with_it() -> None:
    plain, model = model_of("qwen3_moe"), model_of("qwen3_moe")
    own = logits_of(plain, BATCH)
    for one in (plain, model):
        mixtura.set_router(one, "ada_moe", num_null=4)
    cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(logits_of(model, BATCH), logits_of(plain, BATCH))
    mixtura.restore(model)
    torch.testing.assert_close(logits_of(model, BATCH), own)


def test_an_offloaded_model_is_balanced_where_its_weights_are_run() -> None:
    model = offloaded("qwen3_moe").train()
    made = mixtura.balance(model, [("loss_free", {"rate": 0.01}), "switch_loss"])
    plain = model_of("qwen3_moe").train()
    own = mixtura.balance(plain, [("loss_free", {"rate": 0.01}), "switch_loss"])
    for one, balanced in ((model, made), (plain, own)):
        one(**BATCH)
        assert balanced.loss is not None
        balanced.end_step()
    assert_alike(
        {str(index): bias for index, bias in made.biases().items()},
        {str(index): bias for index, bias in own.biases().items()},
    )


def test_what_reads_weights_outside_of_their_forward_is_refused() -> None:
    model = offloaded("qwen3_moe").train()
    mixtura.balance(model, "erc_loss")
    with pytest.raises(UnsupportedModelError, match="offloaded or sharded"):
        model(**BATCH)
    model = offloaded("qwen3_moe")
    mixtura.set_router(model, "autonomy_of_experts", train=True)
    with pytest.raises(UnsupportedModelError, match="offloaded or sharded"):
        model(**BATCH)
    layer = mixtura.open_model(offloaded("qwen3_moe")).layers[0]
    with pytest.raises(UserError, match="nothing can be written"):
        layer.set_router_weight(torch.zeros(8, 32))
    empty = model_of("qwen3_moe").to("meta")
    with pytest.raises(UnsupportedModelError, match="has no weights"):
        mixtura.set_router(empty, "top_k")


def _gathered(model: Any) -> None:
    """What DeepSpeed ZeRO-3 does: parameters are empty but for the forward of their own module."""

    def gather(module: Any, args: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.whole

    def release(module: Any, args: Any, output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for parameter in model.parameters():
        parameter.whole, parameter.data = parameter.data, torch.empty(0)
    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)


@pytest.mark.parametrize("router", ["top_k", "ada_moe"])
def test_parameters_gathered_for_their_own_module_alone_are_enough(router: str) -> None:
    plain, model = model_of("qwen3_moe"), model_of("qwen3_moe")
    for one in (plain, model):
        mixtura.set_router(one, router)
        mixtura.balance(one, "switch_loss", coefficient=1.0)
    _gathered(model)
    torch.testing.assert_close(logits_of(model, BATCH), logits_of(plain, BATCH))


def test_a_model_that_is_sharded_already_is_refused() -> None:
    model = model_of("qwen3_moe")
    _gathered(model)
    for change in (
        lambda: mixtura.set_router(model, "top_k"),
        lambda: mixtura.balance(model, "switch_loss"),
        lambda: mixtura.open_model(model),
    ):
        with pytest.raises(UnsupportedModelError, match="sharded over processes"):
            change()
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp1", "fsdp2", "fsdp2 routers"])
def test_two_processes_that_share_the_weights_route_as_one(sharding: str, tmp_path: Path) -> None:
    spawn(rerouting_process.sharded, (sharding, str(tmp_path)), nprocs=rerouting_process.NUM_PROCESSES)
    for rank in range(rerouting_process.NUM_PROCESSES):
        found = load_file(tmp_path / str(rank))
        assert len(found) > 1
        for name in found:
            if name.startswith("expected."):
                torch.testing.assert_close(found[name.removeprefix("expected.")], found[name])
    assert gates(model_of("qwen3_moe"))

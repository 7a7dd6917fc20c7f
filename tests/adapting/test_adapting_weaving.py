"""Several adapters' own experts beside the base's: one call, one copy of what they share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting.adapted_models import adapted, error, logits, plain
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor

import mixtura.adapting.weaving as weaving
from mixtura.adapting.layers import ExpertsLayer
from mixtura.adapting.selecting import Selection
from mixtura.kernels.backend import matrix_names, run_module
from mixtura.kernels.compiled import using
from mixtura.kernels.woven import WovenExperts, run_woven
from mixtura.running.adapters import with_adapter

OWN: tuple[dict[int, int], ...] = ({1: 0, 3: 1}, {3: 2, 0: 3}, {})


def experts_of(model: Any) -> Any:
    return next(one for one in model.modules() if hasattr(one, "down_proj") and one.down_proj.ndim == 3)


def instead_of(module: Any, own: dict[int, int]) -> dict[int, dict[str, Tensor]]:
    """Matrices that are like the layer's and not the same, by expert."""
    made = {}
    for expert, seed in own.items():
        generator = torch.Generator().manual_seed(seed)
        made[expert] = {
            name: (getattr(module, parameter)[expert] * torch.rand((), generator=generator)).detach()
            for name, parameter in matrix_names(module).items()
        }
    return made


def choices(num_tokens: int, num_experts: int) -> tuple[Int[Tensor, "T K"], Int[Tensor, " T"]]:
    generator = torch.Generator().manual_seed(7)
    chosen = torch.stack([torch.randperm(num_experts, generator=generator)[:2] for _ in range(num_tokens)])
    # Absent ones as routers that drop write them.
    chosen[1, 0], chosen[4, 1] = num_experts, -1
    return chosen, torch.randint(0, len(OWN) + 1, (num_tokens,), generator=generator)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["fast", "torch"])
def test_one_call_is_each_token_with_its_own_layer(family: str, dtype: torch.dtype, mode: str) -> None:
    module = experts_of(plain(family).to(dtype))
    num_experts, width = module.down_proj.shape[0], plain(family).config.hidden_size
    chosen, places = choices(12, num_experts)
    x = torch.randn(12, width, generator=torch.Generator().manual_seed(3)).to(dtype)
    weights = torch.rand(12, 2, generator=torch.Generator().manual_seed(4)).to(dtype)
    instead = [instead_of(module, own) for own in OWN]
    with torch.no_grad(), using(mode):
        found = run_woven(module, WovenExperts(module, instead), places, x, chosen, weights)
        for place in range(len(OWN) + 1):
            changed = copy.deepcopy(module)
            for expert, matrices in instead[place - 1].items() if place else ():
                for name, parameter in matrix_names(module).items():
                    getattr(changed, parameter)[expert] = matrices[name]
            rows = (places == place).nonzero().flatten()
            alone = run_module(changed, x[rows], chosen[rows], weights[rows])
            assert error(found[rows], alone) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_table_says_whom_a_choice_means() -> None:
    module = experts_of(plain("qwen3_moe"))
    instead = [instead_of(module, own) for own in OWN]
    woven = WovenExperts(module, instead)
    count = module.down_proj.shape[0]
    assert woven.num_experts == count + sum(map(len, OWN))
    every = torch.arange(-1, count + 2)[None].repeat(len(OWN) + 1, 1)
    found = woven.redirected(every, torch.arange(len(OWN) + 1))
    for place, row in enumerate(found.tolist()):
        for expert, slot in zip(every[0].tolist(), row, strict=True):
            if not 0 <= expert < count:
                assert slot == -1
                continue
            tensors = woven.get(slot, torch.float32)
            own = instead[place - 1].get(expert) if place else None
            # Nothing is copied: neither the base's experts nor an adapter's.
            wanted = module.down_proj[expert] if own is None else own["down"]
            assert tensors.down.data_ptr() == wanted.data_ptr()
        # A token's experts are added up in the order of the layer's own numbers.
        assert row[1 : count + 1] == sorted(row[1 : count + 1])


def saved(folder: Path, experts: list[int]) -> Path:
    model = adapted("qwen3_moe", "esft", settings={"experts": experts})
    generator = torch.Generator().manual_seed(sum(experts))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    model.save_pretrained(folder)
    return folder


def layers_of(model: Any) -> list[ExpertsLayer]:
    return [one for one in model.modules() if isinstance(one, ExpertsLayer)]


def test_an_adapter_takes_what_its_experts_take(tmp_path: Path) -> None:
    model: Any = plain("qwen3_moe").to(torch.bfloat16)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    base = experts_of(model).down_proj.data_ptr()
    one_expert = sum(
        getattr(layer.mlp.experts, name)[0].numel() * 2
        for layer in model.model.layers
        for name in ("gate_up_proj", "down_proj")
    )
    for number, experts in enumerate(([0], [1, 2], [2, 3, 5])):
        model = with_adapter(model, saved(tmp_path / str(number), experts), f"a{number}")
        taken = sum(p.numel() * p.element_size() for p in model.parameters()) - held
        assert taken == len(experts) * one_expert
        held += taken
    assert experts_of(model).down_proj.data_ptr() == base


def test_held_in_the_width_of_the_base_it_computes_the_same_bits(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", [1, 4])
    narrow = with_adapter(plain("qwen3_moe").to(torch.bfloat16), folder)
    wide = PeftModel.from_pretrained(plain("qwen3_moe").to(torch.bfloat16), folder).eval()
    assert {p.dtype for p in layers_of(wide)[0].mixtura_adapter.parameters()} == {torch.float32}
    for layer in layers_of(narrow):
        layer._woven = lambda given: None  # type: ignore[method-assign]
    assert torch.equal(logits(narrow), logits(wide))


def test_steps_of_several_adapters_are_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = plain("qwen3_moe")
    owned = {"one": [0, 2], "other": [2, 5], "third": [1]}
    for name, experts in owned.items():
        model = with_adapter(model, saved(tmp_path / name, experts), name)
    selection, rows = Selection(model), ["one", None, "other", "third", "one"]
    ids = torch.arange(5)[:, None] + 3
    with torch.no_grad():
        alone = []
        for row, name in enumerate(rows):
            selection.choose([name])
            alone.append(model(input_ids=ids[row : row + 1]).logits[0])
        calls = []
        real = weaving.run_woven

        def counted(*given: Any) -> Tensor:
            calls.append(len(given[3]))
            return real(*given)

        monkeypatch.setattr(weaving, "run_woven", counted)
        selection.choose(rows)
        together = model(input_ids=ids).logits
    assert calls == [5] * len(layers_of(model))
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)
    different = {tuple(row.argsort()[-5:].tolist()) for row in together[:, 0]}
    assert len(different) > 1


def test_changed_in_place_or_copied_it_is_woven_anew(tmp_path: Path) -> None:
    model: Any = with_adapter(plain("qwen3_moe"), saved(tmp_path / "one", [0, 2]))
    with torch.no_grad():
        first = logits(model)
        copied = copy.deepcopy(model)
        for layer in layers_of(copied):
            for parameter in layer.mixtura_adapter.parameters():
                parameter.mul_(0.5)
        changed = logits(copied)
        assert torch.equal(logits(model), first)
        assert not torch.equal(changed, first)
        merged = logits(copied.merge_and_unload())
    torch.testing.assert_close(changed, merged, atol=2e-5, rtol=2e-5)

"""What adapters learned, written as plain LoRA: for PEFT's own type, and expert by expert for servers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, final

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from mixtura.adapting.changing import nothing
from mixtura.adapting.layers import AdapterLayer, ExpertsLayer
from mixtura.checkpoints.viewing.wrappers import plain_model, plain_name
from mixtura.errors import OutputError, SettingError, UnsupportedModelError, UserError
from mixtura.kernels.backend import matrix_names
from mixtura.methods import declared_tags
from mixtura.types import LowRank

Layout = Literal["target_parameters", "per_expert"]
LAYOUTS: Final = ("target_parameters", "per_expert")
_PREFIX = "base_model.model."
# Families whose checkpoints call an expert's matrices by these names, which is how servers find them.
_NAMED_SO: Final = ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe")


def export_lora(
    model: Any, out: str | Path, *, layout: Layout = "target_parameters", adapter_name: str = "default"
) -> Path:
    """Write an adapter that is plain LoRA at heart as an adapter of PEFT's type ``LORA``.

    What a layer learned is the same to rounding: scales are multiplied into ``lora_B``, ranks are filled up
    with zeros to the highest, and experts that were not changed get zeros.

    Args:
        model: the model under PEFT.
        out: a directory that is not there yet.
        layout: ``target_parameters`` as PEFT keeps LoRA on stacked experts; ``per_expert`` with two matrices
            for each expert's ``gate_proj``, ``up_proj`` and ``down_proj``, as vLLM finds them in a checkpoint
            of two-dimensional experts.
        adapter_name: which of the model's adapters.

    Raises:
        UserError: the method's learning is not plain LoRA.
        UnsupportedModelError: a family whose experts have other names, or whose gate and up projection take
            turns, is to be written expert by expert.
        SettingError: there is no such layout.
        OutputError: the directory is there, or cannot be written.
    """
    if layout not in LAYOUTS:
        raise SettingError(f"layout must be {' or '.join(LAYOUTS)}, got {layout!r}")
    target = Path(out)
    if target.exists():
        raise OutputError(f"{target} is there already and is left as it is; give another directory")
    found = [(name, layer) for name, layer in _layers(model) if adapter_name in layer.mixtura_adapter]
    parts = [_Part(name, layer, adapter_name) for name, layer in found]
    if not parts:
        raise UserError(f"the model has no adapter of mixtura named {adapter_name!r}")
    rank = max(one.a.shape[1] for part in parts for one in part.factors.values())
    if layout == "per_expert":
        _check_names(model, parts)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        written = part.per_expert(rank) if layout == "per_expert" and part.is_experts else part.stacked(rank)
        tensors |= {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in written}
    modules = sorted({part.name.rpartition(".")[2] for part in parts if not part.is_experts})
    parameters = sorted({name for part in parts for name in part.parameters})
    if layout == "per_expert" and parameters:
        modules, parameters = [*modules, "gate_proj", "up_proj", "down_proj"], []
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.peft_config[adapter_name].base_model_name_or_path,
        inference_mode=True,
    )
    _write(target, tensors, config)
    return target


@final
class _Part:
    """One layer's factors, scaled, by the name of the matrix."""

    def __init__(self, name: str, layer: AdapterLayer, adapter_name: str) -> None:
        self.name, self.layer = name, layer
        self.is_experts = isinstance(layer, ExpertsLayer)
        adapter = layer.adapter(adapter_name)
        if "expands_to_lora" not in declared_tags(type(adapter)):
            raise UserError(
                f"what {type(adapter).__name__} learned is no plain LoRA; merge it where it can be, or "
                "use it as it is"
            )
        site = adapter.site
        cols = next(iter(site.matrices.values())).cols
        with torch.no_grad():
            change = adapter.change(nothing(torch.float32, layer.device, cols))
        self.expert_ids, self.num_experts = change.expert_ids, site.num_experts
        self.factors: dict[str, LowRank] = {
            key: part for key, part in change.matrices.items() if isinstance(part, LowRank)
        }

    @property
    def parameters(self) -> list[str]:
        """The ends of the names of the stacked parameters that are changed."""
        if not self.is_experts:
            return []
        names = matrix_names(self.layer.base_layer)
        return [f"{self.name.rpartition('.')[2]}.{names[key]}" for key in self.factors]

    def whole(self, key: str, rank: int) -> tuple[Tensor, Tensor]:
        """The factors of all experts, of one rank, ``b`` scaled."""
        part = self.factors[key]
        count = self.num_experts if self.is_experts else 1
        a = part.a.new_zeros(count, rank, part.a.shape[2])
        b = part.b.new_zeros(count, part.b.shape[1], rank)
        ids = list(self.expert_ids) if self.is_experts else [0]
        own = part.a.shape[1]
        scale = part.scale.to(part.b)[:, None, None]
        a[ids, :own], b[ids, :, :own] = part.a.detach(), part.b.detach() * scale
        return a, b

    def stacked(self, rank: int) -> Iterator[tuple[str, Tensor]]:
        """As PEFT keeps them: ``lora_A`` expert by expert, the columns of ``lora_B`` rank by rank.

        Of two parameters of one module the first is wrapped first, and so lies innermost.
        """
        if not self.is_experts:
            a, b = self.whole("weight", rank)
            yield f"{self.name}.lora_A.weight", a[0]
            yield f"{self.name}.lora_B.weight", b[0]
            return
        names = matrix_names(self.layer.base_layer)
        held = [name for name, _ in self.layer.base_layer.named_parameters(recurse=False)]
        ordered = sorted(self.factors, key=lambda key: held.index(names[key]))
        for place, key in enumerate(ordered):
            inside = ".base_layer" * (len(ordered) - 1 - place)
            a, b = self.whole(key, rank)
            yield f"{self.name}{inside}.lora_A.weight", a.reshape(-1, a.shape[2])
            yield f"{self.name}{inside}.lora_B.weight", b.permute(1, 2, 0).reshape(b.shape[1], -1)

    def per_expert(self, rank: int) -> Iterator[tuple[str, Tensor]]:
        """Two matrices for each projection of each expert; gate and up have the same ``lora_A``."""
        for key in self.factors:
            a, b = self.whole(key, rank)
            for expert in range(self.num_experts):
                half = b.shape[1] // 2
                rows = (
                    {"down_proj": b[expert]}
                    if key == "down"
                    else {"gate_proj": b[expert, :half], "up_proj": b[expert, half:]}
                )
                for projection, wide in rows.items():
                    owner = f"{self.name}.{expert}.{projection}"
                    yield f"{owner}.lora_A.weight", a[expert].clone()
                    yield f"{owner}.lora_B.weight", wide.clone()


def _layers(model: Any) -> Iterator[tuple[str, AdapterLayer]]:
    for name, module in plain_model(model).named_modules():
        if isinstance(module, AdapterLayer):
            yield plain_name(name), module


def _check_names(model: Any, parts: list[_Part]) -> None:
    experts: list[Any] = [part.layer.base_layer for part in parts if part.is_experts]
    family = str(plain_model(model).config.model_type)  # type: ignore[union-attr]
    usual = all(module.has_gate and module.is_concatenated and not module.is_transposed for module in experts)
    if experts and (family not in _NAMED_SO or not usual):
        raise UnsupportedModelError(
            f"experts of {family} are not called gate_proj, up_proj and down_proj in its checkpoints; "
            "write the layout target_parameters, or merge the adapter"
        )


def _write(target: Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(dict(tensors), aside / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(aside))
        aside.rename(target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OutputError(f"cannot write {target}: {error.strerror}") from None

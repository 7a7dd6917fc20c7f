"""The modules that stand in a model where an adapter changes something, as PEFT knows them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from mixtura.adapting.changing import add_to_rows, changed_parameters, changed_weight, nothing
from mixtura.adapting.losses import LossBox
from mixtura.errors import UserError
from mixtura.kernels import backend
from mixtura.methods import declared_tags
from mixtura.methods.adapters import Adapter
from mixtura.types import Change, LowRank, RouterInput

ADAPTERS = "mixtura_adapter"


class AdapterLayer(nn.Module, BaseTunerLayer, ABC):
    """A module of the base with the adapters of its site; those that are active change what it does."""

    adapter_layer_names = (ADAPTERS,)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, losses: LossBox) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.losses = losses
        self.mixtura_adapter = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        # What merging wrote over, so that taking it back restores every bit.
        self._before: dict[str, Tensor] = {}

    def add(self, name: str, adapter: Adapter, *, empty: bool) -> None:
        """Put an adapter here, in float32 at least and where the base is.

        ``empty`` ones have no values yet, because they are about to be loaded.
        """
        if not empty:
            held = next(iter(self.base_layer.parameters()), None)
            dtype = torch.float32
            if held is not None and held.is_floating_point():
                dtype = torch.promote_types(held.dtype, dtype)
            adapter.to(device=self.device, dtype=dtype)
            if "trains_base" in declared_tags(type(adapter)):
                adapter.start(self.matrices())
        # What can be merged makes the same of every token.
        self.losses.reads = self.losses.reads or "mergeable" not in declared_tags(type(adapter))
        self.mixtura_adapter[name] = adapter

    def adapter(self, name: str) -> Adapter:
        """The adapter of a name at this site."""
        found = self.mixtura_adapter[name]
        assert isinstance(found, Adapter)
        return found

    @property
    def running(self) -> list[str]:
        """The adapters that change what this module does now and are not merged.

        Switched off while some are merged, as PEFT's own are, the base first gets its own weights back.
        """
        if self.disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return []
        merged = set(self.merged_adapters)
        return [n for n in self.active_adapters if n in self.mixtura_adapter and n not in merged]

    @property
    def device(self) -> torch.device:
        """Where the base computes."""
        held = next((t for t in (*self.base_layer.parameters(), *self.base_layer.buffers())), None)
        return torch.device("cpu") if held is None else held.device

    @abstractmethod
    def matrices(self) -> dict[str, Tensor]:
        """The base's matrices by name, as they are stored; decoded where they are in fewer bits."""

    @abstractmethod
    def write(self, changes: Sequence[Change]) -> None:
        """Write changes into the base's own matrices."""

    @abstractmethod
    def held(self) -> dict[str, Tensor]:
        """The base's tensors that merging writes to, by name.

        Raises:
            UserError: they are stored in fewer bits.
        """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base's weights: those named, or the active ones.

        Raises:
            UserError: the method cannot be merged, or the base is stored in fewer bits.
            ValueError: with ``safe_merge``, values would not be finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.mixtura_adapter]
        for name in names:
            require_mergeable(self.adapter(name))
        if not names:
            return
        held = self.held()
        if not self._before:
            self._before = {key: tensor.detach().clone() for key, tensor in held.items()}
        for name in names:
            adapter = self.adapter(name)
            every = [self.adapter(one).change(self._none()) for one in (*self.merged_adapters, name)]
            with torch.no_grad():
                # Anew from the base's own, so that the result is that of all of them unmerged.
                for key, tensor in held.items():
                    tensor.copy_(self._before[key])
                self.write(every)
            if safe_merge and not all(tensor.isfinite().all() for tensor in held.values()):
                self._restore()
                raise ValueError(
                    f"the adapter {name} makes values that are not finite of {adapter.site.name}"
                )
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Give the base its own weights back, bit for bit."""
        self._restore()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base alone, with adapters written into it if asked; what PEFT puts in this module's place."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self._before = {}
        else:
            self._restore()
        return self.base_layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's own conversion knows linear layers only; see `mixtura.adapting.exporting`."""
        del adapter_name
        return False

    def _restore(self) -> None:
        if self._before:
            with torch.no_grad():
                for key, tensor in self.held().items():
                    tensor.copy_(self._before[key])
        self._before = {}
        self.merged_adapters.clear()

    def _change(self, name: str, inputs: RouterInput) -> Change:
        adapter = self.adapter(name)
        return replace(adapter.change(inputs), dropout=adapter.dropout if self.training else 0.0)

    def _none(self) -> RouterInput:
        site = self.adapter(next(iter(self.mixtura_adapter))).site
        width = next(iter(site.matrices.values())).cols
        return nothing(torch.float32, self.device, width)


@final
class ExpertsLayer(AdapterLayer):
    """All experts of a layer with adapters."""

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """What the experts make of the tokens, those that adapters change with their changes."""
        base: Any = self.base_layer
        given = (hidden_states, top_k_index, top_k_weights)
        running, inputs = self.running, RouterInput.of(hidden_states, training=self.training)
        changes = [self._change(name, inputs) for name in running]
        if not torch.is_grad_enabled():
            changes = [change for change in changes if not self._is_nothing(change)]
        if not changes:
            made = base(*given, *args, **kwargs)
        elif base.config._experts_implementation == backend.NAME or hasattr(base, "mixtura_store"):
            made = backend.run_module(base, *given, changes)
        else:
            made = functional_call(base, changed_parameters(base, changes), given + args, kwargs)
        assert isinstance(made, Tensor)
        return made

    def matrices(self) -> dict[str, Tensor]:
        base: Any = self.base_layer
        store = getattr(base, "mixtura_store", None)
        names = backend.matrix_names(base)
        if store is None:
            return {name: getattr(base, parameter).detach() for name, parameter in names.items()}
        decoded = [store.get(expert, torch.float32) for expert in range(store.num_experts)]
        return {name: torch.stack([getattr(one, name) for one in decoded]) for name in names}

    def held(self) -> dict[str, Tensor]:
        base: Any = self.base_layer
        if hasattr(base, "mixtura_store"):
            raise UserError(
                "the experts of this model are stored in fewer bits and nothing can be merged into them; use "
                "the adapter unmerged, or merge it into the checkpoint that they were made of"
            )
        return {parameter: getattr(base, parameter).data for parameter in backend.matrix_names(base).values()}

    def write(self, changes: Sequence[Change]) -> None:
        held = self.held()
        for parameter, stack in changed_parameters(self.base_layer, changes).items():
            held[parameter].copy_(stack)

    def _is_nothing(self, change: Change) -> bool:
        """Whether a change leaves every expert as it is; looked at in full only if a glance says so."""
        for name, part in change.matrices.items():
            if isinstance(part, LowRank):
                if bool(part.b[:, :1].any()) or bool(part.b.any()):
                    return False
            elif change.expert_ids:
                stack, ids = self.matrices()[name], list(change.expert_ids)
                first = part.weight[:1].to(stack.dtype)
                if not torch.equal(stack[ids[:1]], first) or not torch.equal(
                    stack[ids], part.weight.to(stack.dtype)
                ):
                    return False
        return True


@final
class LinearLayer(AdapterLayer):
    """A linear layer with adapters."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer makes of its input, with what adapters add for every token."""
        running = self.running
        made: Tensor = self.base_layer(x, *args, **kwargs)
        bias = getattr(self.base_layer, "bias", None)
        for name in running:
            change = self._change(name, self._inputs(x))
            made = add_to_rows(made, x, change, bias)
            if self.training and change.losses:
                made = self.losses.attach(self, made, torch.stack(list(change.losses.values())).sum())
        return made

    def _inputs(self, x: Tensor) -> RouterInput:
        rows = x.reshape(-1, x.shape[-1])
        valid = self.losses.valid(self, rows.shape[0])
        known = {} if valid is None else {"valid": valid.to(rows.device)}
        return RouterInput.of(rows, training=self.training, **known)

    def matrices(self) -> dict[str, Tensor]:
        weight = getattr(self.base_layer, "weight", None)
        return {"weight": weight.detach()} if isinstance(weight, nn.Parameter) else {}

    def held(self) -> dict[str, Tensor]:
        weight = getattr(self.base_layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise UserError(
                f"this {type(self.base_layer).__name__} is stored in fewer bits and nothing can be merged "
                "into it; use the adapter unmerged, or merge it into the model as it was before"
            )
        return {"weight": weight.data}

    def write(self, changes: Sequence[Change]) -> None:
        held = self.held()["weight"]
        for change in changes:
            held.copy_(changed_weight(held, change))


def require_mergeable(adapter: Adapter) -> None:
    """Raise `UserError` unless a method makes the same of every token, so that it can be merged."""
    if "mergeable" not in declared_tags(type(adapter)):
        raise UserError(
            f"{type(adapter).__name__} decides for every token how much of it is added, which no matrix can "
            "hold; use the adapter unmerged"
        )

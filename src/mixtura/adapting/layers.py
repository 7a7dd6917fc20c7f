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

from mixtura.adapting.changing import changed_parameters, nothing, only_thin
from mixtura.adapting.losses import LossBox
from mixtura.adapting.meeting import Met
from mixtura.adapting.weaving import Weaving, can_weave
from mixtura.errors import SettingError, UserError
from mixtura.kernels import backend
from mixtura.methods import declared_tags
from mixtura.methods.adapters import Adapter
from mixtura.rerouting.passes import goes_backward
from mixtura.types import Change, LowRank, Own, Progress, RouterInput

ADAPTERS = "mixtura_adapter"


class AdapterLayer(nn.Module, BaseTunerLayer, ABC):
    """A module of the base with the adapters of its site; those that are active change what it does."""

    adapter_layer_names = (ADAPTERS,)
    other_param_names: tuple[str, ...] = ()
    by_row: tuple[str | None, ...] | None

    def __init__(self, base_layer: nn.Module, losses: LossBox) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.losses = losses
        self.mixtura_adapter = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        # The adapter of each row where these differ; see `mixtura.adapting.selecting`.
        self.by_row = None
        # By adapter: what its sites share, how many there are of this kind, what it met since the last step.
        self._shared: dict[str, str] = {}
        self.num_sites: dict[str, int] = {}
        self._met: dict[str, Met] = {}
        # What merging wrote over, so that taking it back restores every bit.
        self._before: dict[str, Tensor] = {}

    def add(self, name: str, adapter: Adapter, *, empty: bool, shared: str = "") -> None:
        """Put an adapter here, in float32 at least and where the base is.

        ``empty`` ones have no values yet, because they are about to be loaded. ``shared`` tells what its
        sites share from what other sites of the same adapter do.
        """
        if not empty:
            held = next(iter(self.base_layer.parameters()), None)
            dtype = torch.float32
            if held is not None and held.is_floating_point():
                dtype = torch.promote_types(held.dtype, dtype)
            adapter.to(device=self.device, dtype=dtype)
            if "trains_base" in declared_tags(type(adapter)):
                adapter.start(self.matrices())
        # What can be merged makes the same of every token, but may want to be told what it met.
        tags = declared_tags(type(adapter))
        told = "mergeable" not in tags or any(t.startswith(("reads:", "adds_loss")) for t in tags)
        self.losses.reads = self.losses.reads or told
        self.mixtura_adapter[name] = adapter
        self._shared[name] = f"{name}|{shared}"
        self.num_sites[name] = 1

    def before_step(self, name: str, step: int, num_steps: int) -> None:
        """Let an adapter see, and perhaps change, the gradients of a step that is about to be made."""
        adapter, met = self.adapter(name), self._met.pop(name, Met())
        loads, moment, number = met.of_all_processes(self.device)
        adapter.before_step(
            Progress(step=step, num_steps=num_steps, loads=loads, moment=moment, num_tokens=number)
        )

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

    def rows_of(self, num_rows: int) -> dict[str | None, Tensor]:
        """By adapter, its rows; of adapters that are not at this site as of none."""
        assert self.by_row is not None
        if len(self.by_row) != num_rows:
            raise ValueError(f"{num_rows} rows for {len(self.by_row)} texts, of which each has one token")
        found: dict[str | None, list[int]] = {}
        for row, name in enumerate(self.by_row):
            is_here = name is not None and name in self.mixtura_adapter
            found.setdefault(name if is_here else None, []).append(row)
        return {name: torch.tensor(rows, device=self.device) for name, rows in found.items()}

    def _change(self, name: str, x: Tensor) -> Change:
        """What an adapter makes of the site for the rows that it was given."""
        adapter, shared = self.adapter(name), self._shared[name]
        inputs = self.losses.inputs(self, x, shared)
        made = adapter.change(inputs)
        self.losses.keep(self, made, shared)
        if self.training and not goes_backward():
            # Computed again in the backward pass, the same tokens would count twice.
            self._count(name, inputs, made)
        return replace(made, dropout=adapter.dropout if self.training else 0.0)

    def _count(self, name: str, inputs: RouterInput, made: Change) -> None:
        """Add up what an adapter wants to be told before the step."""
        reads = declared_tags(type(self.adapter(name)))
        if not {"reads:loads", "reads:moment"} & reads:
            return
        met = self._met.setdefault(name, Met())
        met.number += int(inputs.valid.sum())
        if "reads:loads" in reads and made.shares is not None:
            met.add_loads((made.shares.detach() != 0)[inputs.valid].sum(0))
        if "reads:moment" in reads:
            rows = inputs.x.detach()[inputs.valid].float()
            met.add_moment(rows.T @ rows)

    def _with_losses(self, name: str, made: Tensor, change: Change) -> Tensor:
        """What a layer made, with the losses of an adapter: their mean over its sites."""
        if not (self.training and change.losses):
            return made
        if not self.losses.reads:
            what = type(self.adapter(name)).__name__
            raise SettingError(f"{what} has a loss of its own; it needs the tag adds_loss")
        total = torch.stack(list(change.losses.values())).sum() / self.num_sites[name]
        return self.losses.attach(self, made, total)

    def _none(self) -> RouterInput:
        site = self.adapter(next(iter(self.mixtura_adapter))).site
        width = next(iter(site.matrices.values())).cols
        return nothing(torch.float32, self.device, width)


@final
class ExpertsLayer(AdapterLayer):
    """All experts of a layer with adapters."""

    def __init__(self, base_layer: nn.Module, losses: LossBox) -> None:
        super().__init__(base_layer, losses)
        self._weaving = Weaving()

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """What the experts make of the tokens, those that adapters change with their changes."""
        given = (hidden_states, top_k_index, top_k_weights)
        woven = self._woven(given)
        if woven is not None:
            return woven
        if self.by_row is None:
            return self._made(self.running, given, *args, **kwargs)
        made = torch.empty_like(hidden_states)
        for name, rows in self.rows_of(hidden_states.shape[0]).items():
            named = [] if name is None else [name]
            own = hidden_states[rows], top_k_index[rows], top_k_weights[rows]
            made[rows] = self._made(named, own, *args, **kwargs)
        return made

    def _woven(self, given: tuple[Tensor, Tensor, Tensor]) -> Tensor | None:
        """What all rows make in one call, where all that their adapters have is experts of their own."""
        names: Sequence[str | None] = self.running if self.by_row is None else self.by_row
        here = [name for name in dict.fromkeys(names) if name is not None and name in self.mixtura_adapter]
        if self.training or torch.is_grad_enabled() or self.merged_adapters or not here:
            return None
        if self.by_row is None and len(here) > 1:
            return None
        if not all("trains_base" in declared_tags(type(self.adapter(name))) for name in here):
            return None
        changes = {name: self.adapter(name).change(self._none()) for name in here}
        if not all(can_weave(self.base_layer, change) for change in changes.values()):
            return None
        changes = {name: change for name, change in changes.items() if not self._is_nothing(change)}
        if not changes:
            return None
        every = here * given[0].shape[0] if self.by_row is None else self.by_row
        return self._weaving.run(self.base_layer, every, changes, given)

    def _made(
        self, running: Sequence[str], given: tuple[Tensor, Tensor, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        base: Any = self.base_layer
        changes = [self._change(name, given[0]) for name in running]
        if self.training and not goes_backward():
            self._count_weights(running, *given)
        told = list(zip(running, changes, strict=True))
        if not torch.is_grad_enabled():
            changes = [change for change in changes if not self._is_nothing(change)]
        changes = self._with_merged(changes)
        if not changes:
            made = base(*given, *args, **kwargs)
        elif base.config._experts_implementation == backend.NAME or hasattr(base, "mixtura_store"):
            made = backend.run_module(base, *given, changes)
        else:
            made = self._built(changes, given + args, kwargs)
        assert isinstance(made, Tensor)
        for name, change in told:
            made = self._with_losses(name, made, change)
        return made

    def _built(self, changes: Sequence[Change], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What an implementation makes with changed matrices, again for tokens that meet others."""
        base = self.base_layer
        for_all = [change for change in changes if change.tokens is None]
        made: Tensor = functional_call(base, changed_parameters(base, for_all), args, kwargs)
        met = [change.tokens for change in changes if change.tokens is not None]
        # Once for each set of changes that some token meets.
        for kind in torch.stack(met).unique(dim=1).T if met else ():
            if kind.any():
                found = iter(kind.tolist())
                own = [change for change in changes if change.tokens is None or next(found)]
                changed = functional_call(base, changed_parameters(base, own), args, kwargs)
                here = (torch.stack(met) == kind[:, None]).all(0)
                made = torch.where(here[:, None], changed, made)
        return made

    def _with_merged(self, changes: list[Change]) -> list[Change]:
        """Changes, with what is merged into matrices in whose place an adapter's own stand."""
        own = {e for c in changes for p in c.matrices.values() if isinstance(p, Own) for e in c.expert_ids}
        if not own or not self.merged_adapters:
            return changes
        merged = (self.adapter(name).change(self._none()) for name in self.merged_adapters)
        return [*(only_thin(change, own) for change in merged), *changes]

    def _count_weights(self, running: Sequence[str], x: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """Add up each expert's weights for adapters that want to be told of them."""
        for name in running:
            if "reads:loads" in declared_tags(type(self.adapter(name))):
                count = self.adapter(name).site.num_experts
                valid = self.losses.inputs(self, x, self._shared[name]).valid
                ids, given = chosen[valid].reshape(-1), weights.detach()[valid].reshape(-1).double()
                here = (ids >= 0) & (ids < count)
                loads = given.new_zeros(count).index_add_(0, ids[here].long(), given[here])
                self._met.setdefault(name, Met()).add_loads(loads)

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


def require_mergeable(adapter: Adapter) -> None:
    """Raise `UserError` unless a method makes the same of every token, so that it can be merged."""
    if "mergeable" not in declared_tags(type(adapter)):
        raise UserError(
            f"{type(adapter).__name__} decides for every token how much of it is added, which no matrix can "
            "hold; use the adapter unmerged"
        )

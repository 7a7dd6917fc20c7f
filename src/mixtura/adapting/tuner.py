"""PEFT's view of the catalogue: finds the sites, makes an adapter at each, and knows how to take them out."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, final

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from mixtura.adapting.blocks import BlockLayer, is_block, require_plain, without_blocks
from mixtura.adapting.config import AdapterConfig, AdapterType
from mixtura.adapting.layers import ADAPTERS, AdapterLayer, ExpertsLayer
from mixtura.adapting.linears import LinearLayer
from mixtura.adapting.losses import LossBox
from mixtura.adapting.sites import (
    base_digest,
    default_targets,
    is_experts,
    num_layers_of,
    router_names,
    shared_by,
    site_of,
)
from mixtura.checkpoints.viewing.wrappers import inner, plain_model, plain_name
from mixtura.errors import CheckpointError, MixturaWarning, UnsupportedModelError, UserError
from mixtura.kernels import PackedLinear, register_backend
from mixtura.methods import load_method
from mixtura.methods.settings import construct

_PREFIX = "mixtura_"
_LAYERS: dict[str, type[LinearLayer] | type[ExpertsLayer] | type[BlockLayer]] = {
    "linear": LinearLayer,
    "experts": ExpertsLayer,
    "block": BlockLayer,
}


@final
class AdapterTuner(BaseTuner):
    """A model with adapters of the catalogue in it; PEFT makes one."""

    prefix = _PREFIX
    tuner_layer_cls = AdapterLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's own name and type
    # While an adapter is put in, its sites by what they share.
    _peers: dict[str, tuple[str, ...]] | None = None

    def _check_new_adapter_config(self, config: AdapterConfig) -> None:
        """Refuse what does not fit, and fill in what the model says."""
        super()._check_new_adapter_config(config)
        here = base_digest(self.model)
        if config.base_digest is not None:
            _check_base(config, here)
        config.base_digest = config.base_digest or here
        if config.target_modules is None:
            config.target_modules = default_targets(self.model, config.changed)
        if config.train_router:
            routers = router_names(self.model)
            if not routers:
                raise UserError("train_router is set, but the model has no routers; leave it out")
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *routers})
        if "experts" in config.changed and config.experts_implementation is not None:
            register_backend()
            plain: Any = plain_model(self.model)
            plain.set_experts_implementation(config.experts_implementation)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter in; where that fails, the model is as it was.

        Raises:
            UserError: its settings do not fit, or leave it nothing to change.
        """
        plain: Any = plain_model(model)
        trained = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
        ran_by = getattr(getattr(plain, "config", None), "_experts_implementation", None)
        try:
            self._peers = None
            config = self.peft_config[adapter_name]
            beside = isinstance(config, AdapterConfig) and "blocks" not in config.changed
            with without_blocks(model) if beside else nullcontext():
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            _join(model, adapter_name)
            _require_parameters(model, adapter_name, self.peft_config[adapter_name])
        except Exception:
            _take_out(model, adapter_name)
            for name, parameter in plain.named_parameters():
                parameter.requires_grad_(trained.get(name, parameter.requires_grad))
            if ran_by is not None and ran_by != plain.config._experts_implementation:
                plain.set_experts_implementation(ran_by)
            raise

    def _prepare_adapter_config(self, peft_config: AdapterConfig, model_config: dict[str, Any]) -> Any:
        del model_config
        return peft_config

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        del parameter_name
        base = target.base_layer if isinstance(target, AdapterLayer) else target
        assert isinstance(base, nn.Module)
        name = plain_name(current_key)
        shared = shared_by(peft_config.scope, base, name)
        if self._peers is None:
            self._peers = self._shared_sites(plain_model(self.model), peft_config)
        peers = self._peers.get(shared, ())
        site = site_of(base, name, num_layers_of(self.model), peers)
        cls = load_method("adapters", peft_config.method)
        adapter = construct(cls, site, **peft_config.settings)
        if isinstance(target, AdapterLayer):
            layer = target
        else:
            if site.kind == "block":
                require_plain(base, name)
            layer = _LAYERS[site.kind](base, self._losses())
            layer.train(base.training)
            setattr(parent, target_name, layer)
        empty = any(parameter.is_meta for parameter in adapter.parameters())
        layer.add(adapter_name, adapter, empty=empty, shared=shared)
        if "reads:embeddings" in peft_config.tags and not empty:
            adapter.begin(_embeddings_of(self.model))

    def before_step(self, step: int, num_steps: int) -> None:
        """Tell adapters that the optimizer is about to make a step; see `mixtura.adapting.StepCallback`.

        Gradients of the whole step are there by then. Adapters tagged ``acts_on_steps`` go by it.
        """
        for layer in self.model.modules():
            if isinstance(layer, AdapterLayer):
                for name in layer.active_adapters:
                    if name in layer.mixtura_adapter:
                        layer.before_step(name, step, num_steps)

    def _shared_sites(self, plain: nn.Module, config: AdapterConfig) -> dict[str, tuple[str, ...]]:
        """The sites of an adapter by what they share, in the model's order."""
        found: dict[str, list[str]] = {}
        if config.scope is None:
            return {}
        for key, module in plain.named_modules():
            name, base = plain_name(key), inner(module)
            known = is_experts(base) or is_block(base) or isinstance(base, nn.Linear | PackedLinear)
            if known and key == name and self._check_target_module_exists(config, name):
                found.setdefault(shared_by(config.scope, base, name), []).append(name)
        return {shared: tuple(names) for shared, names in found.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """A tensor's name in a saved adapter, also of what lies deeper than PEFT looks, such as routers."""
        inside, found, rest = key.partition(f".{ADAPTERS}.{adapter_name}.")
        if found:
            # As where only this adapter is put on.
            return f"{inside.replace('.base_layer.', '.')}.{ADAPTERS}.{rest}"
        plain: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return plain

    def _losses(self) -> LossBox:
        """Where the adapters of the model put what they add to its loss."""
        plain = plain_model(self.model)
        found = getattr(plain, "_mixtura_losses", None)
        box = found if isinstance(found, LossBox) else LossBox()
        box.watch(plain)
        return box

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: object
    ) -> None:
        """Put a base back in the place of what wrapped it."""
        del child
        setattr(parent, child_name, new_module)


def _require_parameters(model: nn.Module, adapter_name: str, config: Any) -> None:
    """Raise `UserError` where an adapter of ours has nothing that could be trained."""
    layers = [one for one in model.modules() if isinstance(one, AdapterLayer)]
    own = [one.adapter(adapter_name) for one in layers if adapter_name in one.mixtura_adapter]
    if isinstance(config, AdapterConfig) and not any(
        parameter.numel() for adapter in own for parameter in adapter.parameters()
    ):
        raise UserError(
            f"the adapter {adapter_name} ({config.method}) names no expert of any layer that it is in, so "
            "that nothing would be learned; name some by experts, or leave it out for all"
        )
    if own and all(adapter.idle for adapter in own):
        raise UserError(
            f"the adapter {adapter_name} ({config.method}) changes nothing where it is put: {own[0].idle}; "
            "put it on others as well (target_modules, layers_to_transform)"
        )


def _embeddings_of(model: nn.Module) -> Tensor:
    """The model's embeddings of its vocabulary.

    Raises:
        UnsupportedModelError: it has none that can be read.
    """
    plain: Any = plain_model(model)
    table: Any = plain.get_input_embeddings()
    if not isinstance(getattr(table, "weight", None), Tensor):
        raise UnsupportedModelError(
            f"the embeddings of this {type(plain).__name__} cannot be read as numbers, which the adapter "
            "begins with; put it on the model as it was before its matrices were stored in fewer bits"
        )
    found: Tensor = table.weight.detach()
    return found


def _join(model: nn.Module, adapter_name: str) -> None:
    """Let the sites of an adapter know how many they are, and share what they share with the first."""
    layers = [one for one in model.modules() if isinstance(one, AdapterLayer)]
    own = [one for one in layers if adapter_name in one.mixtura_adapter]
    by_name = {one.adapter(adapter_name).site.name: one.adapter(adapter_name) for one in own}
    for layer in own:
        adapter = layer.adapter(adapter_name)
        layer.num_sites[adapter_name] = sum(
            type(other) is type(layer) and not other.adapter(adapter_name).idle for other in own
        )
        if adapter.site.peers:
            adapter.join(by_name[adapter.site.peers[0]])


def _take_out(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter, and what holds adapters where it was the only one."""
    # Those within others first, while what is around them is there.
    for name, layer in [*model.named_modules()][::-1]:
        if not isinstance(layer, AdapterLayer):
            continue
        if adapter_name in layer.mixtura_adapter:
            del layer.mixtura_adapter[adapter_name]
        if not len(layer.mixtura_adapter):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, layer.base_layer)


def _check_base(config: AdapterConfig, here: str) -> None:
    """Refuse an adapter of a model of another structure, and warn of one with other values."""
    assert config.base_digest is not None
    structure, _, values = config.base_digest.partition("-")
    own_structure, _, own_values = here.partition("-")
    if structure != own_structure:
        raise CheckpointError(
            f"the adapter was made for another model ({config.base_model_name_or_path or 'unnamed'}; base "
            f"digest {config.base_digest}, this model's is {here}); give the model that it was trained on"
        )
    if values and own_values and values != own_values:
        warnings.warn(
            f"the adapter was trained on other weights ({config.base_model_name_or_path or 'unnamed'}; base "
            f"digest {config.base_digest}, here {here}); what it learned may not fit these",
            MixturaWarning,
            stacklevel=2,
        )


def register() -> None:
    """Make the type known to PEFT. Calling it again is harmless."""
    PEFT_TYPE_TO_CONFIG_MAPPING[AdapterType.MIXTURA] = AdapterConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[AdapterType.MIXTURA] = AdapterTuner  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[AdapterType.MIXTURA] = _PREFIX  # type: ignore[index]

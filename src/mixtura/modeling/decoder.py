"""The decoder: attention and MoE layers in turn, with what routers hand on handed on."""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from mixtura.errors import CheckpointError, UserError
from mixtura.machine.releases import CACHE_NAMES, given_cache, takes_cache, with_cache
from mixtura.methods import declared_tags, header
from mixtura.methods._norms import RMSNorm
from mixtura.methods.attentions import Attention
from mixtura.modeling.attention import MixturaRotaryEmbedding, history_name, make_attentions, told_alike
from mixtura.modeling.balance import OWN_LAYERS_READ, LayerBalance, ModelBalance
from mixtura.modeling.cache import Owner, recall, remember
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.decoder_layer import MixturaDecoderLayer, names_of
from mixtura.modeling.forming import passes_of
from mixtura.modeling.layer import MoELayer
from mixtura.modeling.parts import axes_of, bank_of, make_balancers, make_layers, tags_of
from mixtura.modeling.tokens import Tokens, describe
from mixtura.types import Routing


@final
@dataclass
class MixturaModelOutput(BaseModelOutputWithPast):
    """Hidden states, the cache, and what every MoE layer, and attention that chooses heads, decided."""

    # Some releases say float32 of states in any dtype.
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor | None, ...] | None = None
    routings: tuple[Routing, ...] | None = None
    head_routings: tuple[Routing, ...] | None = None
    tokens: Tokens | None = None


@contextmanager
def frozen_noise() -> Iterator[None]:
    """Leave the global random generator as it was, whatever happens inside."""
    with torch.random.fork_rng(devices=[]):
        yield


def noise_seed(*numbers: int) -> int:
    """A seed for these numbers on this process: the same again when something is computed again."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return Random(repr((*numbers, rank))).getrandbits(62)


# Experts were parameters of their layer before they were a bank of it.
_EARLIER_NAMES = {r"\.experts\.(gate_up_proj|down_proj)": r".experts.bank.\1"}
_EARLIER_POOLS = re.compile(r"\.members\.\d+\.(gate_up_proj|down_proj)$")


class MixturaPreTrainedModel(PreTrainedModel, ABC):
    """What is common to the models of this family."""

    config_class = MixturaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MixturaDecoderLayer",)
    _skip_keys_device_placement = CACHE_NAMES
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ("balance",)
    _can_record_outputs = {"hidden_states": MixturaDecoderLayer, "attentions": Attention}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model; what the checkpoint lacks, such as another router's weights, is drawn by the seed.

        Arguments are those of `PreTrainedModel.from_pretrained`, which draws what it knows alone and leaves
        the rest as memory happened to be.
        """
        kwargs["key_mapping"] = {**_EARLIER_NAMES, **(kwargs.get("key_mapping") or {})}
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        # Drawing anew what lies there under another name would lose what was trained.
        unread = sorted(filter(_EARLIER_POOLS.search, info["unexpected_keys"]))
        if unread:
            raise CheckpointError(
                f"{unread[0]} and {len(unread) - 1} other weights in this checkpoint are named as an earlier "
                "mixtura named experts of a pool; train it anew, or export it with that mixtura"
            )
        if missing:
            drawn, held = cls(model.config).state_dict(), model.state_dict()
            with torch.no_grad():
                for name in missing:
                    held[name].copy_(drawn[name])
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what is not drawn by its own seed: projections and embeddings, in order."""
        if isinstance(module, nn.Linear | nn.Embedding):
            if module.weight.is_meta:
                return
            drawn = torch.randn(module.weight.shape, generator=self._generator(), device="cpu")
            init.copy_(module.weight, drawn * self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, MixturaRotaryEmbedding):
            super()._init_weights(module)

    def _generator(self) -> torch.Generator:
        if not hasattr(self, "_drawing"):
            self._drawing = torch.Generator().manual_seed(self.config.seed)
        return self._drawing

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Attention whose weights can be read, where a router reads them."""
        needed = any("reads:attention" in _tags(plan) for plan in self.config.plans)
        wanted = "eager" if needed else attn_implementation
        return str(super()._check_and_adjust_attn_implementation(wanted, *args, **kwargs))


def _tags(plan: Any) -> frozenset[str]:
    if plan is None:
        return frozenset()
    kind, choice = ("routers", plan.router) if plan.mixer is None else ("mixers", plan.mixer)
    return frozenset(header(kind, choice.name).tags)


@final
class MixturaModel(MixturaPreTrainedModel):
    """The decoder without the head."""

    def __init__(self, config: MixturaConfig) -> None:
        super().__init__(config)
        with frozen_noise():
            self._make()
        self._tied_weights_keys = self._shared_names()
        self.post_init()

    def _make(self) -> None:
        config = self.config
        plans = config.plans
        blocks = make_layers(plans, config.hidden_size, config.seed, config.initializer_range)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            MixturaDecoderLayer(config, attention, one)
            for attention, one in zip(make_attentions(config), blocks, strict=True)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MixturaRotaryEmbedding(config)
        both = [
            (plan, one)
            for plan, block in zip(plans, blocks, strict=True)
            if plan is not None and block is not None
            for one in passes_of(block)
        ]
        self.balance = ModelBalance(
            [
                LayerBalance(balancers, shape, OWN_LAYERS_READ)
                for plan, one in both
                for balancers, shape in zip(
                    make_balancers(plan, one.router, bank_of(one)), axes_of(one.router), strict=True
                )
            ],
            config.seed,
        )

    @property
    def blocks(self) -> tuple[MoELayer, ...]:
        """The passes of all MoE layers in order; a layer without a form is one pass."""
        return tuple(one for layer in self.layers for one in passes_of(layer.mlp))

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention of every layer."""
        return tuple(layer.self_attn for layer in self.layers if isinstance(layer, MixturaDecoderLayer))

    @property
    def places(self) -> tuple[MoELayer, ...]:
        """For each routing that balancers see the pass it is of: twice where experts lie on a grid."""
        return tuple(one for one in self.blocks for _ in axes_of(one.router))

    def _shared_names(self) -> dict[str, str]:
        """Names of parameters that several layers share, beside the first name of each."""
        first: dict[int, str] = {}
        shared = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if id(parameter) in first:
                shared[name] = first[id(parameter)]
            first.setdefault(id(parameter), name)
        return shared

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Shared routers and experts are shared whether or not the embeddings are."""
        del all_submodels
        return dict(self._tied_weights_keys)

    @takes_cache
    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Int[Tensor, "B Q"] | None = None,
        attention_mask: Any = None,
        position_ids: Int[Tensor, "_ Q"] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "B Q D"] | None = None,
        use_cache: bool | None = None,
        token_labels: Mapping[str, Tensor] | None = None,
        part: int = 0,
        draw: int = 0,
        **kwargs: Any,
    ) -> MixturaModelOutput:
        """Hidden states of tokens, and the routing of every MoE layer.

        Args:
            input_ids: vocabulary entries; or give ``inputs_embeds``.
            attention_mask: 0 for padding.
            position_ids: where they start again within a row, another document begins.
            past_key_values: keys and values of earlier tokens, and what routers remember of them.
            inputs_embeds: tokens as vectors.
            use_cache: whether to keep them.
            token_labels: what is known of tokens, by name: ``[B, Q]`` or ``[B]``.
            part: number of the micro-batch in its step; with ``draw`` it sets the noise of training.
            draw: which of several passes over the same tokens this is.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give the model either input_ids or inputs_embeds")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # Continuous batching keeps the pages of all its sequences in one, which has no length.
        past_length = past_key_values.get_seq_length() if isinstance(past_key_values, Cache) else None
        if position_ids is None:
            position_ids = (torch.arange(x.shape[1], device=x.device) + (past_length or 0)).unsqueeze(0)
        tokens = describe(
            size=(x.shape[0], x.shape[1]),
            device=x.device,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_length=past_length,
            token_labels=token_labels,
        )
        self._refuse_unordered(kwargs)
        windows = [attention.window for attention in self.attentions]
        common = told_alike(
            windows, self.config, self.rotary_emb, x, attention_mask, position_ids, past_key_values
        )
        x, routings, heads = self._run(x, tokens, common | kwargs, (part, draw))
        kept = with_cache(past_key_values) if isinstance(past_key_values, Cache) else {}
        return MixturaModelOutput(
            last_hidden_state=self.norm(x), routings=routings, head_routings=heads, tokens=tokens, **kept
        )

    def _run(
        self, x: Tensor, tokens: Tokens, kwargs: Mapping[str, Any], noise: tuple[int, int]
    ) -> tuple[Tensor, tuple[Routing, ...], tuple[Routing, ...]]:
        """All layers in turn."""
        routings: list[Routing] = []
        head_routings: list[Routing] = []
        histories: dict[Owner, Mapping[str, Tensor]] = {}
        cache, number = given_cache(kwargs), 0
        step, state = int(self.balance.step), None
        for layer, attention in zip(self.layers, self.attentions, strict=True):
            place = len(routings)
            passes = passes_of(layer.mlp)
            common = {"layer": number, "step": step, "state": state}
            told = self._told(place, passes, cache, x)
            seed = noise_seed(self.config.seed, step, *noise, place) if self.training else None
            x, found, heads = layer(x, tokens=tokens, common=common, told=told, noise_seed=seed, **kwargs)
            number += bool(passes)
            for routing in found:
                if routing.history:
                    histories[len(routings)] = routing.history
                routings.extend(routing.places)
                state = routing.state
            if heads is not None:
                head_routings.append(heads)
                histories |= {history_name(attention): heads.history} if heads.history else {}
        if isinstance(cache, Cache):
            remember(cache, histories)
        return x, tuple(routings), tuple(head_routings)

    def _told(
        self, place: int, passes: Sequence[MoELayer], cache: Any, x: Tensor
    ) -> tuple[dict[str, Any], ...]:
        """What each pass of a layer is told that does not come from the tokens; its first is ``place``."""
        told = []
        for one in passes:
            own = self.balance.of(place)
            # What a step may not use is drawn for training alone: at inference every expert is there.
            allowed = own.allowed if self.training else None
            told.append(
                {
                    "history": recall(cache, place),
                    "selection_bias": own.bias,
                    "allowed": None if allowed is None else allowed.expand(x.shape[0] * x.shape[1], -1),
                    "ties": own.ties,
                }
            )
            place += len(axes_of(one.router))
        return tuple(told)

    def _refuse_unordered(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse continuous batching where routers or attentions need earlier tokens of a sequence."""
        if "cu_seq_lens_q" not in kwargs:
            return
        for block, attention in zip(self.layers, self.attentions, strict=True):
            if attention.window is not None or "routes" in declared_tags(type(attention)):
                raise UserError(
                    f"{type(attention).__name__} with a window or with heads that are chosen cannot run in "
                    "continuous batching, whose cache keeps every key of every head; use generate"
                )
            if tags_of(block.mlp) & {"reads:history", "reads:attention", "looks_ahead", "reads:sequence_ids"}:
                raise UserError(
                    f"{names_of(block.mlp)} needs a sequence's other tokens, which continuous "
                    "batching does not keep together; use generate"
                )

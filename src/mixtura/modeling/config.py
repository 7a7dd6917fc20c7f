"""The configuration of `MixturaForCausalLM`: an ordinary transformers config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, final

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mixtura.errors import SettingError, UnknownNameError, check_range
from mixtura.machine.releases import CACHE
from mixtura.methods.settings import fits
from mixtura.modeling.plan import Choice, MoEPlan, read_attentions, read_layers

_LARGEST = 1 << 40
# Fields with their types and ranges; None is left to the checks that follow where it is allowed.
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_OPTIONAL = ("num_key_value_heads", "head_dim")
_SHARES = {"attention_dropout": (0.0, 1.0), "initializer_range": (0.0, 1e6), "rms_norm_eps": (0.0, 1.0)}
_SWITCHES = (
    "attention_bias", "use_cache", "tie_word_embeddings", "normed_head", "parallel", "output_router_logits",
)  # fmt: skip


@final
class MixturaConfig(PreTrainedConfig):
    """Sizes of the decoder, and by layer its router or mixer, experts and balancers.

    Args:
        attention: a method of the kind attentions, as a name or a mapping of a name and settings; or a list
            of them, which layers take in turn.
        query_key_norm: RMSNorm of queries and keys: "none", over each "head" or over the "full" width.
        normed_head: whether the head's weights have length 1 over the vocabulary, feature by feature.
        parallel: whether attention and experts of a layer read the same tokens, side by side, and not one
            what the other has added.
        moe: what every layer's experts and routing have in common; see `mixtura.modeling.plan.MoEPlan`.
        layers: what is different in each layer: one entry a layer, "dense", null or a mapping.
        intermediate_size: width of the feed-forward part of dense layers.
        seed: of every weight and of all noise in training.

    Raises:
        SettingError: a part of ``moe``, ``layers`` or ``attention`` is unknown or does not fit, or heads do
            not divide.

    >>> config = MixturaConfig(num_hidden_layers=2, moe={"router": "top_k"}, layers=["dense", None])
    >>> [plan and plan.num_experts for plan in config.plans]
    [None, 8]
    """

    # transformers passes fields that this class does not name through its constructor, whose signature
    # checkers of types would otherwise hold it to.
    __no_type_check__ = True
    model_type = "mixtura"
    keys_to_ignore_at_inference = (CACHE, "router_logits", "routings")

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention: str | dict[str, Any] | list[Any] = "grouped_query"
    query_key_norm: Literal["none", "head", "full"] = "head"
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    use_cache: bool = True
    tie_word_embeddings: bool = False
    normed_head: bool = False
    parallel: bool = False
    output_router_logits: bool = False
    moe: dict[str, Any] | None = None
    layers: list[Any] | None = None
    seed: int = 0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_types(self)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise SettingError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.query_key_norm not in ("none", "head", "full"):
            raise SettingError(f"query_key_norm must be none, head or full, got {self.query_key_norm!r}")
        if self.hidden_act != "silu":
            raise SettingError(
                f"hidden_act must be silu, the activation of dense layers, got {self.hidden_act!r}; that of "
                "experts is a setting of theirs"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise SettingError(f"head_dim must be even, for rotary positions, got {self.head_dim}")
        self.moe = {} if self.moe is None else dict(self.moe)
        super().__post_init__(**kwargs)
        # Refuses what is wrong where it is written, not where it is used.
        read_layers(self.moe, self.layers, self.num_hidden_layers)
        read_attentions(self.attention, self.num_hidden_layers)

    @property
    def attentions(self) -> tuple[Choice, ...]:
        """The attention of every decoder layer."""
        return read_attentions(self.attention, self.num_hidden_layers)

    @property
    def plans(self) -> tuple[MoEPlan | None, ...]:
        """The plan of every decoder layer; None for a dense one."""
        return read_layers(self.moe or {}, self.layers, self.num_hidden_layers)


def _check_types(config: MixturaConfig) -> None:
    """Raise `SettingError` for a field of the wrong type or out of range, with its name."""
    for name in _SIZES:
        value = getattr(config, name)
        if value is None and name in _OPTIONAL:
            continue
        if not fits(value, int):
            raise SettingError(f"{name} of model must be a whole number, got {value!r}")
        check_range("model", name, value, 1, _LARGEST)
    for name, (low, high) in _SHARES.items():
        value = getattr(config, name)
        if not fits(value, float):
            raise SettingError(f"{name} of model must be a number, got {value!r}")
        check_range("model", name, value, low, high)
    for name in _SWITCHES:
        if not isinstance(getattr(config, name), bool):
            raise SettingError(f"{name} of model must be true or false, got {getattr(config, name)!r}")
    for name in ("moe", "rope_parameters"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, Mapping):
            raise SettingError(f"{name} of model must hold keys and values, got {value!r}")
    if config.layers is not None and not isinstance(config.layers, list | tuple):
        raise SettingError(f"layers of model must be a list with one entry a layer, got {config.layers!r}")
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    known = {"default", *ROPE_INIT_FUNCTIONS}
    if kind not in known:
        raise UnknownNameError("rope_type", str(kind), known)

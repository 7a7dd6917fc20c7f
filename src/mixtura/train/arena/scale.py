"""How large the arena's model is and how it is trained: the same for everyone who takes part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from mixtura.errors import SettingError, check_range


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of the model and of a step.

    Attributes:
        hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim: of the model.
        num_experts, d_expert: experts of a layer and their width.
        top_k: experts a token, of every method that can be set so.
        sequence_length: tokens of a sequence.
        num_sequences: sequences of a step.
        learning_rate: at its peak.
    """

    hidden_size: int = 96
    num_hidden_layers: int = 2
    num_attention_heads: int = 3
    num_key_value_heads: int = 1
    head_dim: int = 32
    num_experts: int = 8
    d_expert: int = 128
    top_k: int = 2
    sequence_length: int = 128
    num_sequences: int = 4
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        for name in self.__slots__:
            least = 1e-12 if name == "learning_rate" else 1
            check_range("the arena's model", name, getattr(self, name), least, 1 << 30)
        check_range("the arena's model", "sequence_length", self.sequence_length, 2, 1 << 20)
        if self.num_experts % self.top_k or self.top_k > self.num_experts:
            raise SettingError(
                f"num_experts of the arena's model must be a multiple of top_k, got {self.num_experts} "
                f"and {self.top_k}"
            )

    @staticmethod
    def read(path: str | Path) -> Scale:
        """The scale in a YAML file; what it leaves out is as in the small arena.

        Raises:
            UserError: the file cannot be read or is no mapping.
            UnknownNameError: a key does not exist; the message has the nearest that does.
            SettingError: a value is of the wrong type or out of range.
        """
        from mixtura.train.config import read_record

        return read_record(Scale, path, "the arena's model")

    @property
    def config(self) -> dict[str, Any]:
        """Fields of the model's configuration that all entries share."""
        heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
        sizes = {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", *heads)}
        return sizes | {
            "query_key_norm": "head",
            "tie_word_embeddings": True,
            "initializer_range": 0.05,
            "max_position_embeddings": self.sequence_length,
        }

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step of the optimizer."""
        return self.num_sequences * self.sequence_length

    @property
    def wide(self) -> Mapping[str, int]:
        """Experts for a method that sends a token to one: fewer, and as much wider."""
        return {"num_experts": self.num_experts // self.top_k, "d_expert": self.top_k * self.d_expert}

    @property
    def share(self) -> int:
        """Tokens that an expert takes of a sequence where experts choose tokens."""
        return max(1, self.sequence_length * self.top_k // self.num_experts)

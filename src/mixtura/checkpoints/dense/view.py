"""A dense checkpoint on disk, opened from its headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import final

from mixtura.checkpoints.dense.families import DenseFamily, Traits, family_of, head_dim
from mixtura.checkpoints.packed import is_packed
from mixtura.checkpoints.viewing.beside import require_alone
from mixtura.checkpoints.viewing.checks import check_present
from mixtura.checkpoints.viewing.disk import DiskLayer
from mixtura.checkpoints.viewing.headers import TensorEntry
from mixtura.checkpoints.viewing.meta import build_from_config, named_tensors
from mixtura.checkpoints.viewing.opening import open_files
from mixtura.checkpoints.viewing.reader import compute_dtype
from mixtura.checkpoints.viewing.stored import StoredView
from mixtura.checkpoints.viewing.wrappers import experts_modules
from mixtura.errors import UnsupportedModelError
from mixtura.types.upcycling import DenseShape

GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
QUERY, KEY = "self_attn.q_proj.weight", "self_attn.k_proj.weight"
_LAYERS = "model.layers"
_READ = {"float64", "float32", "float16", "bfloat16"}


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """One matrix or vector of a dense model: a stored tensor, or some rows of one; ``shift`` is added."""

    entry: TensorEntry
    rows: tuple[int, int]
    shift: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return (self.rows[1] - self.rows[0], *self.entry.shape[1:])


@final
class DenseView(StoredView):
    """A dense model's directory: what stands outside the feed-forward parts, and these by layer.

    Names are those of Llama, whatever the family: ``pieces`` maps them to where their bytes are.

    Raises:
        CheckpointError: it is missing, incomplete or damaged.
        UnsupportedModelError: it has experts already, is of a family or in a format that is not read.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        opened = open_files(path)
        _refuse_experts(opened.path, opened.raw_config)
        require_alone(opened.path, "what is made of it")
        meta = build_from_config(opened.config)
        if next(experts_modules(meta), None) is not None:
            raise _is_moe(opened.path)
        self.family: DenseFamily = family_of(opened.config)
        self.traits: Traits = self.family.traits(opened.config)
        super().__init__(opened, meta, opened.entries)
        check_present(self.path, meta, self.sources, self.stored, ())
        self.pieces: Mapping[str, Piece] = self._pieces()
        config = opened.config
        self.shape = DenseShape(
            d_model=config.hidden_size,
            d_ffn=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            d_head=head_dim(config),
            num_words=config.vocab_size,
        )

    @property
    def layers(self) -> tuple[DiskLayer, ...]:
        """None: it has no MoE layers."""
        return ()

    @property
    def stacks(self) -> tuple[str, ...]:
        """The module that holds the decoder layers."""
        return (_LAYERS,)

    @property
    def stored_dtype(self) -> str:
        """What the model computes in."""
        return str(compute_dtype(self.config)).removeprefix("torch.")

    def layer_piece(self, layer: int, name: str) -> Piece:
        """A matrix of a decoder layer, such as `GATE`."""
        return self.pieces[f"{_LAYERS}.{layer}.{name}"]

    def _pieces(self) -> dict[str, Piece]:
        found: dict[str, Piece] = {}
        for name in named_tensors(self._meta):
            # A head that is tied to the embeddings is stored once, under their name.
            if name in self.sources and self._is_own(name):
                found.update(self._cut(name, self._entry(name)))
        return found

    def _is_own(self, name: str) -> bool:
        tied = dict(getattr(self._meta, "all_tied_weights_keys", {}))
        kept = tied.get(name)
        return kept not in self.sources or self.sources[kept].names != self.sources[name].names

    def _entry(self, name: str) -> TensorEntry:
        source = self.sources[name]
        stored = self.stored[source.names[0]]
        if source.converter is not None or len(source.names) != 1 or stored.kind not in _READ:
            raise UnsupportedModelError(
                f"{self.path} stores {name} as {stored.kind} or in parts, and experts are made of plain "
                f"numbers alone; give the checkpoint in bfloat16, float16 or float32"
            )
        return self.entries[stored.parts[0]]

    def _cut(self, name: str, entry: TensorEntry) -> dict[str, Piece]:
        """The pieces that a parameter is, under Llama's names."""
        for fused, parts_of in self.family.fused.items():
            before, middle, after = name.partition(f".{fused}.")
            if not middle:
                continue
            made, start = {}, 0
            for part, rows in parts_of(self.config):
                made[f"{before}.{part}.{after}"] = Piece(entry, (start, start + rows))
                start += rows
            return made
        is_norm = name.endswith("norm.weight")
        return {name: Piece(entry, (0, entry.shape[0]), self.traits.norm_shift if is_norm else 0.0)}


def _refuse_experts(path: Path, raw: Mapping[str, object]) -> None:
    """Refuse what is stored in few bits before anything else of it is looked at."""
    if is_packed(path) or raw.get("quantization_config"):
        raise UnsupportedModelError(
            f"{path} is stored in few bits or in the mixtura format, and experts are made of plain numbers "
            f"alone; give the dense model in bfloat16, float16 or float32"
        )


def _is_moe(path: Path) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} is a Mixture-of-Experts model already, and experts are made of dense models; give a dense "
        "one, or change this one with mixtura compress, tune or set_router"
    )

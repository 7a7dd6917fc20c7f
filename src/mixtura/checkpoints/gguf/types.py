"""What tensors of a GGUF file are stored as: the types there are, and which tensor gets which."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, final

import torch

from mixtura.checkpoints.gguf.package import gguf_package
from mixtura.errors import SettingError, UnknownNameError, UserError

# Not rounded beyond what PyTorch itself does.
PLAIN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# What a type that needs rows of whole blocks of 256 gives way to, as llama.cpp has it, and that to f16.
_GIVES_WAY = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
}
# Types of 32 weights a block, which llama.cpp's files have as well.
_SIMPLE = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
NAMES = (*PLAIN.values(), *_SIMPLE, *_GIVES_WAY)
# These are made of a codebook and signs, and llama.cpp makes them only with what calibration text says.
NEED_IMPORTANCE = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"})
# Words for tensors, and llama.cpp's names of them.
GROUPS: dict[str, tuple[str, ...]] = {
    "experts": ("blk.*.ffn_gate_exps", "blk.*.ffn_up_exps", "blk.*.ffn_down_exps"),
    "shared": ("blk.*.ffn_*_shexp",),
    "dense": ("blk.*.ffn_gate", "blk.*.ffn_up", "blk.*.ffn_down"),
    "attention": ("blk.*.attn_*",),
    "embedding": ("token_embd",),
    "head": ("output",),
}
_ENDS = (*GROUPS["embedding"], *GROUPS["head"])
_END_TYPE = "q8_0"


@final
@dataclass(frozen=True, slots=True)
class StorageType:
    """One way to store a tensor: so many weights of a row in a block of so many bytes."""

    name: str
    block: int
    block_bytes: int
    number: int

    @property
    def bits(self) -> float:
        """Bits of a weight."""
        return 8 * self.block_bytes / self.block

    @property
    def is_plain(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.name in PLAIN.values()

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor whose rows are whole blocks."""
        return math.prod(shape) // self.block * self.block_bytes


@cache
def storage_type(name: str) -> StorageType:
    """A type by its name, in any case.

    Raises:
        UnknownNameError: there is none of that name.
    """
    wanted = name.lower()
    if wanted not in NAMES:
        raise UnknownNameError("type of GGUF files", name, NAMES)
    package: Any = gguf_package()
    number = package.GGMLQuantizationType[wanted.upper()]
    block, num_bytes = package.GGML_QUANT_SIZES[number]
    return StorageType(wanted, block, num_bytes, int(number))


@final
class TypeRules:
    """Which tensor is stored as what.

    Args:
        rules: ``TYPE`` for every matrix, or ``TENSORS=TYPE`` for some; of several that are for a tensor the
            last counts. TENSORS is one of `GROUPS`, or a pattern of llama.cpp's names such as
            ``blk.3.ffn_down_exps`` or ``blk.*.ffn_down_exps``. Where a plain TYPE has fewer than eight bits,
            embedding and head are q8_0 unless a rule is for them.

    Raises:
        SettingError: a rule is not of that form.
        UnknownNameError: a type is none.

    >>> TypeRules(["q4_k", "blk.0.*=q6_k"]).wanted("blk.0.attn_q")
    'q6_k'
    """

    def __init__(self, rules: Iterable[str]) -> None:
        self._rules: list[tuple[str, tuple[str, ...], str]] = []
        for rule in rules:
            tensors, equals, name = rule.rpartition("=")
            if name.lower() not in NAMES:
                raise UnknownNameError("type of GGUF files", name, NAMES)
            if equals and not tensors:
                raise SettingError(f"{rule!r} names no tensors; write TENSORS=TYPE, such as experts=q4_k")
            patterns = GROUPS.get(tensors, (tensors.removesuffix(".weight"),)) if equals else ()
            self._rules.append((rule, patterns, name.lower()))

    def wanted(self, tensor: str) -> str | None:
        """The type that the rules have for a matrix by its name without ``.weight``; None for no rule."""
        for _, patterns, name in reversed(self._rules):
            if not patterns:
                narrow = name not in PLAIN.values()
                return _END_TYPE if narrow and tensor in _ENDS else name
            if any(fnmatchcase(tensor, pattern) for pattern in patterns):
                return name
        return None

    def check_used(self, matrices: Iterable[str], others: Iterable[str]) -> None:
        """Refuse rules that are for nothing.

        Args:
            matrices: names of the tensors that rules are for.
            others: names of those that are always f32.

        Raises:
            UserError: a rule is for none of the matrices; the sentence says what there is.
        """
        known, fixed = list(matrices), list(others)
        for rule, patterns, _ in self._rules:
            if not patterns or any(fnmatchcase(name, pattern) for name in known for pattern in patterns):
                continue
            if any(fnmatchcase(name, pattern) for name in fixed for pattern in patterns):
                raise UserError(
                    f"--type {rule} is for norms, biases or routers, which llama.cpp has in f32; leave it out"
                )
            kinds = sorted({name.split(".")[-1] for name in known})
            raise UserError(
                f"--type {rule} is for no tensor of this model; name a group ({', '.join(GROUPS)}) or a "
                f"pattern of llama.cpp's names, which end in {', '.join(kinds)}"
            )


def fitting_type(name: str, cols: int) -> StorageType:
    """The type, or what it gives way to where rows of so many weights are not whole blocks of it."""
    found = storage_type(name)
    if cols % found.block == 0:
        return found
    return fitting_type(_GIVES_WAY.get(found.name, "f16"), cols)

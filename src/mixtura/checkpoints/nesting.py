"""At how many bits experts are read that hold several widths in one copy.

A quantizer such as ``nested`` stores codes whose upper bits are codes of a narrower width, apart from the
lower ones. Such an expert may be read at any of its widths: what a narrower one does not need is neither
read from disk, nor kept, nor passed over while running.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from mixtura.checkpoints.packed import ExpertRecord, LayerRecord
from mixtura.errors import UserError
from mixtura.methods import create
from mixtura.types import Plan

# Bits for all experts that can be read at them, or by decoder layer and expert for those alone.
Widths: TypeAlias = int | Mapping[tuple[int, int], int]


def widths_of(expert: ExpertRecord) -> tuple[int, ...]:
    """The bits an expert can be read at, widest first; none where it is read whole."""
    return tuple(sorted(expert.up.widths.keys() & expert.down.widths.keys(), reverse=True))


def expert_at(expert: ExpertRecord, bits: int) -> ExpertRecord:
    """What is read of an expert at so many bits.

    Raises:
        UserError: it does not hold that width.
    """
    if bits not in widths_of(expert):
        held = ", ".join(map(str, widths_of(expert)))
        what = f"only {held}" if held else "no widths to choose from (the quantizer nested stores such)"
        raise UserError(f"an expert cannot be read at {bits} bits: what is here of it holds {what}")
    up, down = (replace(m, parts=tuple(sorted(m.widths[bits]))) for m in (expert.up, expert.down))
    return replace(expert, up=up, down=down)


def layer_at(layer: LayerRecord, widths: Widths | None) -> LayerRecord:
    """What is read of a layer's experts.

    Args:
        layer: the layer as it is stored.
        widths: one number for every expert that holds several widths, or such that are narrower: these
            stay; by decoder layer and expert, the others staying as they are; or None for all there is.

    Raises:
        UserError: an expert that is named does not hold that width, or the number is none of 8, 4 and 2.
    """
    if layer.experts is None or widths is None:
        return layer
    experts = list(layer.experts)
    for number, expert in enumerate(experts):
        bits = bits_of(expert, layer.index, number, widths)
        if bits is not None:
            experts[number] = expert_at(expert, bits)
    return replace(layer, experts=tuple(experts))


def bits_of(expert: ExpertRecord, layer: int, number: int, widths: Widths) -> int | None:
    """The bits that ``widths`` asks for; None where an expert stays as it is."""
    if isinstance(widths, Mapping):
        return widths.get((layer, number))
    if widths not in (8, 4, 2):
        raise UserError(f"bits to read experts at must be 8, 4 or 2, got {widths!r}")
    held = [bits for bits in widths_of(expert) if bits <= widths]
    return held[0] if held else None


def widths_of_plan(plan: Plan) -> dict[tuple[int, int], int]:
    """The bits a plan gives its experts, to read a nested copy of the same model at.

    >>> from mixtura.types import Quantize
    >>> actions = (Quantize(0, 2, "round_to_nearest", {"bits": 2}), Quantize(1, 0, "round_to_nearest", {}))
    >>> widths_of_plan(Plan("sha256:0", actions))
    {(0, 2): 2, (1, 0): 4}
    """
    quantized = plan.quantized().items()
    return {place: create("quantizers", a.quantizer, **a.settings).bits for place, a in quantized}


def check_named(layers: tuple[LayerRecord, ...], widths: Widths | None) -> None:
    """Refuse widths that would change nothing or name an expert that is not there.

    Raises:
        UserError: no expert holds several widths, or one that is named is not stored in fewer bits.
    """
    if widths is None:
        return
    experts = {(layer.index, n): e for layer in layers for n, e in enumerate(layer.experts or ())}
    if not any(widths_of(expert) for expert in experts.values()):
        raise UserError(
            "no expert of this model can be read at fewer bits than it is stored in; write it with the "
            "quantizer nested for that"
        )
    if isinstance(widths, Mapping):
        for index, number in widths:
            if (index, number) not in experts:
                raise UserError(f"layer {index} has no expert {number} that is stored in fewer bits")

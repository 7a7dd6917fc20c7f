"""What every quantizer promises."""

from __future__ import annotations

import json
from itertools import pairwise

import torch
from safetensors.torch import load, save
from torch import Tensor

from mixtura.authoring.contracts._compare import same
from mixtura.authoring.contracts._core import Subject, require
from mixtura.errors import UserError
from mixtura.methods.quantizers import Encoded, Quantizer

_SHAPES = ((1, 1), (3, 5), (16, 64), (7, 130), (64, 33), (2, 512))


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> Tensor:
    """A matrix whose columns are no multiple of any group."""
    del method
    return torch.randn(12, 130, generator=torch.Generator().manual_seed(seed))


def use(quantizer: Quantizer, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What is stored, and the matrix back."""
    encoded = quantizer.encode(weight)
    return encoded.tensors, quantizer.decode(encoded)


def check_shapes_and_dtypes(method: Subject) -> None:
    """Matrices of any size and floating dtype come back in the size and dtype asked for."""
    quantizer = method.create()
    for rows, cols in _SHAPES:
        weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            back = quantizer.decode(quantizer.encode(weight.to(dtype)), dtype)
            require(
                back.shape == weight.shape and back.dtype == dtype,
                f"[{rows}, {cols}] {dtype} comes back other",
            )
            require(torch.isfinite(back).all(), f"[{rows}, {cols}] in {dtype} is not finite")


def check_loses_less_than_everything(method: Subject) -> None:
    """The error is smaller than the matrix itself: better than storing zeros."""
    weight = sample(method, 10)
    lost = _lost(method.create(), weight)
    require(lost < 1, f"the relative error is {lost:.3g}; zeros in its place would have 1")


def check_more_bits_lose_less(method: Subject) -> None:
    """With a setting ``bits``, each of 8, 4 and 2 takes fewer bytes and loses more than the one before."""
    if not any(setting.name == "bits" for setting in method.header.settings):
        return
    weight = sample(method, 11)
    offered = [q for bits in (8, 4, 2) if (q := _with_bits(method, bits)) is not None]
    for more, fewer in pairwise(offered):
        require(more.num_bytes(64, 512) > fewer.num_bytes(64, 512), "fewer bits must take fewer bytes")
        require(_lost(more, weight) < _lost(fewer, weight), "more bits must lose less")


def check_narrower_widths_read_less(method: Subject) -> None:
    """Where ``widths`` offers several, each decodes from its own tensors alone; narrower ones are less."""
    quantizer = method.create()
    weight = sample(method, 18)
    encoded = quantizer.encode(weight)
    sizes, losses = [], []
    for width in sorted(quantizer.widths, reverse=True):
        names = quantizer.widths[width]
        require(set(names) <= set(encoded.tensors), f"{width} bits read tensors that are not there: {names}")
        own = Encoded({name: encoded.tensors[name] for name in names}, encoded.meta)
        back = quantizer.decode(own)
        require(back.shape == weight.shape, f"at {width} bits the matrix comes back in another size")
        sizes.append(own.num_bytes)
        losses.append(float((back - weight).norm()))
    require(sizes == sorted(sizes, reverse=True), f"bytes must fall with the width, got {sizes}")
    require(losses == sorted(losses), f"the error must grow as the width falls, got {losses}")


def check_predicted_bytes_are_written(method: Subject) -> None:
    """``num_bytes`` says exactly what the tensors take."""
    quantizer = method.create()
    for rows, cols in _SHAPES:
        written = quantizer.encode(torch.ones(rows, cols)).num_bytes
        predicted = quantizer.num_bytes(rows, cols)
        require(predicted == written, f"[{rows}, {cols}]: {predicted} bytes predicted, {written} written")


def check_second_round_changes_little(method: Subject) -> None:
    """Encoding what was decoded loses no more than the first time."""
    quantizer = method.create()
    weight = sample(method, 12)
    once = quantizer.decode(quantizer.encode(weight))
    twice = quantizer.decode(quantizer.encode(once))
    first, second = (weight - once).norm(), (once - twice).norm()
    require(second <= first, f"the first round loses {first:.4g}, a second {second:.4g} more")


def check_zeros_stay_zero(method: Subject) -> None:
    """A matrix of zeros comes back as zeros."""
    back = use(method.create(), torch.zeros(4, 70))[1]
    require((back == 0).all(), "zeros do not come back as zeros")


def check_scale_is_irrelevant(method: Subject) -> None:
    """Very small and very large weights lose the same share as others."""
    quantizer = method.create()
    weight = sample(method, 13)
    usual = _lost(quantizer, weight)
    for factor in (2.0**-40, 2.0**40):
        lost = _lost(quantizer, weight * factor)
        require(
            abs(lost - usual) <= 0.02 * usual, f"weights times {factor:.0e} lose {lost:.4g}, not {usual:.4g}"
        )


def check_survives_storage(method: Subject) -> None:
    """Tensors written as safetensors and meta as JSON decode to the same bits."""
    quantizer = method.create()
    encoded = quantizer.encode(sample(method, 14))
    require({"rows", "cols"} <= set(encoded.meta), "meta must have rows and cols")
    read = Encoded(load(save(encoded.tensors)), json.loads(json.dumps(encoded.meta)))
    for dtype in (torch.float32, torch.bfloat16):
        require(same(quantizer.decode(encoded, dtype), quantizer.decode(read, dtype)), "storage changes it")


def check_decode_repeats(method: Subject) -> None:
    """Decoding does not change what is stored, and gives new memory each time."""
    quantizer = method.create()
    encoded = quantizer.encode(sample(method, 15))
    kept = {name: tensor.clone() for name, tensor in encoded.tensors.items()}
    first = quantizer.decode(encoded)
    expected = first.clone()
    first.fill_(7)
    require(same(encoded.tensors, kept), "decoding changes what is stored")
    require(same(quantizer.decode(encoded), expected), "two decodings share memory or differ")


def check_bad_numbers_are_refused(method: Subject) -> None:
    """NaN or infinity in the matrix raises `UserError`."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        weight = sample(method, 16)
        weight[3, 5] = bad
        try:
            method.create().encode(weight)
        except UserError:
            continue
        require(False, f"a matrix with {bad} is encoded without an error")


def check_moments_change_no_size_and_do_no_harm(method: Subject) -> None:
    """Second moments of the inputs may be given: outputs lose no more than without, of the same bytes."""
    quantizer = method.create()
    weight = sample(method, 17)
    few, cols = 20, weight.shape[1]
    generator = torch.Generator().manual_seed(18)
    inputs = torch.randn(300, few, generator=generator) @ torch.randn(few, cols, generator=generator)
    one_dwarfs = inputs.clone()
    one_dwarfs[0] *= 1000
    given_moments = (inputs.T @ inputs, one_dwarfs.T @ one_dwarfs, torch.zeros(cols, cols))
    for moments in (torch.eye(cols), *given_moments):
        given, blind = quantizer.encode(weight, moments), quantizer.encode(weight)
        require(given.num_bytes == quantizer.num_bytes(*weight.shape), "moments change the size")
        lost = [_lost_in_outputs(quantizer.decode(one) - weight, moments) for one in (given, blind)]
        require(lost[0] <= 1.02 * lost[1], f"with moments outputs lose {lost[0]:.4g}, without {lost[1]:.4g}")


def _lost_in_outputs(off: Tensor, moments: Tensor) -> float:
    return float(((off @ moments) * off).sum())


def _lost(quantizer: Quantizer, weight: Tensor) -> float:
    """Norm of the error over the norm of the matrix."""
    back = quantizer.decode(quantizer.encode(weight))
    return float((back - weight).norm() / weight.norm())


def _with_bits(method: Subject, bits: int) -> Quantizer | None:
    try:
        made: Quantizer = method.create(bits=bits)
    except UserError:
        return None
    return made

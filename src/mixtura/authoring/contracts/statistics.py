"""What every statistic promises."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from mixtura.authoring.contracts._compare import same
from mixtura.authoring.contracts._core import Subject, require
from mixtura.methods.statistics import LayerTokens, Statistic

_SIZES = (12, 16)
_NUM_EXPERTS, _TOP_K = 6, 3


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """An expert's inputs, outputs and routing weights."""
    del method
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = (torch.randn(_SIZES, generator=generator) for _ in range(2))
    return inputs, outputs, torch.rand(_SIZES[0], generator=generator)


def use(statistic: Statistic, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The number of each assignment."""
    return statistic.measure(*given)


def check_one_number_per_assignment(method: Subject) -> None:
    """One finite number for each assignment, and none for none."""
    statistic = method.create()
    numbers = use(statistic, sample(method, 10))
    require(numbers.shape == _SIZES[:1], "there must be one number per assignment")
    require(torch.isfinite(numbers).all(), "numbers must be finite")
    none = use(statistic, tuple(part[:0] for part in sample(method, 10)))  # type: ignore[arg-type]
    require(none.shape == (0,), "no assignments must give no numbers")


def check_assignments_are_independent(method: Subject) -> None:
    """An assignment's number does not depend on the others, so that any batch gives the same mean."""
    statistic = method.create()
    inputs, outputs, weights = sample(method, 11)
    whole = use(statistic, (inputs, outputs, weights))
    part = use(statistic, (inputs[3:7], outputs[3:7], weights[3:7]))
    require(torch.allclose(whole[3:7], part), "a part of the batch gives other numbers")


def check_low_precision(method: Subject) -> None:
    """Large half-precision rows give finite numbers near those of float32."""
    statistic = method.create()
    exact = tuple(1000 * part for part in sample(method, 12))
    expected = use(statistic, exact)  # type: ignore[arg-type]
    for dtype in (torch.bfloat16, torch.float16):
        found = use(statistic, tuple(part.to(dtype) for part in exact))  # type: ignore[arg-type]
        require(torch.isfinite(found).all(), f"numbers overflow in {dtype}")
        require(torch.allclose(found.float(), expected.float(), rtol=0.05), f"numbers are off in {dtype}")


def check_fields_are_known(method: Subject) -> None:
    """Every tag ``reads:FIELD`` names a field of `LayerTokens`."""
    known = {field.name for field in fields(LayerTokens)}
    for tag in method.header.tags:
        prefix, _, name = tag.partition(":")
        require(
            prefix == "reads" and name in known, f"the tag {tag!r} is not known; fields are {sorted(known)}"
        )


def check_one_factor_per_choice(method: Subject) -> None:
    """One finite factor for each choice of each token, and none for no tokens."""
    if not method.header.tags:
        return
    statistic: Statistic = method.create()
    tokens = sample_tokens(method, 13)
    given = sample_tokens(method, 13)
    factor = statistic.factor(given)
    require(factor.shape == tokens.chosen.shape, "there must be one factor per token and choice")
    require(torch.isfinite(factor[tokens.chosen < _NUM_EXPERTS]).all(), "factors must be finite")
    require(same(given, tokens), "the method changed what it was given in place")
    require(statistic.factor(_rows(tokens, slice(0, 0))).shape == (0, _TOP_K), "no tokens, no factors")


def check_factors_are_independent(method: Subject) -> None:
    """A token's factors do not depend on the other tokens, nor on choices it did not make."""
    if not method.header.tags:
        return
    statistic: Statistic = method.create()
    tokens = sample_tokens(method, 14)
    present = tokens.chosen < _NUM_EXPERTS
    whole, part = statistic.factor(tokens), statistic.factor(_rows(tokens, slice(3, 7)))
    require(torch.allclose(whole[3:7][present[3:7]], part[present[3:7]]), "a part of the batch gives others")
    bare = replace(tokens, chosen=tokens.chosen[:, :-1], weights=tokens.weights[:, :-1])
    fewer = replace(tokens, chosen=tokens.chosen.clone(), weights=tokens.weights.clone())
    fewer.chosen[:, -1], fewer.weights[:, -1] = _NUM_EXPERTS, 0.0
    here = present[:, :-1]
    found, wanted = statistic.factor(fewer)[:, :-1][here], statistic.factor(bare)[here]
    require(torch.allclose(found, wanted), "an absent choice changes the factors of the others")


def sample_tokens(method: Subject, seed: int) -> LayerTokens:
    """A batch with the fields alone that the method's tags name; the last token is padding."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, width = _SIZES
    logits = torch.randn(num_tokens, _NUM_EXPERTS, generator=generator)
    weights, chosen = logits.softmax(-1).topk(_TOP_K)
    weights[-1], chosen[-1] = 0.0, _NUM_EXPERTS
    residual, routed = (torch.randn(num_tokens, width, generator=generator) for _ in range(2))
    wanted = method.tagged("reads")
    return LayerTokens(
        chosen=chosen,
        weights=weights,
        residual=residual if "residual" in wanted else None,
        routed=routed if "routed" in wanted else None,
        logits=logits if "logits" in wanted else None,
    )


def _rows(tokens: LayerTokens, rows: slice) -> LayerTokens:
    held: dict[str, Any] = {
        name: value[rows]
        for field in fields(tokens)
        if (value := getattr(tokens, name := field.name)) is not None
    }
    return LayerTokens(**held)

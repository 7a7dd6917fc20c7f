"""What every mixer promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixtura.authoring.contracts import _inputs
from mixtura.authoring.contracts._apart import require_compiles
from mixtura.authoring.contracts._compare import same
from mixtura.authoring.contracts._core import Subject, require, slow
from mixtura.authoring.contracts._inputs import NUM_TOKENS, SHAPE, chosen, converted, declared, token_fields
from mixtura.errors import UserError
from mixtura.methods.mixers import Mixer
from mixtura.modeling.layer import require_decodable
from mixtura.types import LayerShape, RouterInput, Routing

_SAME = 1e-5
Mixed = tuple[Tensor, Routing]


def arguments() -> tuple[LayerShape]:
    """The layer's shape."""
    return (SHAPE,)


def sample(method: Subject, seed: int, num_tokens: int = NUM_TOKENS) -> RouterInput:
    """Tokens of two sequences, the last quarter padding, with the fields the mixer's tags ask for."""
    return declared(method, token_fields(seed, num_tokens))


def use(mixer: Mixer, inputs: RouterInput) -> Mixed:
    """The output of the tokens and the shares, with made-up experts.

    Randomness begins where it stood in the input, each time the input is used.
    """
    if inputs.generator is not None:
        inputs = replace(inputs, generator=inputs.generator.clone_state())
    mixed: Mixed = mixer(inputs, _inputs.experts(0, inputs.x.dtype))
    return mixed


def check_tags_are_known(method: Subject) -> None:
    """Every tag is one that mixers have, and what it reads is a field of `RouterInput`."""
    _inputs.check_tags(method, RouterInput)


def check_output_is_whole(method: Subject) -> None:
    """One finite output a token, zero for padding; shares and losses are finite."""
    inputs = sample(method, 10)
    output, routing = use(method.create(), inputs)
    require(output.shape == inputs.x.shape, "output: [T, D]")
    require((output[~inputs.valid] == 0).all(), "padding has an output")
    require(inputs.valid[routing.token_ids].all(), "padding has a share of an expert")
    for value in (output, routing.weights, routing.scores, *routing.losses.values()):
        require(torch.isfinite(value).all(), "all numbers must be finite")
    require(routing.scores.shape == (NUM_TOKENS, SHAPE.num_experts), "scores: [T, E]")


def check_padding_changes_nothing(method: Subject) -> None:
    """What padding holds changes nothing for other tokens."""
    given = token_fields(11)
    mixer = method.create()
    other = {"x": torch.where(given["valid"][:, None], given["x"], -3 * given["x"])}
    before, after = (use(mixer, declared(method, fields))[0] for fields in (given, given | other))
    require(
        torch.allclose(before, after, atol=_SAME), "other values in the padding change other tokens' output"
    )


def check_few_tokens(method: Subject) -> None:
    """No token, one token and nothing but padding are mixed."""
    mixer = method.create()
    for num_tokens in (0, 1):
        output, _ = use(mixer, sample(method, 12, num_tokens))
        require(output.shape == (num_tokens, SHAPE.d_model), f"{num_tokens} tokens: output must be [T, D]")
        require(torch.isfinite(output).all(), "the output must be finite")
    padding = token_fields(12, 4) | {"valid": torch.zeros(4, dtype=torch.bool)}
    output, _ = use(mixer, declared(method, padding))
    require((output == 0).all(), "padding has an output")


def check_reads_only_declared_fields(method: Subject) -> None:
    """Fields without a ``reads:`` tag change nothing."""
    mixer = method.create()
    full = RouterInput(**token_fields(13))
    left, right = (use(mixer, inputs) for inputs in (sample(method, 13), full))
    require(same(left, right), "the output depends on a field that no reads: tag declares")


def check_one_expert_is_that_expert(method: Subject) -> None:
    """If all experts are the same, what a lone token gets is that expert of it, up to a share of 1."""
    given = token_fields(31, 1)
    alike = _inputs.experts(0)
    alike = alike.merged(torch.eye(SHAPE.num_experts)[:1].expand(SHAPE.num_experts, -1))
    output, routing = method.create()(declared(method, given), alike)
    once = alike.run(given["x"], torch.tensor([0]), torch.tensor([0]))
    share = routing.scores.sum(-1, keepdim=True).detach()
    require(
        torch.allclose(output, share * once, rtol=1e-3, atol=1e-4), "a lone token is not its expert's output"
    )


def check_causal(method: Subject) -> None:
    """A later token never changes an earlier one's output; a method that looks ahead cannot decode."""
    if method.has("looks_ahead") and not method.has("causal_inference"):
        try:
            require_decodable(method.create(), RouterInput.of(torch.zeros(1, SHAPE.d_model), decoding=True))
        except UserError:
            return
        require(False, "decoding with a method that looks ahead must raise UserError")
    cut = 7
    for training in (False,) if method.has("looks_ahead") else (True, False):
        given = token_fields(25, num_sequences=1) | {"training": training}
        later = _inputs.with_later_tokens_changed(given, cut, 26)
        mixer = method.create()
        before, after = (use(mixer, declared(method, fields))[0][:cut] for fields in (given, later))
        require(
            torch.allclose(before, after, atol=_SAME),
            "changing a later token changes an earlier one's output",
        )


def check_batch_invariant(method: Subject) -> None:
    """What else is in the batch does not change a sequence's output."""
    if method.has("batch_dependent"):
        return
    given = token_fields(27) | {"generator": None}
    first = (given["sequence_ids"] == 0).nonzero().squeeze(-1)
    mixer = method.create()
    whole, _ = use(mixer, declared(method, given))
    alone, _ = use(mixer, declared(method, chosen(given, first)))
    require(torch.allclose(whole[first], alone, atol=_SAME), "another sequence changes this one's output")


def check_gradient_reaches_every_parameter(method: Subject) -> None:
    """The output passes a finite, non-zero gradient to every trained parameter and to the experts."""
    mixer = method.create()
    experts = _inputs.experts(0)
    trained = {name: value for name, value in mixer.named_parameters() if value.requires_grad}
    trained |= {"the experts": experts.gate_up.requires_grad_()}
    output, routing = mixer(sample(method, 17), experts)
    total = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
    total = total + sum(routing.losses.values())
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, found, strict=True):
        require(gradient is not None and gradient.abs().sum() > 0, f"no gradient reaches {name}")
        require(gradient is not None and torch.isfinite(gradient).all(), f"{name}'s gradient is not finite")


def check_gradient_matches_differences(method: Subject) -> None:
    """In float64 the gradient of the output by the input is that of finite differences."""
    mixer = method.create().double()
    given: dict[str, Any] = converted(token_fields(18, 5), torch.float64)

    def output(x: Tensor) -> Tensor:
        return use(mixer, declared(method, given | {"x": x}))[0]

    x = given["x"].requires_grad_()
    require(torch.autograd.gradcheck(output, (x,), raise_exception=False), "the gradient by x is wrong")


def check_low_precision(method: Subject) -> None:
    """In bfloat16 the mixer runs, its output is finite and of that dtype."""
    mixer = method.create().to(torch.bfloat16)
    output, _ = use(mixer, declared(method, converted(token_fields(19), torch.bfloat16)))
    require(torch.isfinite(output).all(), "the output is not finite in bfloat16")
    require(output.dtype == torch.bfloat16, f"the output of bfloat16 tokens is {output.dtype}")


def check_state_dict_round_trip(method: Subject) -> None:
    """A new mixer that loads this one's state mixes the same."""
    mixer = method.create()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.mul_(1.5).add_(0.01 * torch.arange(parameter.numel()).view_as(parameter))
    again = method.create()
    again.load_state_dict(mixer.state_dict())
    inputs = sample(method, 20)
    require(
        same(use(mixer, inputs), use(again, inputs)), "a mixer that loaded another's state mixes differently"
    )


def check_sizes_and_padded_rows(method: Subject) -> None:
    """More sequences and other seeds, whole rows of padding among them: all as if mixed alone."""
    mixer = method.create()
    for seed, num_sequences in ((40, 1), (41, 4), (42, 8)):
        given = token_fields(seed, 64, num_sequences) | {"generator": None}
        absent = (given["sequence_ids"] == num_sequences - 1) & (num_sequences > 1)
        given["valid"] = given["valid"] & ~absent
        output, routing = use(mixer, declared(method, given))
        require((output[~given["valid"]] == 0).all(), "padding has an output")
        require(torch.isfinite(routing.scores).all(), f"shares of {num_sequences} sequences are not finite")
        if not method.has("batch_dependent"):
            rows = (given["sequence_ids"] == 0).nonzero().squeeze(-1)
            alone, _ = use(mixer, declared(method, chosen(given, rows)))
            require(torch.allclose(output[rows], alone, atol=_SAME), "a sequence is not mixed as if alone")


def check_extreme_tokens(method: Subject) -> None:
    """Of tokens of zeros, and very large ones, output and gradients are finite."""
    mixer = method.create()
    for scale in (0.0, 1e-3, 1e4):
        given = token_fields(43)
        given["x"] = (scale * given["x"]).requires_grad_()
        output, routing = use(mixer, declared(method, given))
        total = output.sum() + routing.scores.square().sum() + sum(routing.losses.values())
        leaves = [given["x"], *(one for one in mixer.parameters() if one.requires_grad)]
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        finite = all(torch.isfinite(slope).all() for slope in (output, *found) if slope is not None)
        require(finite, f"output or a gradient of tokens times {scale:g} is not finite")


def check_autocast_keeps_shares(method: Subject) -> None:
    """Under autocast the shares of experts are as exact as without."""
    mixer, inputs = method.create(), sample(method, 44)
    _, plain = use(mixer, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        _, rounded = use(mixer, inputs)
    require(
        torch.allclose(rounded.scores.float(), plain.scores, rtol=1e-5, atol=1e-6),
        "autocast changes the shares of experts",
    )


@slow
def check_compiles(method: Subject) -> None:
    """Tag ``compiles``: under ``torch.compile`` the output is the same."""
    if method.has("compiles"):
        require_compiles(method)


def close(left: Mixed, right: Mixed) -> bool:
    """Whether two outputs are the same but for the last bits."""
    return torch.allclose(left[0], right[0], atol=_SAME)

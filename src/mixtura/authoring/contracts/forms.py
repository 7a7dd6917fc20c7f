"""What every form of a layer promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from mixtura.authoring.contracts._compare import same
from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._inputs import NUM_TOKENS, SHAPE, check_tags, converted, token_fields
from mixtura.errors import UserError
from mixtura.methods import create
from mixtura.methods.forms import Form
from mixtura.methods.settings import settings
from mixtura.modeling.forming import FormedLayer, run_layer
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput, Routing

_SAME = 1e-5
Formed = tuple[Tensor, tuple[Routing, ...]]


def arguments() -> tuple[LayerShape]:
    """The layer's shape."""
    return (SHAPE,)


def sample(method: Subject, seed: int, num_tokens: int = NUM_TOKENS) -> RouterInput:
    """Tokens of two sequences, the last quarter padding."""
    del method
    given = token_fields(seed, num_tokens)
    return RouterInput(x=given["x"], valid=given["valid"], training=True)


def use(form: Form, inputs: RouterInput) -> Formed:
    """What the layer adds to the tokens, and the routing of its passes, with made-up routers and experts."""
    residual = 2.0 * inputs.x.flip(-1)
    layer = made(form).to(inputs.x.dtype)
    nothing: dict[str, Any] = {"ties": None}
    return run_layer(layer, inputs, residual, [nothing] * form.num_passes)


def made(form: Form) -> FormedLayer:
    """The form with top-k routers and plain experts, of its own for each pass as far as it says so."""
    passes: list[MoELayer] = []
    for turn in range(form.num_passes):
        own = passes[0].experts if passes and form.share == "experts" else Experts(SHAPE, seed=turn)
        assert isinstance(own, Experts)
        passes.append(MoELayer(create("routers", "top_k", SHAPE, top_k=2, seed=turn), own))
    return FormedLayer(form, passes)


def check_tags_are_known(method: Subject) -> None:
    """Every tag is one that forms have."""
    check_tags(method, RouterInput)


def check_output_is_whole(method: Subject) -> None:
    """One finite output a token, zero for padding, and a routing for each pass."""
    inputs, form = sample(method, 10), method.create()
    output, routings = use(form, inputs)
    require(output.shape == inputs.x.shape, "output: [T, D]")
    require(torch.isfinite(output).all(), "the output must be finite")
    require((output[~inputs.valid] == 0).all(), "padding has an output")
    require(len(routings) == form.num_passes, "each pass must be called once")


def check_number_of_passes(method: Subject) -> None:
    """`num_passes` is a whole number, at least 1, and a layer with fewer or more passes is refused."""
    form = method.create()
    require(isinstance(form.num_passes, int) and form.num_passes >= 1, "num_passes must be 1 or more")
    one = MoELayer(create("routers", "top_k", SHAPE), Experts(SHAPE))
    try:
        FormedLayer(form, [one] * (form.num_passes + 1))
    except UserError:
        return
    require(False, "a pass too many must be refused")


def check_passes_decide(method: Subject) -> None:
    """What passes return reaches the output: other experts give another one."""
    inputs, form = sample(method, 11), method.create()
    first, _ = use(form, inputs)
    nothing = [_Nothing()] * form.num_passes
    second = form(inputs.x, 2.0 * inputs.x.flip(-1), nothing)
    require(not torch.allclose(first[inputs.valid], second[inputs.valid]), "experts change nothing")


@final
class _Nothing:
    """A pass whose experts add nothing."""

    def __call__(self, x: Tensor, route: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


def check_few_tokens(method: Subject) -> None:
    """No token, one token and nothing but padding are computed."""
    form = method.create()
    for num_tokens in (0, 1):
        output, _ = use(form, sample(method, 12, num_tokens))
        require(output.shape == (num_tokens, SHAPE.d_model), f"{num_tokens} tokens: output must be [T, D]")
    inputs = sample(method, 12)
    output, _ = use(form, replace(inputs, valid=torch.zeros_like(inputs.valid)))
    require((output == 0).all(), "padding has an output")


def check_tokens_are_independent(method: Subject) -> None:
    """Besides its passes a token's output depends on that token alone: in any order, with any others."""
    inputs, form = sample(method, 13), method.create()
    output, _ = use(form, inputs)
    order = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(13))[:15]
    part = RouterInput(x=inputs.x[order], valid=inputs.valid[order], training=True)
    moved, _ = use(form, part)
    require(torch.allclose(output[order], moved, atol=_SAME), "other tokens change a token's output")


def check_gradient_reaches_every_parameter(method: Subject) -> None:
    """The output passes a finite, non-zero gradient to the form's parameters and to every pass's experts."""
    inputs, form = sample(method, 17), method.create()
    layer = made(form)
    run = run_layer(layer, inputs, inputs.x.flip(-1), [{"ties": None}] * form.num_passes)
    total = (run[0] * torch.linspace(-1, 1, run[0].numel()).view_as(run[0])).sum()
    trained = dict(layer.named_parameters())
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, found, strict=True):
        require(gradient is not None and gradient.abs().sum() > 0, f"no gradient reaches {name}")
        require(gradient is not None and torch.isfinite(gradient).all(), f"{name}'s gradient is not finite")


def check_gradient_matches_differences(method: Subject) -> None:
    """In float64 the gradient of the output by the input is that of finite differences."""
    form = method.create().double()
    given = converted(token_fields(18, 4), torch.float64)

    def output(x: Tensor) -> Tensor:
        return use(form, RouterInput.of(x))[0]

    x = given["x"].requires_grad_()
    kept = torch.autograd.gradcheck(output, (x,), raise_exception=False, fast_mode=True)
    require(kept, "the gradient by x is wrong")


def check_low_precision(method: Subject) -> None:
    """In bfloat16 the layer runs and its output is finite and of that dtype."""
    inputs = sample(method, 19)
    inputs = replace(inputs, x=inputs.x.to(torch.bfloat16))
    output, _ = use(method.create().to(torch.bfloat16), inputs)
    require(torch.isfinite(output).all(), "the output is not finite in bfloat16")
    require(output.dtype == torch.bfloat16, f"the output of bfloat16 tokens is {output.dtype}")


def check_state_dict_round_trip(method: Subject) -> None:
    """A new form that loads this one's state computes the same, also when made without memory."""
    form = method.create(**({"seed": 1} if "seed" in settings(method.cls) else {}))
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.mul_(1.5).add_(0.01)
    with torch.device("meta"):
        empty = method.create()
    again = method.create()
    again.load_state_dict(form.state_dict())
    empty.load_state_dict(form.state_dict(), assign=True)
    for other in (again, empty):
        require(same(use(form, sample(method, 20))[0], use(other, sample(method, 20))[0]), "it differs")


def check_rescale(method: Subject) -> None:
    """`rescale` gives matrices the model's deviation."""
    form = method.create()
    before = {name: value.detach().clone() for name, value in form.named_parameters() if value.dim() > 1}
    form.rescale(0.02)
    for name, value in before.items():
        after = form.get_parameter(name).detach()
        require(0.005 < float(after.std()) < 0.08, f"{name} has a deviation of {float(after.std()):.3f}")
        require(not torch.equal(after, value), f"{name} is not rescaled")

"""What every attention promises."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mixtura.authoring.contracts._attended import PLACES, SHAPE, Text, gather, piecewise, text
from mixtura.authoring.contracts._compare import same
from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._inputs import check_tags
from mixtura.methods.attentions import Attended, Attention
from mixtura.methods.settings import settings
from mixtura.types import AttentionInput, AttentionShape

_CLOSE = 1e-5


def arguments() -> tuple[AttentionShape]:
    """The attention's sizes."""
    return (SHAPE,)


def sample(method: Subject, seed: int) -> Text:
    """Two rows, the first of them padded on the left."""
    del method
    given = text(seed)
    mask = torch.ones(given.x.shape[:2], dtype=torch.bool)
    mask[0, :3] = False
    return replace(given, mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), training=True)


def use(attention: Attention, given: Text) -> Attended:
    """What the attention makes of a text."""
    return gather(attention, given)


def _made(method: Subject) -> Attention:
    made: Attention = method.create()
    with torch.no_grad():
        # Biases and norms begin as nothing, and so would hide what is done with them.
        generator = torch.Generator().manual_seed(5)
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def check_tags_are_known(method: Subject) -> None:
    """Every tag is one that attentions have, and a rule for inference is for those that need one."""
    check_tags(method, AttentionInput)
    if method.has("causal_inference"):
        require(method.has("looks_ahead"), "causal_inference is for methods that look ahead in training")


def check_output_is_whole(method: Subject) -> None:
    """One finite output a token, and with the tag `routes` the routing of tokens to heads."""
    given = sample(method, 10)
    for training in (True, False):
        output, _, routing = use(_made(method), replace(given, training=training))
        require(output.shape == given.x.shape, "output: [B, Q, D]")
        require(torch.isfinite(output).all(), "the output must be finite")
        require((routing is not None) == method.has("routes"), "a routing goes with the tag routes")
        if routing is not None:
            assert given.mask is not None
            require(routing.num_tokens == given.x.shape[0] * given.x.shape[1], "a row of scores a token")
            require(given.mask.flatten()[routing.token_ids].all(), "padding is in a head")
            require(torch.isfinite(routing.weights).all(), "weights must be finite")


def check_gives_weights(method: Subject) -> None:
    """With the tag `gives_weights` who attends to whom is returned, shares that sum to 1; else nothing is."""
    given = text(10)
    found = gather(_made(method), given, implementation="eager")[1]
    require((found is not None) == method.has("gives_weights"), "weights go with the tag gives_weights")
    if found is not None:
        require(found.shape[::2] == given.x.shape[:2], "weights: [B, H, Q, C]")
        require(torch.allclose(found.sum(-1), torch.ones(())), "a token's weights must sum to 1")


def check_padding_changes_nothing(method: Subject) -> None:
    """What tokens gather is the same whatever stands in the padding, and without it."""
    given, made = sample(method, 11), _made(method)
    assert given.mask is not None
    for training in (True, False):
        first = use(made, replace(given, training=training))[0]
        other = torch.where(given.mask[..., None], given.x, 7.0)
        second = use(made, replace(given, x=other, training=training))[0]
        require(torch.allclose(first[given.mask], second[given.mask], atol=_CLOSE), "padding is gathered")
        alone = use(made, Text(x=given.x[:1, 3:], training=training))[0]
        require(torch.allclose(first[:1, 3:], alone, atol=_CLOSE), "padding moves tokens")


def check_few_tokens(method: Subject) -> None:
    """One token and nothing but padding are computed."""
    made = _made(method)
    output = use(made, text(12, rows=1, places=1))[0]
    require(output.shape == (1, 1, SHAPE.d_model), "one token: output [B, Q, D]")
    require(torch.isfinite(output).all(), "the output of one token is not finite")
    given = text(12)
    nothing = torch.zeros(given.x.shape[:2], dtype=torch.bool)
    output = use(made, replace(given, mask=nothing, training=True))[0]
    require(torch.isfinite(output).all(), "the output of padding is not finite")


def check_causal(method: Subject) -> None:
    """Later tokens change nothing, by what they are or by being there; with `looks_ahead` at inference."""
    given, made = text(13), _made(method)
    cut = PLACES // 2
    for training in (False,) if method.has("looks_ahead") else (True, False):
        whole = use(made, replace(given, training=training))[0][:, :cut]
        other = torch.cat([given.x[:, :cut], text(14).x[:, cut:]], dim=1)
        changed = use(made, replace(given, x=other, training=training))[0][:, :cut]
        require(torch.allclose(whole, changed, atol=_CLOSE), "later tokens change what earlier ones gather")
        short = use(made, replace(given, x=given.x[:, :cut], training=training))[0]
        require(torch.allclose(whole, short, atol=_CLOSE), "that there are later tokens changes something")


def check_tokens_see_each_other(method: Subject) -> None:
    """Tokens gather from others: an earlier token changes what a later one gathers."""
    given, made = text(15), _made(method)
    other = given.x.clone()
    other[:, 0] += 1.0
    first, second = use(made, given)[0], use(made, replace(given, x=other))[0]
    require(not torch.allclose(first[:, 1:], second[:, 1:], atol=_CLOSE), "no token gathers from another")


def check_rows_are_independent(method: Subject) -> None:
    """Rows of a batch, and documents in one row, change nothing in each other."""
    given, made = text(16), _made(method)
    cut = 5
    for training in (True, False):
        both = use(made, replace(given, training=training))[0]
        alone = use(made, Text(x=given.x[:1], training=training))[0]
        require(torch.allclose(both[:1], alone, atol=_CLOSE), "another row changes this one")
        places = torch.cat([torch.arange(cut), torch.arange(PLACES - cut)])[None].expand(2, -1)
        packed = use(made, replace(given, position_ids=places, training=training))[0]
        for part in (slice(None, cut), slice(cut, None)):
            single = use(made, Text(x=given.x[:, part], training=training))[0]
            require(torch.allclose(packed[:, part], single, atol=_CLOSE), "documents see each other")


def check_decoding_equals_prefill(method: Subject) -> None:
    """A text that comes in pieces, with padding or without, gathers what it gathers at once."""
    if method.has("looks_ahead") and not method.has("causal_inference"):
        return
    made = _made(method)
    for given in (text(17), replace(sample(method, 17), training=False)):
        whole = use(made, given)[0]
        shown = torch.ones(whole.shape[:2], dtype=torch.bool) if given.mask is None else given.mask
        for cuts in ((4, 5, 6, 11), tuple(range(1, PLACES))):
            pieces = piecewise(made, given, cuts)
            require(
                torch.allclose(pieces[shown], whole[shown], atol=_CLOSE), f"pieces ending at {cuts} differ"
            )


def check_gradient_reaches_every_parameter(method: Subject) -> None:
    """The output passes a finite, non-zero gradient to every parameter."""
    made = _made(method)
    total = _summed(use(made, replace(text(18), training=True))[0])
    trained = dict(made.named_parameters())
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, found, strict=True):
        require(gradient is not None and gradient.abs().sum() > 0, f"no gradient reaches {name}")
        require(gradient is not None and torch.isfinite(gradient).all(), f"{name}'s gradient is not finite")


def _summed(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.numel()).view_as(output).to(output)).sum()


def check_gradient_matches_differences(method: Subject) -> None:
    """In float64 the gradient of the output by the tokens is that of finite differences."""
    made, given = _made(method).double(), text(19, rows=1, places=5, dtype=torch.float64)

    def output(x: Tensor) -> Tensor:
        return use(made, replace(given, x=x, training=True))[0]

    x = given.x.requires_grad_()
    kept = torch.autograd.gradcheck(output, (x,), raise_exception=False, fast_mode=True)
    require(kept, "the gradient by the tokens is wrong")


def check_low_precision(method: Subject) -> None:
    """In bfloat16 the output is finite, of that dtype, and about that of float32."""
    made = _made(method)
    given = sample(method, 20)
    wide = use(made, given)[0]
    narrow = use(made.to(torch.bfloat16), replace(given, x=given.x.to(torch.bfloat16)))[0]
    require(narrow.dtype == torch.bfloat16, f"the output of bfloat16 tokens is {narrow.dtype}")
    require(torch.isfinite(narrow).all(), "the output is not finite in bfloat16")
    assert given.mask is not None
    apart = (narrow.float() - wide).detach()[given.mask].square().mean().sqrt()
    # A choice may fall otherwise for a token; most must not.
    require(apart < 0.25 * wide[given.mask].square().mean().sqrt(), f"bfloat16 is {float(apart):.3f} off")


def check_state_dict_round_trip(method: Subject) -> None:
    """A new attention that loads this one's state computes the same, also when made without memory."""
    made = _made(method)
    again = method.create(**({"seed": 1} if "seed" in settings(method.cls) else {}))
    with torch.device("meta"):
        empty = method.create()
    again.load_state_dict(made.state_dict())
    empty.load_state_dict(made.state_dict(), assign=True)
    wanted = use(made, text(21))[0]
    for other in (again, empty):
        require(same(use(other, text(21))[0], wanted), "it differs")

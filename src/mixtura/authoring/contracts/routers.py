"""What every router promises."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.authoring.contracts import _inputs, _router_extremes
from mixtura.authoring.contracts._apart import require_compiles
from mixtura.authoring.contracts._compare import same
from mixtura.authoring.contracts._core import Subject, require, slow
from mixtura.authoring.contracts._inputs import NUM_TOKENS, SHAPE, chosen, converted, declared, token_fields
from mixtura.authoring.contracts._routed import (
    TIE,
    close,
    continued,
    dense,
    require_equal_rows,
    total_of,
    use,
)
from mixtura.errors import SettingError, UserError
from mixtura.methods.settings import settings
from mixtura.modeling.layer import Experts, MoELayer, require_decodable, swiglu
from mixtura.types import LayerShape, RouterInput

_SEEDS = (25, 125, 225)
# Checks of sizes, numbers and circumstances other than the usual ones.
MORE = (_router_extremes,)


def arguments() -> tuple[LayerShape]:
    """The layer's shape."""
    return (SHAPE,)


def sample(method: Subject, seed: int, num_tokens: int = NUM_TOKENS) -> RouterInput:
    """Tokens of two sequences, the last quarter padding, with the fields the router's tags ask for."""
    return declared(method, token_fields(seed, num_tokens))


def check_tags_are_known(method: Subject) -> None:
    """Every tag is one that routers have, and what it reads is a field of `RouterInput`."""
    _inputs.check_tags(method, RouterInput)
    if method.has("causal_inference"):
        require(method.has("looks_ahead"), "causal_inference is for methods that look ahead in training")


def check_routing_is_whole(method: Subject) -> None:
    """Ids are in range and sorted by expert, no token has an expert twice, all numbers are finite."""
    inputs = sample(method, 10)
    routing = use(method.create(), inputs)
    num_tokens = inputs.x.shape[0]
    for ids, end in ((routing.token_ids, num_tokens), (routing.expert_ids, SHAPE.num_experts)):
        require(((ids >= 0) & (ids < end)).all(), "an assignment names a token or expert that is not there")
    require((routing.expert_ids.diff() >= 0).all(), "assignments must be sorted by expert")
    width = sum(axis.num_experts for axis in method.create().axes)
    require(routing.scores.shape == routing.logits.shape == (num_tokens, width), "scores: [T, E]")
    require(routing.num_experts == SHAPE.num_experts, "the axes must make as many experts as there are")
    require(bool(routing.axes) == method.has("axes"), "routings of axes need the tag axes, and it them")
    require((routing.gates is not None) == method.has("gates"), "gates need the tag gates, and it them")
    pairs = routing.token_ids * SHAPE.num_experts + routing.expert_ids
    require((pairs.sort().values.diff() > 0).all(), "a token is assigned twice to one expert")
    require((routing.modulation is not None) == method.has("modulates"), "modulation and its tag go together")
    for name in ("weights", "scores", "extra", "modulation", "state"):
        value = getattr(routing, name)
        require(value is None or torch.isfinite(value).all(), f"{name} must be finite")
    for name, loss in routing.losses.items():
        require(loss.shape == () and torch.isfinite(loss), f"the loss {name} must be one finite number")
    if routing.extra is not None:
        require(routing.extra.shape == inputs.x.shape, "extra: [T, D]")
        require((routing.extra[~inputs.valid] == 0).all(), "extra must be 0 for padding")
    require(routing.state is None or routing.state.shape[0] == num_tokens, "state: one row a token")
    require(method.has("stateful") or routing.state is None, "a router with state needs the tag stateful")


def check_equals_a_plain_loop(method: Subject) -> None:
    """A layer with this router gives what a loop over its assignments gives."""
    experts = Experts(SHAPE)
    layer = MoELayer(method.create(), experts)
    inputs = sample(method, 21)
    output, routing = layer(inputs)
    expected = torch.zeros_like(inputs.x) if routing.extra is None else routing.extra.clone()
    up, down = experts.gate_up_proj, experts.down_proj
    weights = dense(routing)
    read = inputs.x if routing.modulation is None else inputs.x * routing.modulation
    for token, expert in weights.nonzero().tolist():
        weight = weights[token, expert]
        expected[token] = expected[token] + weight * F.linear(swiglu(up[expert] @ read[token]), down[expert])
    require(
        torch.allclose(output, expected, atol=1e-5), "the layer's output is not the sum of its assignments"
    )


def check_padding_gets_no_expert(method: Subject) -> None:
    """Padding is routed nowhere, and what it holds changes nothing for other tokens."""
    given = token_fields(11)
    router = method.create()
    routing = use(router, declared(method, given))
    require(given["valid"][routing.token_ids].all(), "padding has an expert")
    other = {"x": torch.where(given["valid"][:, None], given["x"], -3 * given["x"])}
    changed = use(router, declared(method, given | other))
    require(close(routing, changed), "other values in the padding change other tokens' routing")
    for name, loss in routing.losses.items():
        require(torch.allclose(loss, changed.losses[name], atol=1e-6), f"padding changes the loss {name}")


def check_few_tokens(method: Subject) -> None:
    """No token, one token and nothing but padding are routed."""
    router = method.create()
    for num_tokens in (0, 1):
        routing = use(router, sample(method, 12, num_tokens))
        require(routing.num_tokens == num_tokens, f"{num_tokens} tokens: scores must be [T, E]")
    padding = token_fields(12, 4) | {"valid": torch.zeros(4, dtype=torch.bool)}
    for training in (True, False):
        routing = use(router, declared(method, padding | {"training": training}))
        require(routing.token_ids.numel() == 0, "padding has an expert")
        require(all(torch.isfinite(v) for v in routing.losses.values()), "losses of padding must be finite")


def check_reads_only_declared_fields(method: Subject) -> None:
    """Fields without a ``reads:`` tag change nothing."""
    router = method.create()
    full = RouterInput(**token_fields(13))
    require(
        same(use(router, sample(method, 13)), use(router, full)),
        "the routing depends on a field of RouterInput that no reads: tag declares",
    )


def check_missing_fields_are_named(method: Subject) -> None:
    """Without a field it reads, the router routes, or says in a `UserError` which one it needs."""
    router = method.create()
    for name in {*method.tagged("reads"), *method.tagged("may_read")} & set(_inputs.NEEDED):
        given = token_fields(22)
        given[name] = {} if name == "labels" else None
        try:
            use(router, declared(method, given))
        except UserError as error:
            require(name in str(error), f"the error for missing {name} must name it, got: {error}")


def check_weights_sum_to_one(method: Subject) -> None:
    """Tag ``normalized``: each token's weights sum to 1."""
    if not method.has("normalized"):
        return
    inputs = sample(method, 14)
    routing = use(method.create(), inputs)
    sums = torch.zeros(inputs.x.shape[0]).index_add(0, routing.token_ids, routing.weights.detach())
    require(torch.allclose(sums[inputs.valid], torch.ones(1), atol=1e-5), "weights must sum to 1 per token")


def check_tokens_are_independent(method: Subject) -> None:
    """Tag ``token_independent``: shuffled tokens keep their experts and weights."""
    if not method.has("token_independent"):
        return
    given = token_fields(15)
    order = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(15))
    router = method.create()
    straight = use(router, declared(method, given | {"generator": None}))
    moved = use(router, declared(method, chosen(given, order) | {"generator": None}))
    require(
        torch.allclose(dense(straight)[order], dense(moved), atol=1e-6),
        "shuffling the tokens changes a token's experts or weights",
    )


def check_ties_go_to_the_lowest_index(method: Subject) -> None:
    """Tag ``lowest_index``: of experts with equal scores those of lowest index are chosen."""
    if not method.has("lowest_index"):
        return
    given = token_fields(23, 4) | {"selection_bias": None, "allowed": None, "generator": None}
    given["x"] = torch.zeros_like(given["x"])
    routing = use(method.create(), declared(method, given))
    require(
        (routing.scores == routing.scores[:, :1]).all(),
        "a token of zeros must have equal scores for the rule of ties to be seen",
    )
    for token in routing.token_ids.unique().tolist():
        mine = routing.expert_ids[routing.token_ids == token].sort().values
        require(same(mine, torch.arange(mine.numel())), f"of equal scores experts {mine.tolist()} are chosen")


def check_every_expert_may_be_chosen(method: Subject) -> None:
    """A router with ``top_k`` can choose all experts at once."""
    if "top_k" not in settings(method.cls):
        return
    given = token_fields(16) | {"allowed": None}
    routing = use(method.create(top_k=SHAPE.num_experts), declared(method, given))
    expected = int(given["valid"].sum()) * SHAPE.num_experts
    require(routing.token_ids.numel() == expected, "top_k = E must assign every token to every expert")


def check_disallowed_experts_are_not_chosen(method: Subject) -> None:
    """With ``reads:allowed`` no token goes to an expert it may not go to."""
    if "allowed" not in method.tagged("reads"):
        return
    given = token_fields(24)
    given["allowed"] = torch.zeros_like(given["allowed"])
    given["allowed"][:, [2, 5]] = True
    routing = use(method.create(), declared(method, given))
    require(given["allowed"][routing.token_ids, routing.expert_ids].all(), "an expert not allowed is chosen")


def check_causal(method: Subject) -> None:
    """A later token never changes an earlier one's routing; a method that looks ahead cannot decode."""
    if method.has("looks_ahead") and not method.has("causal_inference"):
        try:
            require_decodable(method.create(), RouterInput.of(torch.zeros(1, SHAPE.d_model), decoding=True))
        except UserError:
            return
        require(False, "decoding with a method that looks ahead must raise UserError")
    modes = (False,) if method.has("looks_ahead") else (True, False)
    for training, seed, router in itertools.product(modes, _SEEDS, _with_little_room(method)):
        _require_causal(method, router, token_fields(seed, num_sequences=1) | {"training": training})


def _with_little_room(method: Subject) -> list[Any]:
    """The router by default, and where it has a ``capacity_factor`` with half or all of what is needed."""
    made = [method.create()]
    if "capacity_factor" in settings(method.cls):
        for factor in (0.5, 1.0):
            with contextlib.suppress(SettingError):
                made.append(method.create(capacity_factor=factor))
    return made


def _require_causal(method: Subject, router: Any, given: dict[str, Any]) -> None:
    cut = 7
    earlier = torch.arange(cut)
    given = continued(method, given)
    whole = use(router, declared(method, given))
    later = use(router, declared(method, _inputs.with_later_tokens_changed(given, cut, 26)))
    require_equal_rows(whole, later, earlier, "changing a later token changes an earlier one's")
    short = use(router, declared(method, chosen(given, earlier) | {"generator": None}))
    quiet = use(router, declared(method, given | {"generator": None}))
    require_equal_rows(quiet, short, earlier, "leaving out later tokens changes an earlier one's")


def check_batch_invariant(method: Subject) -> None:
    """What else is in the batch does not change a sequence's routing, but where scores all but tie."""
    if method.has("batch_dependent"):
        return
    router = method.create()
    for training in (True, False):
        given = continued(method, token_fields(27) | {"training": training, "generator": None})
        given["valid"] = torch.ones_like(given["valid"])
        first, second = ((given["sequence_ids"] == number).nonzero().squeeze(-1) for number in (0, 1))
        whole = use(router, declared(method, given))
        alone = use(router, declared(method, chosen(given, first)))
        require_equal_rows(whole, alone, first, "leaving out another sequence changes this one's")
        other = {"x": given["x"].index_fill(0, second, 0.5)}
        changed = use(router, declared(method, given | other))
        require_equal_rows(whole, changed, first, "changing another sequence changes this one's")
        behind = use(router, declared(method, chosen(given, torch.cat([second, first]))))
        rows = torch.arange(second.numel(), NUM_TOKENS)
        require(
            torch.allclose(dense(whole)[first], dense(behind)[rows], atol=TIE),
            "putting another sequence before this one changes its routing",
        )


def check_decoding_equals_prefill(method: Subject) -> None:
    """Token by token, with the history handed on, the routing is that of the whole sequences."""
    if method.has("looks_ahead") and not method.has("causal_inference"):
        return
    router = _with_little_room(method)[-1]
    given = continued(method, token_fields(28) | {"training": False, "generator": None})
    given["valid"] = torch.ones_like(given["valid"])
    whole = use(router, declared(method, given))
    history: Any = {}
    for position in range(NUM_TOKENS // 2):
        rows = (given["positions"] == position).nonzero().squeeze(-1)
        step = chosen(given, rows) | {"decoding": position > 0, "history": history}
        step["attention"] = step["attention"][:, : position + 1]
        routing = use(router, declared(method, step))
        history = routing.history
        require_equal_rows(whole, routing, rows, "decoding token by token changes a token's", short=True)


def check_state_goes_to_the_next_layer(method: Subject) -> None:
    """Tag ``stateful``: the next layer's router takes the state, and its routing depends on it."""
    if not method.has("stateful"):
        return
    given = token_fields(29)
    first = use(method.create(), declared(method, given))
    require(first.state is not None, "a stateful router must return a state")
    later = continued(method, given)
    moved = later | {"state": -2 * later["state"] if later["state"].is_floating_point() else later["state"]}
    routings = [use(method.create(), declared(method, fields)) for fields in (later, moved)]
    require(not same(routings[0].logits, routings[1].logits), "the state changes nothing in the next layer")


def check_gradient_reaches_every_parameter(method: Subject) -> None:
    """Weights, losses, state and extra pass a finite, non-zero gradient to every trained parameter."""
    router = method.create()
    parameters = {name: value for name, value in router.named_parameters() if value.requires_grad}
    if not parameters:
        return
    given = token_fields(17)
    total = total_of(use(router, declared(method, given)))
    if method.has("stateful"):
        total = total + total_of(use(router, declared(method, continued(method, given))))
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, found, strict=True):
        require(gradient is not None and gradient.abs().sum() > 0, f"no gradient reaches {name}")
        require(gradient is not None and torch.isfinite(gradient).all(), f"{name}'s gradient is not finite")


def check_gradient_matches_differences(method: Subject) -> None:
    """In float64 the gradient of the weights by the input is that of finite differences."""
    router = method.create().double()
    given = converted(token_fields(18, 5), torch.float64)
    given["valid"] = torch.ones(5, dtype=torch.bool)

    def weights(x: Tensor) -> tuple[Tensor, ...]:
        routing = use(router, declared(method, given | {"x": x}))
        return (routing.weights,) if routing.extra is None else (routing.weights, routing.extra)

    x = given["x"].requires_grad_()
    require(torch.autograd.gradcheck(weights, (x,), raise_exception=False), "the gradient by x is wrong")


def check_low_precision(method: Subject) -> None:
    """In bfloat16 the router runs and its numbers are finite."""
    router = method.create().to(torch.bfloat16)
    routing = use(router, declared(method, converted(token_fields(19), torch.bfloat16)))
    require(torch.isfinite(routing.weights).all(), "weights are not finite in bfloat16")
    require(routing.weights.dtype in (torch.bfloat16, torch.float32), "weights are wider than float32")


def check_state_dict_round_trip(method: Subject) -> None:
    """A new router that loads this one's state routes the same."""
    router = method.create()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(1.5).add_(0.01 * torch.arange(parameter.numel()).view_as(parameter))
    again = method.create()
    again.load_state_dict(router.state_dict())
    require(
        same(use(router, sample(method, 20)), use(again, sample(method, 20))),
        "a router that loaded the state of another routes differently",
    )


@slow
def check_compiles(method: Subject) -> None:
    """Tag ``compiles``: under ``torch.compile`` the routing is the same."""
    if method.has("compiles"):
        require_compiles(method)

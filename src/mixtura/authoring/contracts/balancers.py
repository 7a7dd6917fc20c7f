"""What every balancer promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.authoring.contracts import _inputs
from mixtura.authoring.contracts._core import Subject, require, slow
from mixtura.authoring.contracts._routings import by_choice, collapsed, even_routing, masked, reordered
from mixtura.authoring.contracts._samples import sample_routing
from mixtura.authoring.contracts._shards import loss_of_shards
from mixtura.methods.balancers import Balancer
from mixtura.types import BalancerInput, Routing

_SHAPE = _inputs.SHAPE
_NUM_EXPERTS = _SHAPE.num_experts
_HOT = 4.0
_ALWAYS = ("routing", "load", "loads", "num_tokens", "state")


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> BalancerInput:
    """A routing that favours expert 0 somewhat, with the fields the balancer's tags ask for."""
    return given_for(method, sample_routing(seed, hot=0.5), seed)


def use(balancer: Balancer, inputs: BalancerInput) -> dict[str, Any]:
    """The loss and the next state, from the state at the start where none is given.

    Randomness begins where it stood in the input, each time the input is used.
    """
    begun = inputs if inputs.state else replace(inputs, state=balancer.start(_SHAPE))
    if begun.generator is not None:
        begun = replace(begun, generator=begun.generator.clone_state())
    return {"loss": balancer.loss(begun), "state": dict(balancer.update(begun))}


def given_for(method: Subject, routing: Routing, seed: int = 0, **more: Any) -> BalancerInput:
    """An input about this routing, with made-up values of what the method's tags ask for besides."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_experts = routing.scores.shape
    optional: dict[str, Any] = {
        "step": 3,
        "generator": generator,
        "sequence_ids": torch.arange(num_tokens) * 2 // max(num_tokens, 1),
        "experts": _inputs.experts(seed, shape=replace(_SHAPE, num_experts=num_experts)),
        "router_weight": torch.randn(num_experts, _SHAPE.d_model, generator=generator),
        "gradients": torch.randn(num_experts, 40, generator=generator),
    }
    asked = {name: value for name, value in optional.items() if name in method.tagged("reads")}
    return BalancerInput(routing=routing, **(asked | more))


def check_tags_are_known(method: Subject) -> None:
    """Every tag is one that balancers have, and what it reads is a field of `BalancerInput`."""
    _inputs.check_tags(method, BalancerInput)


def check_results_are_finite(method: Subject) -> None:
    """The loss is one finite number and the state finite tensors, also without any token."""
    balancer = method.create()
    inputs = sample(method, 10)
    empty = masked(inputs.routing, torch.zeros_like(inputs.routing.valid))
    for routing in (inputs.routing, empty):
        made = use(balancer, replace(inputs, routing=routing))
        require(made["loss"].shape == (), "the loss must be a single number")
        finite = all(torch.isfinite(value).all() for value in (made["loss"], *made["state"].values()))
        require(finite, "results must be finite")
    bias = balancer.start(_SHAPE).get("bias")
    require(bias is None or bias.shape == (_NUM_EXPERTS,), "the bias must have one number per expert")


def check_state_keeps_its_form(method: Subject) -> None:
    """An update returns the same tensors by name, shape and dtype, without gradient, and not the old ones."""
    balancer = method.create()
    inputs = sample(method, 18)
    before = balancer.start(_SHAPE)
    after = balancer.update(replace(inputs, state=before))
    require(before.keys() == after.keys(), "an update must keep the names of the state")
    for name, value in after.items():
        same_form = (value.shape, value.dtype) == (before[name].shape, before[name].dtype)
        require(same_form, f"{name} changes its shape or dtype in an update")
        require(value.is_leaf, f"the update of {name} carries a gradient")


def check_state_is_exact(method: Subject) -> None:
    """Numbers of the state are in float32 at least, in a model that is made in bfloat16 too."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        state = method.create().start(_SHAPE)
    finally:
        torch.set_default_dtype(usual)
    for name, value in state.items():
        wide = not value.is_floating_point() or torch.finfo(value.dtype).bits >= 32
        require(wide, f"{name} is in {value.dtype} where the default dtype is: say dtype=torch.float32")


def check_sizes(method: Subject) -> None:
    """Many experts, several choices a token and other seeds: finite results, gradients and states."""
    balancer = method.create()
    for seed, num_experts, top_k in ((1, 24, 1), (2, 64, 6), (3, 128, 8)):
        routing = sample_routing(seed, num_tokens=48, num_experts=num_experts, top_k=top_k, hot=1.0)
        state = balancer.start(replace(_SHAPE, num_experts=num_experts))
        inputs = given_for(method, routing, seed, state=state)
        _require_finite(balancer, inputs, f"with {num_experts} experts")


def check_extreme_logits(method: Subject) -> None:
    """However sure or unsure a router is, loss, gradient and state are finite; so with any padding."""
    balancer = method.create()
    plain = sample_routing(21)
    for scale in (0.0, 30.0, 200.0, 1e4):
        logits = (scale * plain.logits.detach()).requires_grad_()
        routing = by_choice(replace(plain, logits=logits, scores=logits.softmax(-1)), _two_best(logits))
        _require_finite(balancer, _begun(method, balancer, routing), f"with logits times {scale:g}")
    unknown = torch.where(plain.valid[:, None], plain.logits.detach(), torch.nan).requires_grad_()
    given = _begun(method, balancer, replace(plain, logits=unknown, scores=plain.scores.detach()))
    _require_finite(balancer, given, "with padding that is no number")


def check_autocast_changes_nothing(method: Subject) -> None:
    """Under autocast the loss is as exact as without."""
    balancer = method.create()
    inputs = _begun(method, balancer, sample_routing(22, hot=1.0))
    plain = use(balancer, inputs)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = use(balancer, inputs)["loss"]
    require(torch.allclose(rounded, plain, rtol=1e-6), f"{plain:.7g} is {rounded:.7g} under autocast")


def check_low_precision(method: Subject) -> None:
    """Of scores in bfloat16 a finite loss is made, and a state of the usual form."""
    balancer = method.create()
    plain = sample_routing(23, hot=1.0)
    half = {name: getattr(plain, name).detach().bfloat16() for name in ("scores", "logits", "weights")}
    inputs = _begun(method, balancer, replace(plain, **half))
    made = use(balancer, inputs)
    require(torch.isfinite(made["loss"]), "the loss of bfloat16 scores is not finite")
    for name, value in made["state"].items():
        require(value.dtype == inputs.state[name].dtype, f"bfloat16 scores make {name} {value.dtype}")


def check_by_load(method: Subject) -> None:
    """Tag ``by_load``: where every token has every expert the loss pulls at no score; else it does."""
    if method.cls.loss is Balancer.loss or method.tagged("needs_router"):
        return
    balancer = method.create()
    chosen = sample_routing(24, hot=1.0)
    everyone = torch.arange(_NUM_EXPERTS).expand(chosen.num_tokens, -1)
    pulls = []
    for routing in (chosen, by_choice(chosen, everyone)):
        cost = _cost(method, balancer, routing)
        if not cost.requires_grad:
            return
        (slope,) = torch.autograd.grad(cost, chosen.logits, allow_unused=True, retain_graph=True)
        if slope is None:
            return
        pulls.append(slope.abs().max())
    constant = pulls[1] < 1e-4 * pulls[0]
    require(
        constant == method.has("by_load"),
        "where every token has every expert the loss is constant: it needs the tag by_load"
        if constant
        else "the tag by_load is for losses that are constant where every token has every expert",
    )


def check_even_load_costs_least(method: Subject) -> None:
    """A perfectly even routing costs no more than any other."""
    if _skips(method, "loss"):
        return
    balancer = method.create()
    even = _cost(method, balancer, even_routing())
    for hot in (-2.0, 0.0, 0.5, _HOT):
        other = _cost(method, balancer, sample_routing(19, hot=hot))
        require(even <= other + 1e-6, f"an even load costs {even:.5g}, an uneven one {other:.5g}")


def check_imbalance_costs_more(method: Subject) -> None:
    """A loss is larger when one expert is favoured than when all are used alike."""
    if _skips(method, "loss"):
        return
    balancer = method.create()
    even, skewed = (_cost(method, balancer, sample_routing(11, hot=hot)) for hot in (0.0, _HOT))
    require(skewed > even, f"a favoured expert costs {skewed:.4g}, balance {even:.4g}")


def check_collapse_is_seen(method: Subject) -> None:
    """Layers that collapsed onto different experts are each seen, though together they look even."""
    if not method.has("regularizer"):
        for expert in (0, 5):
            _check_one_collapse(method, expert)


def check_loss_lowers_imbalance(method: Subject) -> None:
    """The gradient of a loss lowers the favoured expert's logits against the others'."""
    if _skips(method, "loss"):
        return
    routing = sample_routing(12, hot=_HOT)
    balancer = method.create()
    (slope,) = torch.autograd.grad(_cost(method, balancer, routing), routing.logits)
    mean = slope[routing.valid].mean(0)
    require(mean[0] > mean[1:].max(), "a gradient step must make the favoured expert less likely")


def check_update_lowers_imbalance(method: Subject) -> None:
    """One update lowers the favoured expert's bias against the others', where the state has a bias."""
    balancer = method.create()
    state = balancer.start(_SHAPE)
    if "bias" not in state:
        return
    inputs = given_for(method, sample_routing(13, hot=_HOT), 13, state=state)
    after = balancer.update(inputs)["bias"]
    require(after[0] < after[1:].min(), "an update must make the favoured expert less likely")


def check_bias_evens_the_load(method: Subject) -> None:
    """Updated again and again, the bias evens out what a top-k choice makes of fixed scores."""
    balancer = method.create()
    state = balancer.start(_SHAPE)
    if "bias" not in state:
        return
    plain = sample_routing(13, num_tokens=256, hot=1.0)
    loads = []
    for _ in range(300):
        wanted = plain.scores.detach() + state["bias"]
        routing = by_choice(plain, wanted.topk(2).indices)
        loads.append(routing.load)
        state = balancer.update(given_for(method, routing, 13, state=state))
    worst = [float(load.max() / load.float().mean()) for load in (loads[0], loads[-1])]
    require(
        worst[1] < worst[0], f"after 300 updates the fullest expert has {worst[1]:.3g} times the mean load"
    )


def check_expert_order_is_irrelevant(method: Subject) -> None:
    """Experts in another order: the same loss, and the biases in that order, where there is no noise."""
    inputs = replace(sample(method, 14), generator=None)
    order = torch.randperm(_NUM_EXPERTS, generator=torch.Generator().manual_seed(14))
    balancer = method.create()
    moved_inputs = replace(inputs, routing=reordered(inputs.routing, order))
    for name in ("router_weight", "gradients"):
        value = getattr(inputs, name)
        if value is not None:
            moved_inputs = replace(moved_inputs, **{name: value[order]})
    if inputs.experts is not None:
        held = _inputs.experts(14)
        moved_inputs = replace(
            moved_inputs, experts=replace(held, gate_up=held.gate_up[order], down=held.down[order])
        )
    straight, moved = use(balancer, inputs), use(balancer, moved_inputs)
    require(torch.allclose(straight["loss"], moved["loss"], atol=1e-6), "the loss depends on expert order")
    for name, value in straight["state"].items():
        if value.shape == (_NUM_EXPERTS,):
            require(
                torch.allclose(value[order], moved["state"][name], atol=1e-6), f"{name} does not move along"
            )


def check_padding_does_not_count(method: Subject) -> None:
    """What the router thinks of padding changes nothing."""
    inputs = sample(method, 15)
    routing = inputs.routing
    noise: dict[str, Any] = {
        name: torch.where(routing.valid[:, None], value, 1.0 - value)
        for name, value in (("scores", routing.scores), ("logits", routing.logits))
    }
    balancer = method.create()
    before = use(balancer, inputs)
    after = use(balancer, replace(inputs, routing=replace(routing, **noise)))
    require(torch.allclose(before["loss"], after["loss"], atol=1e-6), "padding changes the loss")
    for name, value in before["state"].items():
        require(torch.allclose(value, after["state"][name], atol=1e-6), f"padding changes {name}")


def check_parts_make_the_whole(method: Subject) -> None:
    """With the counts of the whole batch, the parts' losses average to its loss, and updates are equal.

    The average weighs each part by its valid tokens; the gradient is that of the whole, too.
    """
    if method.has("whole_batch"):
        return
    balancer = method.create()
    whole = sample_routing(16, num_tokens=60, hot=1.0)
    facts = whole_facts(whole)
    total = _cost(method, balancer, whole, **facts)
    alone = _cost(method, balancer, whole)
    require(torch.allclose(total, alone, rtol=1e-4), "the counts of the routing at hand change its loss")
    # Between the two sequences, where these must be whole.
    cut = 30 if method.has("whole_sequences") else 20
    parts = [masked(whole, (torch.arange(60) < cut) == first) for first in (True, False)]
    states = [balancer.update(_begun(method, balancer, part, **facts)) for part in (whole, *parts)]
    for name, value in states[0].items():
        for state in states[1:]:
            require(torch.allclose(value, state[name]), f"parts of the batch update {name} differently")
    if method.cls.loss is Balancer.loss:
        return
    shares = [part.valid.sum() / whole.valid.sum() for part in parts]
    pieces = [s * _cost(method, balancer, part, **facts) for s, part in zip(shares, parts, strict=True)]
    joined = torch.stack(pieces).sum()
    require(torch.allclose(joined, total, rtol=1e-4), f"the parts give {joined:.5g}, the whole {total:.5g}")
    if not total.requires_grad:
        # About experts and router rows alone, which are given here as they are.
        return
    slopes = [
        torch.autograd.grad(value, whole.logits, retain_graph=True, allow_unused=True)[0]
        for value in (total, joined)
    ]
    require(
        slopes[0] is None or torch.allclose(slopes[1], slopes[0], rtol=1e-3, atol=1e-7),
        "the parts' gradient is not the whole's",
    )


@slow
def check_shards_make_the_whole(method: Subject) -> None:
    """Two processes with a shard each, their counts summed, find the loss and state of the whole batch."""
    if method.has("whole_batch"):
        return
    balancer = method.create()
    whole = sample_routing(16, num_tokens=60, hot=1.0)
    begun = _begun(method, balancer, whole, **whole_facts(whole))
    expected = balancer.loss(begun).item()
    states = balancer.update(begun)
    for loss, state in loss_of_shards(method, whole):
        require(
            abs(loss - expected) <= 1e-4 * max(abs(expected), 1e-6),
            f"shards {loss:.5g}, whole {expected:.5g}",
        )
        same = all(torch.allclose(state[name], value) for name, value in states.items())
        require(same, "the processes' states differ from that of the whole batch")


def whole_facts(whole: Routing) -> dict[str, Any]:
    """What is known of a whole batch, for each of its parts."""
    return {"load": whole.load, "loads": whole.load[None], "num_tokens": int(whole.valid.sum())}


def _require_finite(balancer: Balancer, inputs: BalancerInput, where: str) -> None:
    """Loss, its gradients and the next state are finite numbers."""
    made = use(balancer, inputs)
    require(torch.isfinite(made["loss"]).all(), f"the loss is not finite {where}")
    values = list(made["state"].values())
    if made["loss"].requires_grad:
        trained = [value for value in inputs.state.values() if value.requires_grad]
        leaves = [value for value in (inputs.routing.logits, *trained) if value.requires_grad]
        found = torch.autograd.grad(made["loss"], leaves, allow_unused=True)
        values += [slope for slope in found if slope is not None]
    require(
        all(torch.isfinite(value).all() for value in values), f"a gradient or state is not finite {where}"
    )


def _two_best(values: Float[Tensor, "T E"]) -> Int[Tensor, "T K"]:
    return values.topk(2).indices


def _skips(method: Subject, name: str) -> bool:
    return getattr(method.cls, name) is getattr(Balancer, name) or method.has("regularizer")


def _begun(method: Subject, balancer: Balancer, routing: Routing, **more: Any) -> BalancerInput:
    return given_for(method, routing, 0, state=balancer.start(_SHAPE), **more)


def _cost(method: Subject, balancer: Balancer, routing: Routing, **more: Any) -> Tensor:
    return balancer.loss(_begun(method, balancer, routing, **more))


def _check_one_collapse(method: Subject, expert: int) -> None:
    balancer = method.create()
    crowded, even = collapsed(expert), even_routing()
    if method.cls.loss is not Balancer.loss:
        costs = [_cost(method, balancer, routing).item() for routing in (crowded, even)]
        require(
            costs[0] > costs[1],
            f"a layer collapsed onto expert {expert} costs {costs[0]:.4g}, even {costs[1]:.4g}",
        )
    if "bias" in balancer.start(_SHAPE):
        bias = balancer.update(_begun(method, balancer, crowded))["bias"]
        used = [expert, (expert + 1) % _NUM_EXPERTS]
        others = [number for number in range(_NUM_EXPERTS) if number not in used]
        require(bias[used].max() < bias[others].min(), "the bias does not see a collapsed layer")

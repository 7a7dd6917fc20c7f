"""What every router promises where sizes, numbers or circumstances are not the usual ones."""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.nn import functional as F

from mixtura.authoring.contracts._compare import same
from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._inputs import SHAPE, converted, declared, experts, token_fields
from mixtura.authoring.contracts._routed import TIE, close, continued, dense, total_of, use
from mixtura.errors import SettingError, UserError
from mixtura.methods.routers import Router
from mixtura.methods.settings import construct, settings
from mixtura.modeling.layer import ExpertMatrices
from mixtura.types import LayerShape, RouterInput, Routing

_SIZES = (1, 2, 3, 24, 128)
_SCALES = (0.0, 1e-3, 30.0, 1e4)
_EMPTY_RANGE = re.compile(r"in \[(\S+), (\S+)\]")


def check_any_number_of_experts(method: Subject) -> None:
    """With 1 to 128 experts the router routes, or refuses a setting in a sentence that can be followed."""
    for number, num_experts in enumerate(_SIZES):
        shape = LayerShape(SHAPE.d_model, SHAPE.d_expert, num_experts)
        try:
            router = construct(method.cls, shape)
        except SettingError as error:
            found = _EMPTY_RANGE.search(str(error))
            require(
                found is None or float(found[1]) <= float(found[2]),
                f"{num_experts} experts are refused by a range in which nothing lies: {error}",
            )
            continue
        for training in (True, False):
            given = token_fields(40 + number, 12, shape=shape) | {"training": training}
            given["labels"] = {name: values % num_experts for name, values in given["labels"].items()}
            _require_whole(use(router, declared(method, given)), given["valid"], f"{num_experts} experts")


def check_any_seed(method: Subject) -> None:
    """A seed may be any whole number, and another seed draws other parameters."""
    if "seed" not in settings(method.cls):
        return
    drawn = [method.create(seed=seed).state_dict() for seed in (1, -5, 1 << 70)]
    if any(value.numel() for value in drawn[0].values()):
        require(not same(drawn[0], drawn[1]) or not drawn[0], "another seed must draw other parameters")


def check_extreme_tokens(method: Subject) -> None:
    """Tokens of any size and sequences of nothing but padding give finite numbers and finite gradients."""
    for number, scale in enumerate(_SCALES):
        given = token_fields(50 + number)
        given["x"] = scale * given["x"]
        _require_finite(method, method.create(), given, f"tokens {scale:g} times as large")
    padded = token_fields(54)
    padded["valid"] = padded["sequence_ids"] == 0
    _require_finite(method, method.create(), padded, "a sequence of padding alone")


def check_vanishing_scores(method: Subject) -> None:
    """Where all logits lie far below 0 the gradients are finite, by every kind of choice."""
    router = method.create()
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != (SHAPE.num_experts, SHAPE.d_model):
        return
    with torch.no_grad():
        weight.mul_(0.1)[:, 0] = 10.0
    for low in (-125.0, -95.0):
        given = token_fields(55)
        given["x"][:, 0] = low / 10
        _require_finite(method, router, given, f"logits of about {low:g}")


def check_made_without_memory(method: Subject) -> None:
    """Made on the device "meta" and given another's state, as checkpoints are loaded, it routes the same."""
    router = method.create()
    with torch.device("meta"):
        made = method.create()
    made.load_state_dict(router.state_dict(), assign=True)
    left = [name for name, value in (*made.named_parameters(), *made.named_buffers()) if value.is_meta]
    require(not left, f"{', '.join(left)} is not part of the state and stays without values")
    inputs = declared(method, token_fields(56))
    require(same(use(router, inputs), use(made, declared(method, token_fields(56)))), "it routes differently")


def check_frozen_values_are_buffers(method: Subject) -> None:
    """What is not trained is a buffer: loading a checkpoint makes every parameter one that is trained."""
    frozen = [name for name, value in method.create().named_parameters() if not value.requires_grad]
    require(not frozen, f"{', '.join(frozen)} must be a buffer, as a loaded model would train the parameter")


def check_autocast(method: Subject) -> None:
    """Under autocast the logits and the choices are those without it."""
    router = method.create()
    given = token_fields(57) | {"training": False, "generator": None}
    plain = use(router, declared(method, given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = use(router, declared(method, given))
    for name in ("logits", "scores"):
        left, right = getattr(plain, name), getattr(cast, name).to(plain.logits)
        require(torch.allclose(left, right, atol=TIE), f"autocast changes the {name}")
    require(torch.allclose(dense(plain), dense(cast).to(plain.scores), atol=TIE), "autocast changes choices")


def check_tokens_of_another_dtype(method: Subject) -> None:
    """A router in float32 routes tokens in bfloat16 and in float64, with weights in the tokens' dtype."""
    for dtype in (torch.bfloat16, torch.float64):
        routing = use(method.create(), declared(method, converted(token_fields(58), dtype)))
        require(torch.isfinite(routing.weights).all(), f"weights of tokens in {dtype} are not finite")
        require(routing.weights.dtype == dtype, f"weights of tokens in {dtype} are {routing.weights.dtype}")


def check_evaluation_after_a_step(method: Subject) -> None:
    """After a step of training it routes like a new router with the same state: nothing old is kept."""
    router = method.create()
    given = token_fields(59)
    quiet = given | {"training": False, "generator": None}
    with torch.no_grad():
        use(router.eval(), declared(method, quiet))
    total = total_of(use(router.train(), declared(method, given)))
    if total.requires_grad:
        total.backward()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.sub_(0.1 if parameter.grad is None else 0.1 + parameter.grad)
        fresh = method.create()
        fresh.load_state_dict(router.state_dict())
        left, right = (use(one.eval(), declared(method, quiet)) for one in (router, fresh))
    require(close(left, right), "it routes by what parameters were before the step")


def check_kept_weights_decide(method: Subject) -> None:
    """Tag ``keeps_weights``: at inference a trained router's rows decide alone, and no token is left out."""
    if not method.has("keeps_weights"):
        return
    given = token_fields(60) | {"training": False, "generator": None, "selection_bias": None, "allowed": None}
    first, second = method.create(), method.create(seed=1)
    require(first.weight.shape == (SHAPE.num_experts, SHAPE.d_model), "weight must be [E, D]")
    second.load_state_dict(second.state_dict() | {"weight": first.weight.detach()})
    left, right = (use(router, declared(method, given)) for router in (first, second))
    require(close(left, right), "at inference something besides weight decides that a trained model lacks")
    used = (dense(left) > 0)[given["valid"]]
    require(used.any(-1).all(), "a token of a trained model has no expert")
    likely = F.linear(given["x"], first.weight).argmax(-1)[given["valid"], None]
    require(used.gather(-1, likely).double().mean() > 0.5, "most tokens lose their most probable expert")


def check_no_parameter_is_left_out(method: Subject) -> None:
    """In every layer all parameters get a gradient from output and losses, for which processes wait."""
    if method.has("shared"):
        return
    router = method.create()
    parameters = dict(router.named_parameters())
    for given in (token_fields(61), continued(method, token_fields(61))) if parameters else ():
        routing = use(router, declared(method, given))
        parts = [routing.weights.sum(), *routing.losses.values()]
        parts += [one.sum() for one in (routing.extra, routing.modulation) if one is not None]
        total = torch.stack([part.double() for part in parts]).sum()
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        missing = [name for name, gradient in zip(parameters, found, strict=True) if gradient is None]
        require(not missing, f"layer {given['layer']}: no gradient for {', '.join(missing)}")


def check_logits_give_scores(method: Subject) -> None:
    """Scores that are probabilities over the experts are a softmax, sigmoid or ReLU of the logits."""
    given = token_fields(62) | {"training": False, "generator": None, "allowed": None}
    routing = use(method.create(), declared(method, given))
    logits, scores = (values[given["valid"]] for values in (routing.logits, routing.scores))
    # Those that share probability with what is no expert, or over tokens, cannot be read off the logits.
    if not torch.allclose(scores.sum(-1), torch.ones(()), atol=TIE):
        return
    forms = (logits.softmax(-1), logits.sigmoid(), logits.relu(), logits)
    alike = any(torch.allclose(form, scores, atol=TIE) for form in forms)
    require(alike, "the logits do not give the scores")


def check_wrong_sizes_are_refused(method: Subject) -> None:
    """Tokens, experts or fields of another size raise `UserError`."""
    router = method.create()
    given = token_fields(63)
    wrong: dict[str, Any] = {
        "x": given["x"][:, 1:],
        "valid": given["valid"][1:],
        "selection_bias": given["selection_bias"][1:],
        "allowed": given["allowed"][:, 1:],
        "experts": _fewer(experts(63)),
    }
    wrong |= {name: given[name][1:] for name in ("sequence_ids", "positions", "token_ids", "attention")}
    for name in {"x", "valid", *method.tagged("reads")} & wrong.keys():
        try:
            use(router, declared(method, given | {name: wrong[name]}))
        except (UserError, TypeCheckError):
            # Where annotations are checked as the program runs, they refuse first.
            continue
        require(False, f"{name} of another size must raise UserError")


def _fewer(made: ExpertMatrices) -> ExpertMatrices:
    return ExpertMatrices(made.gate_up[1:], made.down[1:])


def _require_whole(routing: Routing, valid: Tensor, what: str) -> None:
    """Finite numbers, experts that are there, none twice for a token and none for padding."""
    num_experts = routing.num_experts
    pairs = (routing.token_ids * num_experts + routing.expert_ids).sort().values
    require((pairs.diff() > 0).all(), f"{what}: a token is assigned twice to one expert")
    require(((routing.expert_ids >= 0) & (routing.expert_ids < num_experts)).all(), f"{what}: no such expert")
    require(valid[routing.token_ids].all(), f"{what}: padding has an expert")
    for values in (routing.weights, routing.scores, *routing.losses.values()):
        require(torch.isfinite(values).all(), f"{what}: all numbers must be finite")


def _require_finite(method: Subject, router: Router, given: dict[str, Any], what: str) -> None:
    """Finite weights and losses, and finite gradients by the tokens and all parameters."""
    x = given["x"].clone().requires_grad_()
    inputs: RouterInput = declared(method, given | {"x": x})
    routing = use(router, inputs)
    _require_whole(routing, inputs.valid, what)
    wanted = [x, *(value for value in router.parameters() if value.requires_grad)]
    total = 10 * total_of(routing)
    found = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else ()
    for gradient in found:
        require(gradient is None or torch.isfinite(gradient).all(), f"{what}: a gradient is not finite")

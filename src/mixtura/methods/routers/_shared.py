"""Mathematics that routers share: choices, groups, transport and what is remembered of a sequence."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError, UserError, check_range
from mixtura.methods._precision import exact, exact_logits, full_precision
from mixtura.methods._scores import to_sum_one
from mixtura.types import RouterInput


def keep(owner: nn.Module, name: str, values: Tensor, *, trained: bool = False) -> None:
    """Give a module these values: to be trained as a parameter, or else as a buffer.

    A parameter that must not be trained is not told from others by what loads a model anew.
    """
    if trained:
        owner.register_parameter(name, nn.Parameter(values.detach()))
    else:
        owner.register_buffer(name, values.detach())


def check_counts(owner: str, counts: Num[Tensor, " V"], num_words: int) -> None:
    """Raise `UserError` unless there is one count, finite and not negative, for each vocabulary entry."""
    if counts.shape != (num_words,):
        raise UserError(
            f"{owner} is made for {num_words} vocabulary entries, got {tuple(counts.shape)} counts; "
            "give one count an entry"
        )
    if not counts.is_meta and not ((counts >= 0) & (counts < torch.inf)).all():
        raise UserError(f"counts of {owner} must be finite and not negative; count the entries of a text")


def check_parts(owner: str, name: str, count: int, num_experts: int) -> None:
    """Raise `SettingError` unless the experts can be cut into ``count`` equal parts."""
    check_range(owner, name, count, 1, num_experts)
    if num_experts % count:
        raise SettingError(f"{name} of {owner} must divide the {num_experts} experts, got {count}")


def dealt(sequences: Int[Tensor, " T"], valid: Bool[Tensor, " T"], count: int) -> Int[Tensor, " T"]:
    """Which of ``count`` places, such as nodes, each token is at: equally many valid tokens at each.

    Tokens go in the order of their sequences, so where sequences are equally long and as many as fill
    the places, each is whole at one; a longer one is cut. Padding is where the token before it is.
    """
    order = torch.sort(sequences, stable=True).indices
    before = torch.zeros_like(order).scatter(0, order, valid[order].long().cumsum(0) - 1)
    return (before.clamp(min=0) * count).div(valid.sum().clamp(min=1), rounding_mode="floor")


def cosine_logits(
    x: Float[Tensor, "T R"], rows: Float[Tensor, "E R"], temperature: float | Tensor = 1.0
) -> Float[Tensor, "T E"]:
    """Cosines of tokens and expert embeddings over a temperature; 0 for a vector of zeros."""
    return exact_logits(F.normalize(exact(x), dim=-1), F.normalize(exact(rows), dim=-1)) / temperature


def best(scores: Float[Tensor, "T E"], count: int) -> Int[Tensor, "T K"]:
    """Each token's ``count`` experts of highest score; of equal scores the lowest index comes first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :count]


def present(chosen: Int[Tensor, "T K"], scores: Float[Tensor, "T E"]) -> Int[Tensor, "T K"]:
    """The choices, those of experts whose score is minus infinity made absent."""
    return chosen.masked_fill(scores.gather(-1, chosen) == -torch.inf, scores.shape[1])


def best_per_group(scores: Float[Tensor, "T E"], num_groups: int, count: int) -> Int[Tensor, "T K"]:
    """The ``count`` best experts of each of ``num_groups`` equal runs of experts: K = groups * count."""
    size = scores.shape[1] // num_groups
    grouped = scores.reshape(-1, size)
    first = torch.arange(num_groups, device=scores.device)[:, None] * size
    return (best(grouped, count).view(-1, num_groups, count) + first).flatten(1)


def best_of_groups(
    scores: Float[Tensor, "T E"], num_groups: int, top_groups: int, count: int, rated_by: int = 1
) -> Int[Tensor, "T K"]:
    """The ``count`` best experts within the ``top_groups`` best of ``num_groups`` equal runs of experts.

    A group is rated by the sum of its ``rated_by`` highest scores (DeepSeek-V2: 1, DeepSeek-V3: 2), of
    fewer where others are minus infinity; a group in which all are is taken last.
    """
    grouped = scores.view(scores.shape[0], num_groups, scores.shape[1] // num_groups)
    highest = grouped.sort(-1, descending=True).values[..., :rated_by]
    ratings = highest.masked_fill(highest.isneginf(), 0.0).sum(-1)
    ratings = ratings.masked_fill(highest[..., 0].isneginf(), -torch.inf)
    kept = torch.zeros_like(ratings, dtype=torch.bool).scatter(-1, best(ratings, top_groups), True)
    inside = kept[..., None].expand_as(grouped).reshape(scores.shape)
    return best(scores.masked_fill(~inside, -torch.inf), count)


def choice_shares(
    chosen: Int[Tensor, "T K"], scores: Float[Tensor, "T R"], valid: Bool[Tensor, " T"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Of each of R options the share of the valid tokens' choices, without gradient, and the mean score.

    For balancing options that are not all experts; a choice outside [0, R) is absent.
    """
    picked = chosen[valid].flatten()
    picked = picked[(picked >= 0) & (picked < scores.shape[1])]
    counts = torch.bincount(picked, minlength=scores.shape[1]).to(scores)
    means = scores[valid].sum(0) / valid.sum().clamp(min=1)
    return counts / counts.sum().clamp(min=1), means


def best_weighed(
    scores: Float[Tensor, "T E"], count: int, *, renormalize: bool = True
) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
    """Each token's ``count`` experts of highest score; these scores, over their sum if ``renormalize``."""
    chosen = best(scores, count)
    weights = scores.gather(-1, chosen)
    return chosen, to_sum_one(weights) if renormalize else weights


def half_up(value: float) -> int:
    """The nearest whole number, a half being rounded up."""
    return math.floor(value + 0.5)


def beside_unused(value: Tensor, *parameters: Tensor) -> Tensor:
    """The value, through which parameters get a gradient of zeros that this layer may have no use for.

    Several processes that train together wait for the gradient of every parameter.
    """
    if not torch.is_grad_enabled():
        return value
    nothing = sum((parameter.flatten()[0] * 0.0 for parameter in parameters), value.new_zeros(()))
    return value + nothing.to(value)


def sinkhorn(
    logits: Float[Tensor, "T E"], valid: Bool[Tensor, " T"], *, num_iterations: int, temperature: float = 1.0
) -> Float[Tensor, "T E"]:
    """The entropic transport plan of valid tokens to experts of equal capacity.

    Rows of valid tokens sum to 1; the more iterations, the nearer columns come to valid / E. Rows of
    padding are 0. In the log domain, in float32 at least.
    """
    rows = valid.nonzero().squeeze(-1)
    plan = exact(logits)[rows] / temperature
    capacity = math.log(max(rows.numel(), 1) / logits.shape[1])
    for _ in range(num_iterations if rows.numel() else 0):
        plan = plan - plan.logsumexp(0, keepdim=True) + capacity
        plan = plan - plan.logsumexp(1, keepdim=True)
    made = F.softmax(plan, dim=-1)
    return made.new_zeros(logits.shape).index_copy(0, rows, made)


def rank_in_sequence(
    scores: Float[Tensor, "T E"], valid: Bool[Tensor, " T"], sequences: Int[Tensor, " T"]
) -> Int[Tensor, "T E"]:
    """Each token's place among the valid tokens of its sequence by each expert's score, best first.

    Of equal scores the earlier token comes first; padding comes last.
    """
    known = scores.detach().masked_fill(~valid[:, None], -torch.inf)
    order = torch.sort(known, dim=0, descending=True, stable=True).indices
    owner, by_sequence = torch.sort(sequences[order], dim=0, stable=True)
    starts = torch.bincount(sequences, minlength=1).cumsum(0) - torch.bincount(sequences, minlength=1)
    places = torch.arange(scores.shape[0], device=scores.device)[:, None] - starts[owner]
    return torch.empty_like(order).scatter(0, order.gather(0, by_sequence), places)


def by_position(
    values: Float[Tensor, "T R"], inputs: RouterInput, owner: str, name: str = "values"
) -> Float[Tensor, "S C R"]:
    """Values of all tokens by sequence and position, those of earlier calls from ``history[name]``.

    Return it as ``history={name: table}``, so that later tokens find it. Places of padding, and those
    not yet written, hold 0.

    Raises:
        UserError: positions were not given.
    """
    positions, sequences = inputs.need("positions", owner), inputs.sequences
    past = inputs.history.get(name)
    num_sequences = int(sequences.max()) + 1 if sequences.numel() else 0
    length = int(positions.max()) + 1 if positions.numel() else 0
    if past is not None:
        num_sequences, length = max(num_sequences, past.shape[0]), max(length, past.shape[1])
    table = values.new_zeros(num_sequences, length, values.shape[1])
    if past is not None:
        table[: past.shape[0], : past.shape[1]] = past.to(values)
    rows = inputs.valid.nonzero().squeeze(-1)
    return table.index_put((sequences[rows], positions[rows]), values[rows])


@full_precision()
def attended(
    values: Float[Tensor, "T R"], inputs: RouterInput, owner: str
) -> tuple[Float[Tensor, "T R"], dict[str, Tensor]]:
    """Each token's mean of the values of its sequence's tokens, weighted by its attention; the history.

    Raises:
        UserError: attention or positions were not given.
    """
    attention = exact(inputs.need("attention", owner)).to(values.dtype)
    table = by_position(values, inputs, owner)
    width = min(attention.shape[1], table.shape[1])
    mixed = torch.zeros_like(values)
    for sequence in range(table.shape[0]):
        rows = (inputs.sequences == sequence).nonzero().squeeze(-1)
        mixed = mixed.index_copy(0, rows, attention[rows, :width] @ table[sequence, :width])
    return mixed, {"values": table}

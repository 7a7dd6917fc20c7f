"""Running sums over the assignments of one MoE layer, by domain and expert."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixtura.checkpoints.viewing.base import LayerView
from mixtura.errors import CheckpointError, UnknownNameError, UnsupportedModelError
from mixtura.methods import declared_tags
from mixtura.methods.statistics import LayerTokens, Statistic
from mixtura.running.observing.catching import Caught
from mixtura.types.trace import FEATURES, LayerTrace

_MAXIMUM_PREFIX = "max_"
# Bounds the pairs of experts held at once when choices of two layers are counted together.
_MOST_PAIRS = 1 << 20


@final
@dataclass(slots=True)
class Cursor:
    """Where in the text the running batch is: which of its rows count, and their domains.

    ``previous`` is the layer that ran before, with its choices for the rows that count.
    """

    valid: Bool[Tensor, " T"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    domains: Int[Tensor, " T"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    previous: tuple[LayerRecorder, Int[Tensor, "R K"]] | None = None

    def move(self, valid: Bool[Tensor, " T"], domains: Int[Tensor, " T"]) -> None:
        """Begin a batch. Both are on the CPU and have one entry per row the experts will see."""
        self.valid, self.domains, self.previous = valid, domains, None


@final
@dataclass(frozen=True, slots=True)
class _Rows:
    """What the statistics made of one expert's rows in the batch that runs."""

    expert: int
    token_ids: Int[Tensor, " N"]
    numbers: Mapping[str, Float[Tensor, " N"]]


@final
class LayerRecorder:
    """Adds up what happens in one MoE layer; an `mixtura.kernels.AssignmentObserver`.

    Memory is bounded by the layer's sizes: sums in float64, counts in int64, whatever the length of
    the text. Only ``keep_choices`` and ``logits_every`` grow with it.

    Args:
        layer: what is recorded.
        cursor: where in the text the running batch is.
        num_domains: M.
        statistics: what to take of every assignment, by name.
        caught: where the layer's residual stream and logits are left for statistics that read them.
        features: names of `mixtura.types.trace.FEATURES` to keep of every expert.
        keep_choices: also keep every token's experts.
        logits_every: of how many tokens one's logits are kept; 0 for none.
    """

    def __init__(
        self,
        layer: LayerView,
        cursor: Cursor,
        num_domains: int,
        statistics: Mapping[str, Statistic],
        *,
        caught: Caught | None = None,
        features: Collection[str] = (),
        keep_choices: bool = False,
        logits_every: int = 0,
    ) -> None:
        self.layer = layer
        self._cursor = cursor
        self._statistics = statistics
        self._fields = {name: fields_read([statistic]) for name, statistic in statistics.items()}
        self._caught = Caught() if caught is None else caught
        num_experts = layer.shape.num_experts
        size = (num_domains, num_experts)
        self._counts = torch.zeros(size, dtype=torch.int64)
        self._weight_sums = torch.zeros(size, dtype=torch.float64)
        start = {name: -torch.inf if _is_maximum(name) else 0.0 for name in statistics}
        self._values = {name: torch.full(size, start[name], dtype=torch.float64) for name in statistics}
        # Of all experts: sums of their outputs, and products of every two logits.
        self._features = {name: self._no_feature(name) for name in features}
        self._coactivation = torch.zeros((num_experts, num_experts), dtype=torch.int64)
        self._transitions: Tensor | None = None
        self._choices: list[Tensor] | None = [] if keep_choices else None
        self._logits: list[Tensor] = []
        self._logits_every, self._num_seen = logits_every, 0
        self._measured: list[_Rows] = []
        self._tokens: LayerTokens | None = None

    @property
    def _num_experts(self) -> int:
        return self.layer.shape.num_experts

    def _no_feature(self, name: str) -> Tensor:
        widths = {"mean_output": self.layer.shape.d_model, "logit_products": self._num_experts}
        return torch.zeros((self._num_experts, widths[name]), dtype=torch.float64)

    def start(
        self,
        hidden: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> None:
        """Count the choices of a batch."""
        cursor = self._cursor
        index = top_k_index.detach().cpu().to(torch.int64)
        weights = top_k_weights.detach().cpu().to(torch.float64)
        index = index.masked_fill((index < 0) | (index >= self._num_experts), self._num_experts)
        present = (index < self._num_experts) & cursor.valid[:, None]
        cells = (cursor.domains[:, None] * self._num_experts + index)[present]
        num_cells = self._counts.numel()
        self._counts += torch.bincount(cells, minlength=num_cells).view_as(self._counts)
        self._weight_sums += torch.bincount(cells, weights[present], num_cells).view_as(self._weight_sums)
        chosen = index[cursor.valid]
        _add_pairs(self._coactivation, chosen, chosen)
        if cursor.previous is not None:
            before, earlier = cursor.previous
            before.followed_by(self, earlier, chosen)
        cursor.previous = (self, chosen)
        if self._choices is not None:
            self._choices.append(chosen.to(torch.int32))
        if any(self._fields.values()):
            self._tokens = self._tokens_of(hidden, index, top_k_weights)
        if "logit_products" in self._features or self._logits_every:
            self._read_logits()

    def _read_logits(self) -> None:
        """Add up the products of a batch's logits, and keep those of some of its tokens."""
        assert self._caught.logits is not None
        logits = self._caught.logits.detach().cpu()[self._cursor.valid, : self._num_experts]
        if "logit_products" in self._features:
            self._features["logit_products"] += logits.double().T @ logits.double()
        if self._logits_every:
            self._logits.append(logits[-self._num_seen % self._logits_every :: self._logits_every].float())
            self._num_seen += len(logits)

    def followed_by(
        self, later: LayerRecorder, chosen: Int[Tensor, "R K"], later_chosen: Int[Tensor, "R K2"]
    ) -> None:
        """Count which experts of the next layer follow which of this one, if both are of one stack."""
        if self.layer.stack != later.layer.stack:
            return
        if self._transitions is None:
            size = (self._num_experts, later.layer.shape.num_experts)
            self._transitions = torch.zeros(size, dtype=torch.int64)
        _add_pairs(self._transitions, chosen, later_chosen)

    def expert(
        self,
        expert: int,
        token_ids: Int[Tensor, " N"],
        weights: Float[Tensor, " N"],
        inputs: Float[Tensor, "N D"],
        outputs: Float[Tensor, "N D"],
    ) -> None:
        """Take the statistics of one expert's rows."""
        if token_ids.numel() == 0:
            return
        if "mean_output" in self._features:
            self._features["mean_output"][expert] += outputs.detach().double().sum(0).cpu()
        if not self._statistics:
            return
        rows = inputs, outputs, weights = tuple(_widened(one.detach()) for one in (inputs, outputs, weights))
        measured = {name: statistic.measure(*rows) for name, statistic in self._statistics.items()}
        self._measured.append(_Rows(expert, token_ids.cpu(), measured))
        if self._tokens is not None and self._tokens.routed is not None:
            self._tokens.routed.index_add_(0, token_ids, outputs * weights[:, None])

    def finish(self) -> None:
        """Add the batch's statistics to the sums."""
        if self._measured:
            tokens = torch.cat([rows.token_ids for rows in self._measured])
            experts = torch.cat([torch.full_like(rows.token_ids, rows.expert) for rows in self._measured])
            cells = self._cursor.domains[tokens] * self._num_experts + experts
            factors = self._factors(tokens, experts)
            for name, values in self._values.items():
                new = torch.cat([rows.numbers[name] for rows in self._measured]).to("cpu", torch.float64)
                new = new * factors.get(name, 1.0)
                if _is_maximum(name):
                    values.view(-1).scatter_reduce_(0, cells, new, "amax")
                else:
                    values.view(-1).index_add_(0, cells, new)
        self._measured, self._tokens = [], None
        self._caught.residual = self._caught.logits = None

    def snapshot(self) -> dict[str, Tensor]:
        """What the experts' outputs have added so far, by name, for `restore`."""
        sums = {f"statistic.{name}": values.clone() for name, values in self._values.items()}
        if "mean_output" in self._features:
            sums["feature.mean_output"] = self._features["mean_output"].clone()
        return sums

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """In place of the experts' run after `start`: what a `snapshot` after that run held."""
        for name, values in self._values.items():
            values.copy_(snapshot[f"statistic.{name}"])
        if "mean_output" in self._features:
            self._features["mean_output"].copy_(snapshot["feature.mean_output"])
        self._measured = []
        self.finish()

    def _tokens_of(
        self, hidden: Float[Tensor, "T D"], index: Int[Tensor, "T K"], weights: Float[Tensor, "T K"]
    ) -> LayerTokens:
        """What the statistics read of the batch's tokens, the sum of their experts still nothing."""
        wanted = set().union(*self._fields.values())
        found: dict[str, Tensor] = {}
        for name in ("residual", "logits"):
            value = getattr(self._caught, name)
            if name in wanted and value is not None:
                found[name] = _widened(value.detach())
        if "routed" in wanted:
            found["routed"] = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for name, value in found.items():
            fits = hidden.shape if name == "residual" else (len(hidden), value.shape[-1])
            if tuple(value.shape) != tuple(fits):
                raise UnsupportedModelError(
                    f"the experts of layer {self.layer.index} are given rows of the size "
                    f"{tuple(hidden.shape)} and its {name} has {tuple(value.shape)}; take statistics that do "
                    f"not read the {name}"
                )
        chosen = index.to(hidden.device)
        weights = _widened(weights.detach()).masked_fill(chosen >= self._num_experts, 0.0)
        return LayerTokens(chosen=chosen, weights=weights, **found)

    def _factors(
        self, tokens: Int[Tensor, " N"], experts: Int[Tensor, " N"]
    ) -> dict[str, Float[Tensor, " N"]]:
        """By statistic, what the number of each assignment is multiplied by; absent where by nothing."""
        whole = self._tokens
        if whole is None:
            return {}
        places = (whole.chosen.cpu()[tokens] == experts[:, None]).int().argmax(1)
        found = {}
        for name, read in self._fields.items():
            if read:
                given = {field: getattr(whole, field) for field in ("residual", "routed", "logits")}
                given = {field: value if field in read else None for field, value in given.items()}
                factor = self._statistics[name].factor(replace(whole, **given))
                found[name] = factor.to("cpu", torch.float64)[tokens, places]
        return found

    def check_finite(self) -> None:
        """Raise `CheckpointError` if the router's weights or a statistic became NaN or infinite."""
        sums = {"routing weights": self._weight_sums}
        sums |= {name: values[self._counts > 0] for name, values in self._values.items()}
        sums |= self._features
        for name, values in sums.items():
            if not bool(torch.isfinite(values).all()):
                raise CheckpointError(
                    f"the {name} of layer {self.layer.index} became NaN or infinite; the checkpoint is "
                    f"damaged, or its dtype cannot hold its activations: download it again or use float32"
                )

    def trace(self, expert_num_bytes: int) -> LayerTrace:
        """What was seen so far."""
        counts = self._counts
        statistics = {
            name: values.masked_fill(counts == 0, 0.0) if _is_maximum(name) else values / counts.clamp(min=1)
            for name, values in self._values.items()
        }
        return LayerTrace(
            index=self.layer.index,
            shape=self.layer.shape,
            top_k=self.layer.top_k,
            num_groups=self.layer.num_groups,
            top_groups=self.layer.top_groups,
            expert_num_bytes=expert_num_bytes,
            counts=counts.clone(),
            weight_sums=self._weight_sums.clone(),
            statistics=statistics,
            features={name: self._feature(name) for name in self._features},
            coactivation=self._coactivation.clone(),
            transitions=None if self._transitions is None else self._transitions.clone(),
            choices=None if self._choices is None else torch.cat(self._choices),
            logits=torch.cat(self._logits) if self._logits else None,
        )

    def _feature(self, name: str) -> Float[Tensor, "E _"]:
        if name == "mean_output":
            return self._features[name] / self._counts.sum(0).clamp(min=1)[:, None]
        return self._features[name].clone()


def caught_for(
    statistics: Iterable[Statistic], features: Iterable[str], *, keep_logits: bool = False
) -> frozenset[str]:
    """What has to be caught of a layer for some statistics and features, and for logits that are kept.

    Raises:
        UnknownNameError: there is no such feature.
    """
    for name in features:
        if name not in FEATURES:
            raise UnknownNameError("feature of experts", name, FEATURES)
    logits = {"logits"} if keep_logits or "logit_products" in features else set()
    return fields_read(statistics) | logits


def fields_read(statistics: Iterable[Statistic]) -> frozenset[str]:
    """The fields of `LayerTokens` that any of some statistics reads, by their tags."""
    tags = (tag for statistic in statistics for tag in declared_tags(type(statistic)))
    return frozenset(tag.removeprefix("reads:") for tag in tags if tag.startswith("reads:"))


def _is_maximum(name: str) -> bool:
    return name.startswith(_MAXIMUM_PREFIX)


def _widened(tensor: Tensor) -> Tensor:
    """Half precision as float32, so that no statistic squares and adds in 8 bits of mantissa."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _add_pairs(table: Int[Tensor, "E E2"], first: Int[Tensor, "R K"], second: Int[Tensor, "R K2"]) -> None:
    """Add to ``table[i, j]`` the rows in which `first` holds i and `second` holds j."""
    num_first, num_second = table.shape
    rows = max(1, _MOST_PAIRS // max(1, first.shape[1] * second.shape[1]))
    for one, other in zip(torch.split(first, rows), torch.split(second, rows), strict=True):
        pairs = one[:, :, None] * num_second + other[:, None, :]
        present = (one[:, :, None] < num_first) & (other[:, None, :] < num_second)
        table += torch.bincount(pairs[present], minlength=table.numel()).view_as(table)

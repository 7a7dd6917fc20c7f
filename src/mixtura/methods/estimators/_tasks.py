"""Many tasks on the same rows: labels with holes, groups of tasks, and two levels of gated experts."""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._networks import (
    Passed,
    dense_routing,
    everyone,
    perceptron,
    routed,
    router,
    told,
)
from mixtura.methods.estimators._tables import Network


def labels_of(y: Any, num_rows: int, owner: str) -> Float[np.ndarray, "n K"]:
    """Labels of several tasks, 0 and 1, NaN where a row has none.

    Raises:
        UserError: they are something else, or a task has labels of one kind alone.
    """
    labels = np.array(y, dtype=np.float64) if y is not None else np.zeros((0, 0))
    if labels.ndim != 2 or len(labels) != num_rows:
        raise UserError(
            f"{owner} requires y to be passed as {num_rows} rows with a column a task, "
            f"got a shape of {labels.shape}"
        )
    if not np.isin(labels[~np.isnan(labels)], (0, 1)).all():
        raise UserError(f"labels of {owner} are 0, 1, or NaN where a row has none; got others")
    for task in range(labels.shape[1]):
        if len(np.unique(labels[~np.isnan(labels[:, task]), task])) < 2:
            raise UserError(f"task {task} of {owner} has labels of one class alone; leave it out")
    return labels


def groups_of(given: Sequence[Sequence[int]] | None, num_tasks: int) -> list[list[int]]:
    """The groups of tasks: those given, or one of all.

    Raises:
        SettingError: a task is in no group, in two, or does not exist.
    """
    groups = [list(range(num_tasks))] if given is None else [list(one) for one in given]
    if sorted(task for one in groups for task in one) != list(range(num_tasks)) or not all(groups):
        raise SettingError(
            f"task_groups must name each of the {num_tasks} tasks once, from 0 on, got {given!r}"
        )
    return groups


def masked_bce(logits: Float[Tensor, "T K"], labels: Float[Tensor, "T K"]) -> Float[Tensor, ""]:
    """The sum over tasks of the mean cross-entropy over rows that have a label; tasks without add nothing."""
    known = ~labels.isnan()
    each = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return ((each * known).sum(0) / known.sum(0).clamp(min=1)).sum()


class TaskNetwork(Network, ABC):
    """A network that says yes or no to several questions of a row, of which some have no answer."""

    def check_tasks(self, num_tasks: int) -> None:
        """Raise `SettingError` unless settings fit so many tasks."""

    @final
    def fit(self, X: Any, y: Any = None) -> TaskNetwork:
        """Learn of rows, and of a column of 0, 1 and NaN (no label) a task.

        Raises:
            UserError: a number is missing, labels are others, or a task has labels of one kind alone.
            SettingError: a setting is out of range.
        """
        self.check_settings()
        X = self.fresh_rows(X)
        with self.in_words():
            labels = labels_of(y, len(X), type(self).__name__)
        self.check_tasks(labels.shape[1])
        self.learn(X, torch.from_numpy(labels), labels.shape[1])
        return self

    @final
    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of yes to every task."""
        return self.output(X).sigmoid().numpy()

    @final
    def predict(self, X: Any) -> np.ndarray:
        """Yes (1) or no (0) to every task."""
        return (self.predict_proba(X) > 0.5).astype(int)

    @final
    def score(self, X: Any, y: Any) -> float:
        """The area under the curve, the mean over tasks that have labels of both kinds.

        Raises:
            UserError: labels are not a column a task, of 0, 1 and NaN.
        """
        from sklearn.metrics import roc_auc_score

        said = self.predict_proba(X)
        labels = self.targets(y, said.shape)
        areas = []
        for task in range(labels.shape[1]):
            known = ~np.isnan(labels[:, task])
            if len(np.unique(labels[known, task])) == 2:
                areas.append(roc_auc_score(labels[known, task], said[known, task]))
        return float(np.mean(areas)) if areas else float("nan")


@final
class GatedExpert(nn.Module):
    """A linear map, batch norm and SiLU of features that a gate of low rank scales first."""

    def __init__(self, d_in: int, width: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Linear(d_in, rank, bias=False)
        self.b = nn.Linear(rank, d_in, bias=False)
        self.inner = nn.Sequential(nn.Linear(d_in, width), nn.BatchNorm1d(width), nn.SiLU())

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T F"]:
        """What the expert makes of rows; a gate of zeros scales nothing."""
        made: Tensor = self.inner(x * 2 * self.b(self.a(x)).sigmoid())
        return made


@final
class Hierarchy(nn.Module):
    """Meta experts, then experts: a set of all, one a group, and on the second level one a task."""

    def __init__(self, d_in: int, groups: list[list[int]], per_set: int, width: int, rank: int) -> None:
        super().__init__()
        self.groups, self.per_set = groups, per_set
        self.num_tasks, num_groups = sum(map(len, groups)), len(groups)
        self.group_of = [next(g for g, one in enumerate(groups) if t in one) for t in range(self.num_tasks)]
        num_meta, num_experts = (1 + num_groups) * per_set, (1 + num_groups + self.num_tasks) * per_set
        self.meta = nn.ModuleList(GatedExpert(d_in, width, rank) for _ in range(num_meta))
        self.experts = nn.ModuleList(GatedExpert(width, width, rank) for _ in range(num_experts))
        self.meta_gates = nn.ModuleList(nn.Linear(d_in, num_meta) for _ in range(1 + num_groups))
        self.gates = nn.ModuleList(nn.Linear(width, num_experts) for _ in range(self.num_tasks))
        self.self_gates = nn.ModuleList(nn.Linear(width, per_set) for _ in range(self.num_tasks))
        self.towers = nn.ModuleList(nn.Linear(width, 1) for _ in range(self.num_tasks))

    def seen(self, task: int) -> Bool[Tensor, " E"]:
        """Which experts a task may see: those of all tasks, of its group, and its own."""
        sets = torch.zeros(1 + len(self.groups) + self.num_tasks, dtype=torch.bool)
        sets[[0, 1 + self.group_of[task], 1 + len(self.groups) + task]] = True
        return sets.repeat_interleave(self.per_set)

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        """The logit of every task, and the gates over the experts of the second level."""
        features = self._features(x)
        inputs = [features[0], *features[1:], *(features[1 + g] for g in self.group_of)]
        outputs = torch.stack([e(inputs[n // self.per_set]) for n, e in enumerate(self.experts)])
        logits, weights, scores = [], [], []
        for task in range(self.num_tasks):
            z = features[1 + self.group_of[task]]
            raw = self.gates[task](z).masked_fill(~self.seen(task), -torch.inf)
            weight = raw.softmax(-1)
            first = (1 + len(self.groups) + task) * self.per_set
            own = outputs[first : first + self.per_set]
            more = torch.einsum("te,etd->td", self._self_gate(task, z), own)
            logits.append(self.towers[task](torch.einsum("te,etd->td", weight, outputs) + more))
            weights.append(weight)
            scores.append(raw)
        shown = torch.stack(weights, dim=1).flatten(0, 1)
        routing = dense_routing(shown, torch.stack(scores, dim=1).flatten(0, 1), present=shown > 0)
        return Passed(output=torch.cat(logits, dim=1), routing=routing, outputs=outputs)

    def _features(self, x: Tensor) -> list[Tensor]:
        """A feature of all tasks, then one a group."""
        outputs = everyone(self.meta, x)
        made = []
        for place, gate in enumerate(self.meta_gates):
            sets = torch.arange(1 + len(self.groups))
            seen = ((sets == 0) | (sets == place)).repeat_interleave(self.per_set)
            weight = gate(x).masked_fill(~seen, -torch.inf).softmax(-1)
            made.append(torch.einsum("te,etd->td", weight, outputs))
        return made

    def _self_gate(self, task: int, z: Tensor) -> Tensor:
        raw: Tensor = self.self_gates[task](z)
        return raw.sigmoid() if self.per_set == 1 else raw.softmax(-1)


@final
class AskedNetwork(nn.Module):
    """One network that is told by a prompt which task to answer, with experts that begin almost alike."""

    def __init__(self, d_in: int, num_tasks: int, owner: Any) -> None:
        super().__init__()
        width, self.num_tasks = owner.d_hidden, num_tasks
        self.embed, self.decode = nn.Linear(d_in, width), nn.Linear(width, d_in)
        self.prompts = nn.Parameter(torch.randn(num_tasks, width))
        self.gate = router("top_k", 2 * width, owner.num_experts, owner.random_state, top_k=owner.top_k)
        first = perceptron(width, width, width)
        self.experts = nn.ModuleList(copy.deepcopy(first) for _ in range(owner.num_experts))
        for weight in self.experts.parameters():
            weight.data += owner.noise * weight.abs().mean() * torch.randn_like(weight)
        self.heads = nn.Parameter(torch.randn(num_tasks, width) / width**0.5)
        self.biases = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        h = self.embed(x).relu().repeat_interleave(self.num_tasks, dim=0)
        asked = torch.cat([h, self.prompts.repeat(len(x), 1)], dim=-1)
        routing = self.gate(told(asked, self.training))
        made = F.relu(h + routed(self.experts, h, routing, h.shape[1]))
        z = made.reshape(len(x), self.num_tasks, -1)
        return Passed(output=(z * self.heads).sum(-1) + self.biases, routing=routing, more=z)

"""HoME: many tasks by two levels of experts, those of all, of a group of tasks and of one task."""

from __future__ import annotations

from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor, nn

from mixtura.methods.estimators import Passed
from mixtura.methods.estimators._tasks import Hierarchy, TaskNetwork, groups_of, masked_bce

METHOD = {
    "paper": 7,
    "title": "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou",
    "tags": ["classifies", "multi_task"],
}


@final
class Home(TaskNetwork):
    """Say yes or no to several questions of a row, by experts of all questions, of kindred ones and of each.

    Multi-task learning, multi-gate mixture of experts, dense and sparse labels, click and like and follow.
    Meta experts of all tasks and of each group of tasks make a feature a group; from it experts of all, of
    the group and of the task make what the task reads, weighed by a gate of the task. Experts of other groups
    are hidden. A task's own experts come in once more by a gate of their own, so that tasks with few labels
    still train them. Before each expert a gate of low rank scales its features.

    Shapes:
        ``X [n, d]``, ``y [n, K]`` of 0, 1 and NaN where a task has no label; ``predict_proba [n, K]``.
        ``route`` has a token for every row and task, tasks of a row together.

    Raises:
        SettingError: ``task_groups`` does not name every task once, ``per_set`` is not in [1, 256], ``rank``
            in [1, 4096], or a size, rate or ``random_state`` out of range.
        UserError: labels are none of 0, 1 and NaN, or a task has no label of one kind.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(200, 4))
        >>> y = np.stack([X[:, 0] > 0, X[:, 0] > 1, X[:, 1] > 0], axis=1).astype(float)
        >>> y[50:, 1] = np.nan
        >>> model = Home(task_groups=[[0, 1], [2]], epochs=15).fit(X, y)
        >>> model.predict_proba(X).shape, bool(model.score(X, y) > 0.9)
        ((200, 3), True)

    Differences from the paper:
        Tasks are binary and weighed alike; ``score`` is the mean area under the curve. Experts of all tasks
        read a feature of the meta experts of all tasks, which code found elsewhere computes and does not use;
        there the feature gate is returned instead of multiplied. A sigmoid is the self gate of a single own
        expert.

    Reference:
        HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou (paper 7, abstract).
    """

    ranges: ClassVar = {"per_set": (1, 256), "rank": (1, 4096)}

    def __init__(
        self,
        *,
        task_groups: list[list[int]] | None = None,
        per_set: int = 2,
        d_hidden: int = 16,
        rank: int = 4,
        epochs: int = 40,
        batch_size: int = 64,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.task_groups = task_groups
        self.per_set = per_set
        self.d_hidden = d_hidden
        self.rank = rank
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def check_tasks(self, num_tasks: int) -> None:
        groups_of(self.task_groups, num_tasks)

    def build(self, d_in: int, d_out: int) -> nn.Module:
        groups = groups_of(self.task_groups, d_out)
        return Hierarchy(d_in, groups, self.per_set, self.d_hidden, self.rank)

    def loss(self, passed: Passed, target: Tensor, progress: float) -> Float[Tensor, ""]:
        return masked_bce(passed.output, target)

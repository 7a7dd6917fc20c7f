"""Meta-DMoE: experts of known domains teach a student, in one step, what an unlabelled new domain is like."""

from __future__ import annotations

from typing import Any, ClassVar, cast, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators import Passed, minimise, seeded
from mixtura.methods.estimators._adapting import Student, stepped
from mixtura.methods.estimators._domains import GroupedClassifier, parted
from mixtura.methods.estimators._learning import with_gradients
from mixtura.methods.estimators._training import frozen

METHOD = {
    "paper": 12,
    "title": "Meta-DMoE: Adapting to Domain Shift by Meta-Distillation from Mixture-of-Experts",
    "tags": ["classifies", "tabular", "reads:groups"],
}


@final
class MetaDmoe(GroupedClassifier):
    """Classify rows of a domain never seen before, adapting to it by its rows without labels.

    Domain shift, unsupervised test-time adaptation, meta-learning. Each known domain (``groups``) has an
    expert, trained on it alone and then frozen. An aggregator, a transformer over the experts' features of
    a row, says what features that row should have; a small student is moved towards them by one gradient
    step on a few unlabelled rows, and then classifies. Aggregator and student are trained so that this
    step helps: on rows of one domain, whose own expert is left out, the student after the step is to
    classify other rows of it. ``predict(X, groups=)`` adapts to each group by its own rows, whatever the
    groups' names; without ``groups`` nothing is adapted.

    Shapes:
        ``X [n, d]``, ``y [n]``, ``groups [n]``; ``route`` gives how far the aggregator attends to each
        expert.

    Raises:
        SettingError: ``step`` is not in [0, 1e3], ``support`` in [1, 65536], or a size, rate or
            ``random_state`` out of range.
        UserError: a number is missing, or there is one class alone.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> X, domain = generator.normal(size=(240, 3)), np.arange(240) % 4
        >>> y = (X[:, 0] > 0).astype(int)
        >>> X[:, 1] += domain
        >>> model = MetaDmoe(epochs=10).fit(X[domain < 3], y[domain < 3], groups=domain[domain < 3])
        >>> new = domain == 3
        >>> bool((model.predict(X[new], groups=domain[new]) == y[new]).mean() > 0.8)
        True

    Differences from the paper:
        Perceptrons in place of pre-trained image networks. A minibatch has rows of several domains, of each
        of which half are support and half query; domains with fewer than four rows in it add nothing. One
        optimizer for student and aggregator. In training every expert but the row's own is seen, at test
        all, as in the released code. ``step`` is 0.1, as the networks are small (the paper: 1e-4 to 1e-3).

    Reference:
        Meta-DMoE: Adapting to Domain Shift by Meta-Distillation from Mixture-of-Experts (paper 12,
        abstract); n3il666/Meta-DMoE.
    """

    ranges: ClassVar = {"step": (0, 1e3), "support": (1, 1 << 16)}

    def __init__(
        self,
        *,
        d_hidden: int = 32,
        step: float = 0.1,
        support: int = 64,
        epochs: int = 20,
        batch_size: int = 64,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.d_hidden = d_hidden
        self.step = step
        self.support = support
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def predict_proba(self, X: Any, groups: Any = None) -> np.ndarray:
        """The probability of every class, after a step on each group's first ``support`` rows."""
        X = self.rows(X)
        shares: np.ndarray = self.output_of(X).softmax(-1).numpy()
        if groups is None:
            return shares
        labels, net = self._labels(groups, len(X)), cast(Student, self.module_)
        with with_gradients(), seeded(self.random_state):
            x = self.standardised(X)
            for label in np.unique(labels):
                mine = torch.from_numpy(labels == label)
                student = self._adapted(net, x[mine][: self.support], None)
                said = net.head(student(x[mine])).softmax(-1)
                shares[labels == label] = said.detach().numpy()
        return shares

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return Student(d_in, d_out, self.d_hidden, len(self.groups_))

    def prepare(self, module: Any, x: Tensor, target: Tensor) -> None:
        rows, domains = parted(x)
        how: dict[str, Any] = {"epochs": self.epochs, "batch_size": self.batch_size}
        how["learning_rate"] = self.learning_rate
        for number, expert in enumerate(module.experts):
            own, head = torch.nonzero(domains == number)[:, 0], module.expert_heads[number]

            def loss(
                batch: Tensor, _: float, own: Tensor = own, expert: Any = expert, head: Any = head
            ) -> Tensor:
                return F.cross_entropy(head(expert(rows[own[batch]])), target[own[batch]])

            minimise([*expert.parameters(), *head.parameters()], loss, len(own), **how)
        taught = [*module.aggregator.parameters(), *module.aggregator_head.parameters()]

        def aggregate(batch: Tensor, _: float) -> Tensor:
            said = module.aggregator_head(module.told(rows[batch], domains[batch])[0])
            return F.cross_entropy(said, target[batch])

        minimise(taught, aggregate, len(rows), **how)
        frozen([module.experts, module.expert_heads, module.aggregator_head])

    def batch_loss(self, module: Any, x: Tensor, target: Tensor, progress: float) -> Float[Tensor, ""]:
        rows, domains = parted(x)
        losses = []
        for domain in range(len(self.groups_)):
            mine = torch.nonzero(domains == domain)[:, 0]
            support, query = mine[: len(mine) // 2], mine[len(mine) // 2 :]
            if len(support) > 1:
                student = self._adapted(module, rows[support], domains[support])
                losses.append(F.cross_entropy(module.head(student(rows[query])), target[query]))
        return torch.stack(losses).mean() if losses else F.cross_entropy(module(x).output, target)

    def loss(self, passed: Passed, target: Tensor, progress: float) -> Float[Tensor, ""]:
        return F.cross_entropy(passed.output, target)

    def _adapted(self, module: Any, x: Tensor, left_out: Tensor | None) -> Any:
        """The student after one step towards what the aggregator says of these rows."""
        return stepped(module.student, x, module.told(x, left_out)[0], self.step)

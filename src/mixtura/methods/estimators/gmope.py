"""GMoPE: one graph network told by a prompt who it is; new graphs train the prompts alone."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators import Passed, minimise, router, seeded, told
from mixtura.methods.estimators._graphs import GraphNetwork, NodeClassifier, likeness, surroundings
from mixtura.methods.estimators._training import frozen
from mixtura.types import Routing

METHOD = {
    "paper": 195,
    "title": "GMoPE:A Prompt-Expert Mixture Framework for Graph Foundation Models",
    "tags": ["classifies", "reads:edges", "tabular"],
}


@final
class Gmope(NodeClassifier):
    """Classify nodes by experts that are one graph network with a prompt each; carry it to other graphs.

    Graph prompt learning, node classification, transfer between graphs, few weights trained. Expert m reads a
    node's features beside prompt m. A router sees the structure around a node (its neighbours' mean, how many
    they are, how many those have) and mixes the ``top_k`` experts it likes best. A loss keeps prompts from
    pointing the same way, or all experts would become one. `transfer` learns another graph's classes by the
    prompts and the last linear layer; the graph network and the router stay as they are.

    Shapes:
        ``X [n, d]``, ``y [n]``, ``edges [2, m]`` between these rows, given to ``fit`` (where ``y`` is -1 for
        rows without a label), ``transfer`` and ``predict``. Without edges a row's neighbours are the nearest
        of those that were learned.

    Raises:
        SettingError: ``top_k`` is not in [1, ``num_experts``], ``num_neighbours`` in [1, 4096], ``d_prompt``
            in [1, 65536], ``apart`` in [0, 1e3], or another is out of range.
        UserError: a number is missing, edges name rows that do not exist, or there is one class alone.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = Gmope(epochs=60).fit(X, y > 0)
        >>> bool(model.transfer(X, y).score(X, y) > 0.85)
        True

    Differences from the paper:
        Only the abstract and a summary were at hand. There a network is pre-trained on many graphs by link
        prediction or contrast; here on one graph's classes. Prompts stand beside the features; what the
        router reads of the structure, two layers of means over neighbours and the weight 0.1 of the mean
        squared cosine between prompts are our choices.

    Reference:
        GMoPE: A Prompt-Expert Mixture Framework for Graph Foundation Models (paper 195, abstract).
    """

    ranges: ClassVar = {
        "top_k": (1, 4096), "num_neighbours": (1, 4096), "d_prompt": (1, 1 << 16), "apart": (0, 1e3),
    }  # fmt: skip

    def __init__(
        self,
        *,
        num_experts: int = 4,
        top_k: int = 2,
        d_hidden: int = 32,
        d_prompt: int = 8,
        num_neighbours: int = 5,
        apart: float = 0.1,
        epochs: int = 100,
        learning_rate: float = 0.02,
        random_state: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.d_hidden = d_hidden
        self.d_prompt = d_prompt
        self.num_neighbours = num_neighbours
        self.apart = apart
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.random_state = random_state

    def transfer(self, X: Any, y: Any, edges: Any = None) -> Gmope:
        """Learn the classes of another graph of as many features, by prompts and the last layer alone.

        Raises:
            UserError: as `fit`; and where features are not as many as before.
        """
        self.check_settings()
        self.rows(X)
        x, joined, rows, target = self.taught(X, y, edges, reset=False)
        kept = {name: one for name, one in self.module_.state_dict().items() if not name.startswith("head.")}
        self.rebuild()
        self.module_.load_state_dict(kept, strict=False)
        frozen([self.module_.graph, self.module_.gate])
        with seeded(self.random_state):
            self.learn(x, joined, rows, target)
        return self

    def build(self, d_in: int, num_classes: int) -> nn.Module:
        return _Network(d_in, num_classes, self)

    def learn(
        self, x: Float[Tensor, "n D"], edges: Int[Tensor, "2 m"], rows: Int[Tensor, " r"], target: Tensor
    ) -> None:
        def lost(batch: Tensor, progress: float) -> Tensor:
            said = self.module_(x, edges).output[rows[batch]]
            return F.cross_entropy(said, target[batch]) + self.apart * likeness(self.module_.prompts)

        steps = {"epochs": self.epochs, "batch_size": len(rows)}
        minimise(self.module_.parameters(), lost, len(rows), learning_rate=self.learning_rate, **steps)

    def shares(self, x: Float[Tensor, "n D"], edges: Int[Tensor, "2 m"]) -> Float[Tensor, "n C"]:
        said: Tensor = self.module_(x, edges).output
        return said.softmax(-1)

    def route(self, X: Any, edges: Any = None) -> Routing:
        x, joined, num = self.placed(X, edges)
        with torch.no_grad():
            found: Routing = self.module_.gate(told(surroundings(x, joined)[-num:], training=False))
        return found


@final
class _Network(nn.Module):
    def __init__(self, d_in: int, num_classes: int, owner: Gmope) -> None:
        super().__init__()
        num, width = owner.num_experts, owner.d_hidden
        self.prompts = nn.Parameter(torch.randn(num, owner.d_prompt))
        self.graph = GraphNetwork(d_in + owner.d_prompt, width, width)
        self.gate = router("top_k", d_in + 3, num, owner.random_state, top_k=owner.top_k)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Float[Tensor, "n D"], edges: Int[Tensor, "2 m"]) -> Passed:
        routing = self.gate(told(surroundings(x, edges), self.training))
        prompted = [torch.cat([x, one.expand(len(x), -1)], dim=-1) for one in self.prompts]
        outputs = torch.stack([self.graph(one, edges).relu() for one in prompted])
        taken = outputs[routing.expert_ids, routing.token_ids] * routing.weights[:, None]
        mixed = torch.zeros_like(outputs[0]).index_add(0, routing.token_ids, taken)
        return Passed(output=self.head(mixed), routing=routing, outputs=outputs)

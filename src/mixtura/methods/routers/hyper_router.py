"""HyperRouter: a fixed network makes the router's rows from a trained embedding."""

from __future__ import annotations

from typing import final

from torch import Tensor
from torch.nn import functional as F

from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._remade import Remade
from mixtura.methods.routers._shared import best, keep
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 103,
    "title": "HyperRouter: Towards Efficient Training and Inference of Sparse Mixture of Experts",
    "tags": ["normalized", "token_independent"],
}


@final
class HyperRouter(Router):
    """Make the router's rows and biases by a hypernetwork: something between training and freezing it.

    One embedding goes through a network of two layers with a ReLU, whose output is read as ``[E, D + 1]``:
    a row and a bias for each expert. The network stays as it was drawn; only the embedding is trained, so
    that the router improves but cannot collapse quickly. Each token takes the ``top_k`` experts of
    highest logit, weighted by a softmax over those; of equal logits the lowest index wins.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``embedding [embedding_width]``, and the
        buffers (with ``train_hypernet`` parameters) ``hidden [hidden_width, embedding_width]`` and
        ``output [E * (D + 1), hidden_width]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], or a width not in [1, 1e6].

    Example:
        >>> import torch
        >>> router = HyperRouter(LayerShape(d_model=4, d_expert=8, num_experts=3))
        >>> [name for name, value in router.named_parameters() if value.requires_grad]
        ['embedding']
        >>> router(RouterInput.of(torch.eye(4))).load.sum().item()
        8

    Differences from the paper:
        In the paper's code the hypernetwork is an ordinary trained module; here it is fixed, as the
        abstract says, unless ``train_hypernet``. There the embedding is as wide as the model and layers
        have biases; here its width is a setting, there are no biases, and the second layer is drawn so that
        the router's rows start with the variance 1 / D of a plain router.

    Cost:
        In training rows are made anew in every forward pass, by ``hidden_width * E * (D + 1)`` products
        however few the tokens: several times top-k's time. In evaluation without gradients they are kept
        until weights change, and the time is top-k's.

    Reference:
        HyperRouter: Towards Efficient Training and Inference of Sparse Mixture of Experts (paper 103,
        abstract); ``HyperRouterGate`` in giangdip2410/HyperRouter.
    """

    hidden: Tensor
    output: Tensor

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        embedding_width: int = 64,
        hidden_width: int = 256,
        train_hypernet: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.embedding_width = self.within("embedding_width", embedding_width, 1, 1e6)
        self.hidden_width = self.within("hidden_width", hidden_width, 1, 1e6)
        self.train_hypernet = train_hypernet
        self.seed = seed
        rows = shape.num_experts * (shape.d_model + 1)
        self.embedding = drawn(seed, embedding_width, scale=embedding_width)
        hidden = drawn(seed + 1, hidden_width, embedding_width)
        # Half of the hidden units' mean square is lost in the ReLU.
        output = drawn(seed + 2, rows, hidden_width, scale=2 / shape.d_model)
        for name, values in (("hidden", hidden), ("output", output)):
            keep(self, name, values, trained=train_hypernet)
        self._remade = Remade()

    def made(self) -> tuple[Tensor, Tensor]:
        """The rows ``[E, D]`` and biases ``[E]`` that the hypernetwork makes of the embedding."""
        features = F.relu(exact_logits(self.embedding[None], self.hidden))
        table = exact_logits(features, self.output).view(self.shape.num_experts, -1)
        return table[:, :-1], table[:, -1]

    def forward(self, inputs: RouterInput) -> Routing:
        sources = [self.embedding, self.hidden, self.output]
        rows, biases = self._remade.of(self, sources, self.made)
        logits = exact_logits(inputs.x, rows) + biases
        chosen = best(logits, self.top_k)
        return self.chose(
            inputs, chosen, softmax(logits.gather(-1, chosen)), scores=softmax(logits), logits=logits
        )

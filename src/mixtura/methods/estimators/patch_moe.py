"""pMoE as a classifier of images: every expert reads the few patches of an image that it likes best."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods.estimators import NetworkClassifier, Passed, router, told

METHOD = {
    "paper": 116,
    "title": (
        "Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for Convolutional Neural "
        "Networks"
    ),
    "tags": ["classifies", "tabular"],
}


@final
class PatchMoe(NetworkClassifier):
    """Classify images by experts that each take their ``patches`` best patches, whatever others take.

    Small images, signals with a pattern somewhere, few samples. An image is cut into squares; the router
    ``p_moe`` lets every expert pick; its filters read what it took, weighted by a softmax over the patches
    taken, and what they find is mapped to classes by fixed random numbers.

    Shapes:
        ``X [n, H * W]`` with ``grid=[H, W]``, or ``[n, d]`` as pieces of a row; ``route`` has a token a
        patch, row by row.

    Raises:
        SettingError: ``grid`` is not two numbers whose product is the width of rows, ``side`` is not in [1,
            4096], ``patches`` in [1, 1e6], ``num_filters`` in [1, 65536], or another is out of range.
        UserError: a number is missing, or there is one class alone.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> X, y = load_digits(n_class=3, return_X_y=True)
        >>> model = PatchMoe(grid=[8, 8], side=4, patches=2, epochs=10).fit(X[:400], y[:400])
        >>> bool(model.score(X[400:], y[400:]) > 0.9), model.route(X[:2]).load.tolist()
        (True, [4, 4, 4, 4, 4, 4, 4, 4])

    Differences from the paper:
        There two classes and one output; here the fixed output layer has a column a class. Filters and router
        are trained together by Adam with a falling rate; there by SGD, in the theory the router first. Rows
        are standardised. Pieces that do not fill a patch are zeros.

    Reference:
        Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for Convolutional Neural
        Networks (paper 116); nowazrabbani/pMoE_CNN.
    """

    ranges: ClassVar = {"side": (1, 4096), "patches": (1, 1e6), "num_filters": (1, 1 << 16)}

    def __init__(
        self,
        *,
        num_experts: int = 8,
        num_filters: int = 8,
        patches: int = 2,
        side: int = 4,
        grid: list[int] | None = None,
        epochs: int = 40,
        batch_size: int = 20,
        learning_rate: float = 0.01,
        random_state: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.num_filters = num_filters
        self.patches = patches
        self.side = side
        self.grid = grid
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def build(self, d_in: int, d_out: int) -> nn.Module:
        grid = [1, d_in] if self.grid is None else self.grid
        if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != d_in:
            raise SettingError(f"grid of PatchMoe must be two numbers of product {d_in}, got {self.grid!r}")
        return _Network(grid, d_out, self)

    def loss(self, passed: Passed, target: Int[Tensor, " T"], progress: float) -> Float[Tensor, ""]:
        return F.cross_entropy(passed.output, target)


def cut(images: Float[Tensor, "n H W"], height: int, width: int) -> Float[Tensor, "n P D"]:
    """Images in patches, row by row, with zeros where the last ones reach over the edge."""
    down, across = -images.shape[1] % height, -images.shape[2] % width
    parts = F.pad(images, (0, across, 0, down)).unfold(1, height, height).unfold(2, width, width)
    return parts.flatten(3).flatten(1, 2)


@final
class _Network(nn.Module):
    def __init__(self, grid: list[int], d_out: int, owner: PatchMoe) -> None:
        super().__init__()
        self.grid, self.size = grid, (min(owner.side, grid[0]), min(owner.side, grid[1]))
        width = self.size[0] * self.size[1]
        num = owner.num_experts
        self.gate = router("p_moe", width, num, owner.random_state, patches=owner.patches)
        self.filters = nn.Parameter(torch.randn(num, owner.num_filters, width) / width**0.5)
        self.read: Tensor
        self.register_buffer("read", torch.randn(num * owner.num_filters, d_out))

    def forward(self, x: Float[Tensor, "n D"]) -> Passed:
        parts = cut(x.reshape(len(x), *self.grid), *self.size)
        tokens = parts.flatten(0, 1)
        owners = torch.arange(len(x)).repeat_interleave(parts.shape[1])
        routing = self.gate(told(tokens, self.training, sequence_ids=owners))
        taken = tokens[routing.token_ids] * routing.weights[:, None]
        found = torch.einsum("nd,nfd->nf", taken, self.filters[routing.expert_ids]).relu()
        places = owners[routing.token_ids] * len(self.filters) + routing.expert_ids
        sums = found.new_zeros(len(x) * len(self.filters), found.shape[1]).index_add(0, places, found)
        read = self.read / len(self.read) ** 0.5
        return Passed(output=sums.reshape(len(x), -1) @ read, routing=routing)

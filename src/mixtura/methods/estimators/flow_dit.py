"""DSMoE: images of a class out of noise, by a flow whose transformer has fine-grained and shared experts."""

from __future__ import annotations

from typing import Any, ClassVar, cast, final

import numpy as np
import torch
from jaxtyping import Float
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators import NetworkClassifier, Passed, seeded
from mixtura.methods.estimators._base import number_of
from mixtura.methods.estimators._flows import Explaining, Flow

METHOD = {
    "paper": 84,
    "title": "Efficient Training of Diffusion Mixture-of-Experts Models: A Practical Recipe",
    "tags": ["classifies", "generates"],
}


@final
class FlowDit(NetworkClassifier):
    """Draw new images of a class, and classify by which class explains an image best.

    Diffusion transformer, rectified flow, generative model. Patches of an image attend to each other,
    turned by where they stand (2D rotary positions); every second layer has many narrow experts beside a
    shared one, chosen by sigmoid scores as in DeepSeek-V3. The network learns the straight way from noise to
    image; `sample` follows it. A row's class is that under which the network errs least on the way to it.

    Shapes:
        ``X [n, H * W]`` with ``grid=[H, W]``, or ``[n, d]`` as one row of d patches; ``y [n]``; ``sample``
        gives ``[num, H * W]``; ``route`` has a token a patch, of the last layer with experts.

    Raises:
        SettingError: ``grid`` is not two numbers whose product is the width of rows, ``side`` does not
            divide both, ``d_model`` is no multiple of 4 times ``num_heads``, ``top_k`` is not in
            [1, ``num_experts``], or another is out of range.
        UserError: a number is missing, there is one class alone, or `sample` is asked for another class.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> y = np.arange(200) % 2
        >>> X = np.where(y[:, None] == 0, 2.0, -2.0) * np.array([1, 1, -1, -1])
        >>> X = X + 0.3 * generator.normal(size=(200, 4))
        >>> model = FlowDit(grid=[2, 2], epochs=60).fit(X, y)
        >>> drawn = model.sample(50, y=1)
        >>> drawn.shape, bool(np.abs(drawn.mean(0) - X[y == 1].mean(0)).max() < 0.8)
        ((50, 4), True)

    Differences from the paper:
        Rows are drawn as they are, not as codes of an autoencoder. The released code never changes the
        selection bias of its experts; here it moves by a thousandth against the load after each batch. One
        group of experts; times are read by a small perceptron of t and 1 - t. Classifying is ours.

    Reference:
        Efficient Training of Diffusion Mixture-of-Experts Models: A Practical Recipe (paper 84, abstract);
        yhlleo/EfficientMoE.
    """

    ranges: ClassVar = {
        "top_k": (1, 4096), "d_model": (4, 4096), "d_expert": (1, 1 << 16), "num_heads": (1, 256),
        "num_layers": (2, 256), "side": (1, 4096), "num_probes": (1, 4096), "no_class": (0, 1),
    }  # fmt: skip

    def __init__(
        self,
        *,
        num_experts: int = 8,
        top_k: int = 2,
        d_model: int = 32,
        d_expert: int = 16,
        num_heads: int = 2,
        num_layers: int = 2,
        grid: list[int] | None = None,
        side: int = 1,
        num_probes: int = 8,
        no_class: float = 0.1,
        epochs: int = 40,
        batch_size: int = 64,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.d_model = d_model
        self.d_expert = d_expert
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.grid = grid
        self.side = side
        self.num_probes = num_probes
        self.no_class = no_class
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def sample(self, num: int = 16, y: Any = None, *, steps: int = 20, seed: int = 0) -> np.ndarray:
        """New rows, of the class ``y`` or of any; the way from noise is cut into so many steps."""
        check_is_fitted(self)
        num, steps = number_of("sample", "num", num), number_of("sample", "steps", steps)
        labels, net = torch.full((num,), len(self.classes_)), cast(Explaining, self.module_)
        if y is not None:
            if y not in self.classes_.tolist():
                raise UserError(f"there is no class {y!r}; the classes are {self.classes_.tolist()}")
            labels = torch.full((num,), self.classes_.tolist().index(y))
        with seeded(seed), torch.no_grad():
            z = torch.randn(num, self.n_features_in_, dtype=torch.float64)
            for step in range(steps):
                time = torch.full((num,), step / steps, dtype=torch.float64)
                z = z + net.flow(z, time, labels)[0] / steps
        made: np.ndarray = z.numpy() * self.scale_ + self.mean_
        return made

    def build(self, d_in: int, d_out: int) -> nn.Module:
        grid = [1, d_in] if self.grid is None else self.grid
        side = 1 if self.grid is None else self.side
        if len(grid) != 2 or grid[0] * grid[1] != d_in or grid[0] % side or grid[1] % side:
            raise SettingError(
                f"grid of FlowDit must be two numbers with a product of {d_in}, each a multiple of side "
                f"({side}), got {self.grid!r}"
            )
        if self.d_model % (4 * self.num_heads):
            raise SettingError(
                f"d_model of FlowDit must be a multiple of {4 * self.num_heads}, got {self.d_model}"
            )
        return Explaining(Flow((grid[0] // side, grid[1] // side), side, d_out, self), d_in, d_out, self)

    def batch_loss(self, module: Any, x: Tensor, target: Tensor, progress: float) -> Float[Tensor, ""]:
        time, noise = torch.rand(len(x), dtype=x.dtype), torch.randn_like(x)
        labels = torch.where(torch.rand(len(x)) < self.no_class, len(self.classes_), target)
        speed, _ = module.flow(time[:, None] * x + (1 - time[:, None]) * noise, time, labels)
        return F.mse_loss(speed, x - noise)

    def loss(self, passed: Passed, target: Tensor, progress: float) -> Float[Tensor, ""]:
        return F.cross_entropy(passed.output, target)

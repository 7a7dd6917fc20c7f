"""The head: logits of the vocabulary, from a matrix as it is or with every feature's column normed."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods._precision import exact

_EPS = 1e-7


@final
class NormedHead(nn.Linear):
    """A head whose weights have length 1 over the vocabulary, feature by feature.

    So no feature can raise all logits together, which steadies long trainings. The matrix that is multiplied
    with is an ordinary one, `folded`, which is what an ordinary model gets in its place.

    >>> head = NormedHead(2, 3, bias=False)
    >>> head.folded().square().sum(0).allclose(head.weight.new_ones(2))
    True
    """

    def folded(self) -> Float[Tensor, "V D"]:
        """The matrix that tokens are multiplied with, in the weights' dtype."""
        return F.normalize(exact(self.weight), dim=0, eps=_EPS).to(self.weight.dtype)

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n V"]:
        """The logits."""
        return F.linear(x, self.folded())


def make_head(d_model: int, vocab_size: int, *, normed: bool) -> nn.Linear:
    """The head of a model."""
    return (NormedHead if normed else nn.Linear)(d_model, vocab_size, bias=False)


def head_weight(head: nn.Linear) -> Float[Tensor, "V D"]:
    """What a head multiplies with, as the weight of an ordinary one."""
    return head.folded().detach() if isinstance(head, NormedHead) else head.weight

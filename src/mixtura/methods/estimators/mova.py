"""MoVA: a classifier with several encoders of a row; a question names some, a gate weighs those."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods.estimators import NetworkClassifier, Passed
from mixtura.methods.estimators._columns import NumberColumn
from mixtura.methods.estimators._views import CrossBlock, components, cosines, pieces, slopes

METHOD = {
    "paper": 93,
    "title": "MoVA: Adapting Mixture of Vision Experts to Multimodal Context",
    "tags": ["classifies", "tabular"],
}
_VIEWS = ("values", "slopes", "cosines", "components")


@final
class Mova(NetworkClassifier):
    """Classify rows by a view of them that reads other views: the best of those that the question names.

    Mixture of vision encoders, feature fusion, several questions about the same images. A row is seen in four
    ways that are not trained: its values (0), their slopes (1), their cosine transform (2), its principal
    components (3). Coarse: ``named`` says which views a question may use. Fine: a gate that reads the
    question and the row weighs the ``top_k`` best of these, and the row's tokens read theirs by
    cross-attention. At the start the block changes nothing.

    Shapes:
        ``X [n, d]``, ``y [n]``; with ``question_column`` a column of X holds the question, from 0, of as many
        as ``named`` has entries. ``route`` gives the views that rows read.

    Raises:
        SettingError: ``named`` holds no list of views from 0 to 3 a question, ``question_column`` is no
            column, ``size`` is not in [1, 65536], ``top_k`` in [1, 4], or another is out of range.
        UserError: a number or a question is missing, or there is one class alone.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = Mova(named=[[0, 2]], epochs=20).fit(X, y)
        >>> bool(model.score(X, y) > 0.9), model.route(X).load.tolist()
        (True, [150, 0, 150, 0])

    Differences from the paper:
        Views are fixed maps in place of large vision encoders, all of one number of tokens, and the answer is
        a class. A table names views in place of a language model with low-rank adapters (a model router of
        this library can write it). One block in place of three, one head, no rotary positions.

    Reference:
        MoVA: Adapting Mixture of Vision Experts to Multimodal Context (paper 93); TempleX98/MoVA.
    """

    ranges: ClassVar = {"size": (1, 1 << 16), "top_k": (1, len(_VIEWS)), "question_column": (0, 1 << 20)}

    def __init__(
        self,
        *,
        named: list[list[int]] | None = None,
        question_column: int | None = None,
        size: int = 8,
        d_hidden: int = 16,
        top_k: int = 3,
        epochs: int = 40,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.named = named
        self.question_column = question_column
        self.size = size
        self.d_hidden = d_hidden
        self.top_k = top_k
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def build(self, d_in: int, d_out: int) -> nn.Module:
        named = [list(range(len(_VIEWS)))] if self.named is None else self.named
        if not named or not all(one and set(one) <= set(range(len(_VIEWS))) for one in named):
            raise SettingError(f"named of Mova must list views from 0 to 3 for each question, got {named!r}")
        if self.question_column is None and len(named) > 1:
            raise SettingError(
                f"named of Mova has {len(named)} questions; say which question_column has them"
            )
        return _Network(d_in, d_out, named, self)

    def prepare(self, module: nn.Module, x: Tensor, target: Tensor) -> None:
        assert isinstance(module, _Network)
        module.question.learn(self.mean_, self.scale_)
        module.views[-1].copy_(components(module.question.features(x)))

    def loss(self, passed: Passed, target: Int[Tensor, " T"], progress: float) -> Float[Tensor, ""]:
        return F.cross_entropy(passed.output, target)


@final
class _Network(nn.Module):
    def __init__(self, d_in: int, d_out: int, named: list[list[int]], owner: Mova) -> None:
        super().__init__()
        num, width = len(_VIEWS), owner.d_hidden
        last = len(named) - 1
        self.question = NumberColumn("questions of Mova", owner.question_column, d_in, 0, last)
        d_row = self.question.d_out
        self.size = min(owner.size, d_row)
        self.named: Tensor
        self.views: Tensor
        allowed = torch.tensor([[view in one for view in range(num)] for one in named])
        self.register_buffer("named", allowed, persistent=False)
        plain = torch.eye(d_row, dtype=torch.float64)
        self.register_buffer("views", torch.stack([plain, slopes(d_row), cosines(d_row), plain]))
        self.questions = nn.Embedding(len(named), width)
        self.embed = nn.ModuleList(nn.Linear(self.size, width) for _ in range(1 + num))
        self.places = nn.Parameter(0.1 * torch.randn(-(-d_row // self.size), width))
        self.block = CrossBlock(width, num, width, owner.top_k)
        self.head = nn.Linear(width, d_out)

    def forward(self, x: Float[Tensor, "n D"]) -> Passed:
        question, x = self.question.numbers(x), self.question.features(x)
        first, *rest = self.embed
        tokens = first(pieces(x, self.size)) + self.places
        shown = zip(rest, self.views, strict=True)
        seen = torch.stack([embed(pieces(x @ view.T, self.size)) + self.places for embed, view in shown])
        routing = self.block.route(tokens, self.questions(question), self.named[question])
        return Passed(output=self.head(self.block(tokens, seen, routing).mean(1)), routing=routing)

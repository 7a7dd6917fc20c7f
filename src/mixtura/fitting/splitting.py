"""`mixtura split`: a trained model with finer experts that compute what they did, as one of its family."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from mixtura.fitting.factoring import compared, opened, published, require_empty


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SplitResult:
    """What came of splitting a model's experts: experts and how many a token takes, and KL to what it was."""

    model: str
    family: str
    num_experts: int
    d_expert: int
    top_k: int
    kl: float
    num_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def split_experts(
    source: Path, out: Path, *, parts: int, text: Path | None = None, max_tokens: int = 1024
) -> SplitResult:
    """Write a model each of whose experts is cut into ``parts`` narrower ones, as one of an ordinary family.

    Raises:
        SettingError: ``parts`` does not divide the experts' width.
        UnsupportedModelError: the model is of another family or has other experts.
        OutputError: ``out`` holds files.
    """
    from mixtura.modeling.counting import num_chosen
    from mixtura.modeling.export import export
    from mixtura.modeling.splitting import split

    require_empty(out)
    own, tokens = opened(source, text, max_tokens)
    made = split(own, parts)
    kl, _ = compared(own, made, tokens)
    family = ""

    def save(folder: Path) -> None:
        nonlocal family
        family = export(made, folder)

    published(out, source, save)
    shape, top_k = made.model.blocks[0].experts.shape, num_chosen(made.model.blocks[0].router)
    assert top_k is not None
    return SplitResult(
        model=str(out),
        family=family,
        num_experts=shape.num_experts,
        d_expert=shape.d_expert,
        top_k=top_k,
        kl=kl,
        num_tokens=tokens.num_tokens,
    )

"""`mixtura factor`: a trained model with latent experts, compared with itself as it was, and written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch.nn import functional as F

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data.tokens import TokenBatch
from mixtura.errors import OutputError, UnsupportedModelError
from mixtura.running.whole import load_whole

# How far, as a share of their root mean square, logits of an imported model may be from those of its family.
_CLOSE, _CLOSE_IN_16_BITS = 1e-3, 5e-2
_BATCH_TOKENS = 2048


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FactorResult:
    """What came of giving a model latent experts.

    Attributes:
        model: where it is.
        width, num_groups: of the latent experts.
        num_bytes_before, num_bytes: of all weights.
        lost: by MoE layer, the root of the reading matrices' squared error over their squares.
        kl: to the model as it was, nats per token of text.
        same_top: share of tokens with the same most likely next token.
        num_tokens: of that text.
    """

    model: str
    width: int
    num_groups: int
    num_bytes_before: int
    num_bytes: int
    lost: tuple[float, ...]
    kl: float
    same_top: float
    num_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def factor(
    source: Path,
    out: Path,
    *,
    width: int,
    num_groups: int = 1,
    text: Path | None = None,
    max_tokens: int = 4096,
) -> FactorResult:
    """Write a model whose experts read a token through a common narrow space, and say what that costs.

    The model is loaded whole. It is one of Mixtral, Qwen3-MoE or OLMoE, or one of our own with plain experts;
    the result is one of our own. That the model as ours has the logits of its family's is checked first.

    Raises:
        SettingError: ``width`` is more than the model's, or ``num_groups`` does not divide the experts.
        UnsupportedModelError: the model is of another family or has other experts.
        OutputError: ``out`` holds files.
    """
    from mixtura.modeling.factoring import factored

    require_empty(out)
    own, tokens = opened(source, text, max_tokens)
    made = factored(own, width=width, num_groups=num_groups)
    kl, same_top = compared(own, made.model, tokens)
    published(out, source, made.model.save_pretrained)
    return FactorResult(
        model=str(out),
        width=width,
        num_groups=num_groups,
        num_bytes_before=num_bytes_of(own),
        num_bytes=num_bytes_of(made.model),
        lost=made.lost,
        kl=kl,
        same_top=same_top,
        num_tokens=tokens.num_tokens,
    )


def opened(source: Path, text: Path | None, max_tokens: int) -> tuple[Any, TokenBatch]:
    """A model as one of our own, and text to compare on; that it has its family's logits is checked.

    Raises:
        UnsupportedModelError: it is of no family that ours can be, or has other logits then.
    """
    from mixtura.modeling.causal import MixturaForCausalLM
    from mixtura.modeling.importing import imported
    from mixtura.running.observing.checkpoint import read_text

    tokens = read_text(open_checkpoint(source), text, max_tokens=max_tokens, max_length=256)
    original = load_whole(source)
    if isinstance(original, MixturaForCausalLM):
        return original, tokens
    own = imported(original)
    _require_same(original, own, tokens)
    return own, tokens


def published(out: Path, source: Path, save: Callable[[Path], Any]) -> None:
    """Let a model be saved beside its place, with its source's tokenizer, and take it in one step."""
    aside = out.with_name(f"{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    save(aside)
    load_tokenizer(source).save_pretrained(aside)
    if out.is_dir():
        out.rmdir()
    aside.rename(out)


def require_empty(out: Path) -> None:
    """Raise `OutputError` unless a directory is new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty; give a new directory")


def num_bytes_of(model: torch.nn.Module) -> int:
    """Of all weights, those that are tied once."""
    return sum(one.numel() * one.element_size() for one in model.parameters())


def _logits(model: Any, tokens: TokenBatch) -> Iterator[torch.Tensor]:
    """Of all real tokens, batch by batch."""
    for batch in tokens.split(_BATCH_TOKENS):
        mask = batch.attention_mask
        with torch.no_grad():
            found = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
        yield found[mask.bool()].float()


def compared(first: Any, second: Any, tokens: TokenBatch) -> tuple[float, float]:
    """KL of the second model's predictions from the first's, in nats a token, and how often both agree."""
    total, same, count = 0.0, 0, 0
    for told, said in zip(_logits(first, tokens), _logits(second, tokens), strict=True):
        logs = said.double().log_softmax(-1), told.double().log_softmax(-1)
        total += float(F.kl_div(*logs, reduction="sum", log_target=True))
        same += int((told.argmax(-1) == said.argmax(-1)).sum())
        count += len(told)
    return total / max(count, 1), same / max(count, 1)


def _require_same(original: Any, own: Any, tokens: TokenBatch) -> None:
    """Refuse a model that computes something else as one of our own."""
    told, said = (next(_logits(model, tokens)) for model in (original, own))
    apart = float((told - said).square().mean().sqrt() / told.square().mean().sqrt().clamp(min=1e-9))
    # In 16 bits sums in another order differ, and send a token to another expert now and then.
    if not apart <= (_CLOSE if own.dtype == torch.float32 else _CLOSE_IN_16_BITS):
        raise UnsupportedModelError(
            f"this {original.config.model_type} model has other logits as one of our own, {apart:.1%} apart; "
            "it has parts that are not its family's"
        )

"""The text that a compression is calibrated on and measured by."""

from __future__ import annotations

from pathlib import Path

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data.tokens import num_embeddings_of
from mixtura.fitting.compressing.records import DEFAULT_LENGTH, HELD_OUT_TOKENS
from mixtura.fitting.texts import Texts, load_texts


def read_texts(
    view: CheckpointView,
    text: Path | None,
    *,
    tokens: int,
    seed: int,
    length: int = DEFAULT_LENGTH,
    held_out_tokens: int = HELD_OUT_TOKENS,
) -> Texts:
    """Calibration and held-out text as a model's tokens, in sequences that it has positions for.

    Args:
        view: the model.
        text: a file or directory; None for text that comes with mixtura.
        tokens: of calibration text at most.
        seed: of the choice of text.
        length: tokens of a sequence at most.
        held_out_tokens: of held-out text at most.

    Raises:
        UserError: the text is missing, too short or no text.
    """
    positions = getattr(view.config.get_text_config(), "max_position_embeddings", None) or length
    return load_texts(
        text,
        load_tokenizer(view.path),
        length=min(length, positions),
        calibration_tokens=tokens,
        held_out_tokens=held_out_tokens,
        seed=seed,
        num_embeddings=num_embeddings_of(view.config),
    )

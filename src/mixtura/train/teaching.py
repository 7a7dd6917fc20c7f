"""The model that teaches a training: opened, compared with what is trained, never changed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from mixtura.errors import UserError
from mixtura.train.features import Teacher


@final
@dataclass(frozen=True, slots=True)
class Taught:
    """A teacher's model, and a digest of all its weights."""

    model: Any
    digest: str


def load_teacher(settings: Teacher, tokenizer: Any, vocab_size: int) -> Taught:
    """The teacher, ready to evaluate and without gradients.

    Raises:
        UserError: there is no such model, or it has another vocabulary.
    """
    from mixtura.running.whole import load_whole

    folder = Path(settings.model)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"the teacher {folder} is no directory of a model with weights in safetensors; give one to "
            "teacher.model"
        )
    model = load_whole(folder).requires_grad_(False)
    if model.config.vocab_size != vocab_size:
        raise UserError(
            f"the teacher {folder} has a vocabulary of {model.config.vocab_size}, the model one of "
            f"{vocab_size}; give a teacher with the same tokenizer"
        )
    _require_same_words(folder, tokenizer)
    total = hashlib.sha256()
    for file in weights:
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return Taught(model, total.hexdigest())


def _require_same_words(folder: Path, tokenizer: Any) -> None:
    """Refuse a teacher whose own tokenizer, where it has one, has other words."""
    from mixtura.checkpoints.tokenizer import load_tokenizer

    if (folder / "tokenizer.json").is_file() and load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer of the teacher {folder} has other words than that of the text; give a teacher "
            "with the same tokenizer"
        )

"""A model's tokenizer, without anything else of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixtura.errors import CheckpointError


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory; no code of the model's own is run.

    Raises:
        CheckpointError: the directory has none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if len(found) <= len(found.all_special_tokens):
            # Where there are no files transformers makes some families' tokenizers without a vocabulary.
            raise ValueError("it would have no tokens")
        return found
    except Exception as error:
        # Whatever the tokenizer's class raises, it is the directory that lacks something.
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} has no tokenizer that can be read ({reason[:200]}); "
            f"copy the tokenizer files of the model there"
        ) from None

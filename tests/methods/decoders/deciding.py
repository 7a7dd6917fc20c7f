"""Candidates and logits that tests of single decoders share; no model is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixtura.authoring.contracts.decoders import sample_prompt, tokenizer
from mixtura.methods.decoders import Branch, Candidate, Prompt


def grown(
    text: str, *, prompt: Prompt | None = None, branch: Branch | None = None, **fields: Any
) -> Candidate:
    """A branch that has grown to a text."""
    start = sample_prompt() if prompt is None else prompt
    ids = tokenizer().encode(text, add_special_tokens=False)
    return Candidate(prompt=start, branch=branch or Branch(), token_ids=list(ids), **fields)


def several(texts: Sequence[str], **fields: Any) -> list[Candidate]:
    """Branches that have grown to texts, of one prompt."""
    prompt = sample_prompt()
    return [grown(text, prompt=prompt, **fields) for text in texts]

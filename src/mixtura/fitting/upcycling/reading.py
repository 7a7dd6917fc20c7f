"""Prompts and text of an upcycling, as far as its method or its trial needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data.tokens import num_embeddings_of
from mixtura.errors import UserError
from mixtura.fitting.texts import Texts, as_batch, load_texts
from mixtura.fitting.upcycling.planning import needs_prompts, needs_text, reads
from mixtura.fitting.upcycling.prompts import read_prompts
from mixtura.fitting.upcycling.records import Request
from mixtura.fitting.upcycling.teaching import by_domain
from mixtura.running.dense_tracing import Group


def read_inputs(request: Request, path: Path, config: Any) -> tuple[tuple[Group, ...], Texts | None]:
    """Prompts and text, as far as they are needed.

    Raises:
        UserError: prompts are needed and none are given, or text cannot be read.
    """
    with_prompts = needs_prompts(request.method)
    if with_prompts and request.prompts is None:
        raise UserError(
            f"{request.method} needs prompts for each model: give --prompts FILE.json, such as "
            '{"MODEL": ["a prompt", "another"], "OTHER": ["..."]}'
        )
    if request.prompts is not None and not with_prompts:
        raise UserError(f"{request.method} reads no prompts; leave --prompts out, or choose prompt_gates")
    if not (with_prompts or needs_text(request.method) or request.measure):
        return (), None
    tokenizer = load_tokenizer(path)
    positions = getattr(config, "max_position_embeddings", None) or request.length
    length = min(request.length, positions)
    texts = None
    if request.measure or needs_text(request.method):
        texts = load_texts(
            request.text,
            tokenizer,
            length=length,
            calibration_tokens=request.tokens,
            held_out_tokens=request.held_out_tokens,
            seed=request.seed,
            num_embeddings=num_embeddings_of(config),
        )
    if request.prompts is not None:
        given = (request.prompts, request.sources, request.names, tokenizer, config, length)
        return read_prompts(*given), texts
    if texts is not None and needs_text(request.method):
        whole = as_batch(texts.calibration)
        # A group of text for each domain, where the method tells domains apart.
        parts = by_domain(whole) if "domains" in reads(request.method) else (whole,)
        return tuple(Group(part) for part in parts), texts
    return (), texts

"""Upcyclers of models that are MoE already: the model in memory with another router, tried and published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.packed import PLAN_FILE
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.checkpoints.upcycling.targets import OWN
from mixtura.errors import UserError
from mixtura.fitting.factoring import num_bytes_of, opened
from mixtura.fitting.publishing import beside, replace_text
from mixtura.fitting.upcycling.card import card_of
from mixtura.fitting.upcycling.reading import read_inputs
from mixtura.fitting.upcycling.records import RESULT, Request, Upcycled
from mixtura.fitting.upcycling.trying import tried
from mixtura.fitting.upcycling.trying_own import tried_own
from mixtura.methods.upcyclers import Upcycler
from mixtura.types.upcycling import DenseShape, UpcycleShape

_CARD = "README.md"
# Tokens on which a model as one of our own is compared with itself in its family.
_COMPARED = 256


def edited(request: Request, upcycler: Upcycler, notify: Callable[[str], None]) -> Upcycled:
    """Do what was asked for; the model is loaded whole.

    Raises:
        UserError: the model is dense, of a family that ours cannot be, or does not go with the method, or
            options are for dense models.
    """
    from mixtura.modeling.importing import rerouted

    if request.experts is not None or request.target not in (None, OWN):
        raise UserError(
            f"{request.method} keeps the experts of an MoE model and makes a model of mixtura's own of it; "
            "leave --experts and --target out"
        )
    source = request.sources[0]
    view = open_checkpoint(source)
    _, texts = read_inputs(request, view.path, view.config)
    notify("reading the model")
    own, _ = opened(source, request.text, _COMPARED)
    before = _shape(own)
    shape = UpcycleShape(num_experts=before.num_experts, top_k=request.top_k, seed=request.seed)
    recipe = upcycler.recipe((before,), shape, None)
    made = rerouted(own, dict(recipe.own["moe"]["router"]))
    result = Upcycled(
        out=request.out,
        method=request.method,
        settings=dict(request.settings),
        sources=request.names,
        family=OWN,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        d_expert=before.d_ffn,
        shared_width=0,
        bytes_before=num_bytes_of(own),
        bytes_after=num_bytes_of(made),
        promised=False,
    )
    aside = beside(request.out)
    shutil.rmtree(aside, ignore_errors=True)
    made.save_pretrained(aside)
    load_tokenizer(source).save_pretrained(aside)
    del own, made
    if texts is not None:
        first, states = tried(view, request.names[0], texts.held_out, notify)
        found = tried_own(aside, request.out.name, texts.held_out, states, notify)
        result = replace(result, before=(first,), **found)
    publish(aside, result, source)
    return result


def publish(aside: Path, made: Upcycled, source: Path) -> None:
    """Put a model that was made in a folder aside in its place, with its card and what is known of it."""
    card = card_of(
        made, made.out.name, [source], [checkpoint_digest(source)], has_plan=(aside / PLAN_FILE).is_file()
    )
    replace_text(aside / _CARD, card)
    replace_text(aside / RESULT, json.dumps(made.to_dict(), indent=1))
    if made.out.is_dir():
        made.out.rmdir()
    aside.rename(made.out)


def _shape(model: Any) -> DenseShape:
    block = model.model.blocks[0]
    sizes, config = block.experts.shape, model.config
    return DenseShape(
        d_model=sizes.d_model,
        d_ffn=sizes.d_expert,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        d_head=config.head_dim,
        num_words=config.vocab_size,
        num_experts=sizes.num_experts,
        top_k=block.router.num_chosen,
    )

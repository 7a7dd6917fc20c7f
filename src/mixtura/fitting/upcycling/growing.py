"""Upcyclers that make a dense model deeper: from disk to disk, tried beside the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.upcycling.growing import grow
from mixtura.errors import UserError
from mixtura.fitting.publishing import beside
from mixtura.fitting.upcycling.editing import publish
from mixtura.fitting.upcycling.reading import read_inputs
from mixtura.fitting.upcycling.records import Request, Upcycled
from mixtura.fitting.upcycling.trying import tried, tried_beside
from mixtura.methods.upcyclers import Upcycler
from mixtura.types import Plan
from mixtura.types.upcycling import UpcycleShape


def grown(request: Request, upcycler: Upcycler, notify: Callable[[str], None]) -> Upcycled:
    """Do what was asked for.

    Raises:
        UserError: the model is no dense one that can be read, or options are for experts.
    """
    if request.experts is not None or request.target is not None:
        raise UserError(
            f"{request.method} adds layers to a dense model, which has no experts; leave --experts and "
            "--target out"
        )
    source = request.sources[0]
    view = DenseView(source)
    _, texts = read_inputs(request, view.path, view.config)
    shape = UpcycleShape(num_experts=2, top_k=1, seed=request.seed)
    recipe = upcycler.recipe((view.shape,), shape, None)
    aside = beside(request.out)
    notify("writing the model")
    added = grow(Plan(checkpoint_digest(source), recipe.actions), source, aside, progress=False)
    after = DenseView(aside)
    made = Upcycled(
        out=request.out,
        method=request.method,
        settings=dict(request.settings),
        sources=request.names,
        family=view.config.model_type,
        num_experts=0,
        top_k=0,
        d_expert=0,
        shared_width=0,
        bytes_before=view.num_bytes,
        bytes_after=after.num_bytes,
        promised=True,
        added_layers=added,
    )
    if texts is not None:
        first, states = tried(view, request.names[0], texts.held_out, notify)
        then, same = tried_beside(after, request.out.name, texts.held_out, states, notify)
        made = replace(made, before=(first,), after=then, beside=same)
    publish(aside, made, source)
    return made

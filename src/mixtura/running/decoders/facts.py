"""What a decoder may know of a model, and the mark by which its calibration is told from another's."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from mixtura.checkpoints.viewing.wrappers import plain_model
from mixtura.errors import UserError
from mixtura.methods.decoders import LayerFacts, ModelFacts
from mixtura.rerouting.core import Rerouting
from mixtura.running.decoding import decoding_config


def steered(model: PreTrainedModel) -> Rerouting:
    """The seats of a model's routers, to be steered.

    Raises:
        UnsupportedModelError: the model is dense or of a family that mixtura cannot work on.
        UserError: its routing was changed before.
    """
    found = Rerouting.of(model)
    if found.swaps or found.balancers:
        raise UserError("only a model's own routers can be steered; restore(model) first")
    return found


def facts_of(model: PreTrainedModel, seats: Rerouting | None) -> ModelFacts:
    """What a decoder may know; layers with experts only where their routers have seats."""
    config = model.config.get_text_config(decoder=True)
    layers = tuple(
        LayerFacts(
            index=index,
            num_experts=seat.layer.num_experts,
            top_k=seat.layer.top_k,
            scoring=seat.layer.scoring,
        )
        for index, seat in (seats.seats.items() if seats is not None else ())
        if not seat.layer.hash_routed
    )
    ends = decoding_config(model).eos_token_id or []
    return ModelFacts(
        layers=layers,
        num_layers=int(config.num_hidden_layers),
        vocabulary=int(config.vocab_size),
        ends=tuple(ends),
        mark=mark_of(model, seats),
    )


def mark_of(model: PreTrainedModel, seats: Rerouting | None) -> str:
    """A name for the model's sizes and routers: other weights or fewer experts give another.

    Routers are compared as bfloat16, so that the same model loaded in another dtype is the same.
    """
    inside: Any = plain_model(model)
    config = inside.config.get_text_config(decoder=True)
    sizes = [config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size]
    digest = hashlib.sha256(json.dumps(sizes).encode())
    held = [seat.matrix for seat in seats.seats.values()] if seats is not None else []
    # Of a dense model the embeddings tell it apart; a piece of them is enough.
    held = held or [model.get_input_embeddings().weight[:64]]
    for matrix in held:
        if not matrix.is_meta:
            digest.update(
                matrix.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
            )
    return f"sha256:{digest.hexdigest()[:32]}"

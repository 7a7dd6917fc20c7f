"""Observing every transformers family that has experts and a causal language model."""

from __future__ import annotations

import pytest
from families import FAMILIES, tiny_config, tiny_model
from recording import text
from test_observe import assert_same, check_against_hooks
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mixtura.running.observing import observe

CAUSAL = tuple(family for family in FAMILIES if type(tiny_config(family)) in MODEL_FOR_CAUSAL_LM_MAPPING)
TEXT = text([11, 5, 8, 2], [0, 1, 1, 0], seed=1)
# Sparse attention's indexer scores many tokens 0 and breaks such ties by the width of the batch, in
# transformers too; with no more tokens than it keeps there is nothing to choose.
SHORT = text([4, 1, 3, 2], [0, 1, 1, 0], seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("family", CAUSAL)
def test_trace_is_what_forward_hooks_see_whatever_the_padding(family: str) -> None:
    model = tiny_model(family)
    names = ["weighted_output_norm"]
    tokens = SHORT if hasattr(model.config, "index_topk") else TEXT
    check_against_hooks(model, tokens)
    alone = observe(model, tokens, statistics=names, batch_tokens=1)
    assert_same(alone, observe(model, tokens, statistics=names, batch_tokens=1000), rtol=1e-3)

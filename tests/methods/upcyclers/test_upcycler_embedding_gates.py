"""What the upcycler embedding_gates promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.authoring.contracts import sample_dense_trace
from mixtura.methods.upcyclers.embedding_gates import EmbeddingGates
from mixtura.types.upcycling import DenseShape, UpcycleShape


def test_rows_point_where_mean_embeddings_do() -> None:
    dense = DenseShape(d_model=6, d_ffn=8, num_layers=2)
    trace = sample_dense_trace(dense, num_groups=2)
    recipe = EmbeddingGates().recipe((dense,) * 2, UpcycleShape(num_experts=2, top_k=1), trace)
    (rows,) = recipe.arrays.values()
    assert trace.embeddings is not None
    alike = torch.nn.functional.cosine_similarity(rows, trace.embeddings)
    torch.testing.assert_close(alike, torch.ones(2))

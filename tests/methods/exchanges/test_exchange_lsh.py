"""What the exchange lsh promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.exchanges.lsh import Lsh


def test_centroids_are_means_of_those_that_hash_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    rows = points[torch.arange(32) % 4] + 0.05 * torch.randn(32, 8, generator=generator, dtype=torch.float64)
    seats = torch.arange(32) % 2
    method = Lsh(hashes=2, seed=3)
    packed = method.pack(rows, seats)
    axes = method._axes(rows)
    clusters: dict[tuple[int, ...], list[int]] = {}
    for row in range(32):
        clusters.setdefault((int(seats[row]), *axes[row].tolist()), []).append(row)
    assert len(packed.rows) == len(clusters) < 32
    squared = packed.unpack(packed.rows.square())
    for members in clusters.values():
        centroid = rows[members].mean(0)
        for row in members:
            assert torch.allclose(squared[row], centroid.square() + rows[row] - centroid)


def test_more_hashes_send_more() -> None:
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    seats = torch.zeros(200, dtype=torch.int64)
    sent = [len(Lsh(hashes=hashes, width=4).pack(rows, seats).rows) for hashes in (1, 2, 4)]
    assert sent[0] <= 8
    assert sent[0] < sent[1] < sent[2] < 200

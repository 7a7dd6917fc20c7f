"""Parts of `checkpoints.view`: finding MoE layers, reading them in memory and on disk, dropping experts."""

from __future__ import annotations

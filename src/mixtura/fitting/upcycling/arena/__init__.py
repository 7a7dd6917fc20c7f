"""The arena of upcyclers: MoE models of small dense ones, all trained on with the same further text."""

from __future__ import annotations

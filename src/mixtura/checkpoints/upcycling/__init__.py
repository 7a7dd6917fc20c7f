"""Writing an MoE checkpoint of dense ones: families that can hold it, its tensors, its files."""

from __future__ import annotations

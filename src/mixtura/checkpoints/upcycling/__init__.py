"""Writing a Mixture-of-Experts checkpoint of dense ones: families that can hold it, its tensors, its files."""

from __future__ import annotations

"""Dense models on disk, as what they are outside their feed-forward parts and these parts' neurons."""

from __future__ import annotations

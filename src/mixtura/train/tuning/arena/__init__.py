"""The arena of adapters: the specimen tuned with each of them at equal size, beside LoRA and full tuning."""

from __future__ import annotations

"""Parts of `checkpoints.apply`: what goes where in the new checkpoint, its files, its journal, its card."""

from __future__ import annotations

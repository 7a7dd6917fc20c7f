"""Minibatches, Adam and a seed: how estimators learn by gradients, the same bits for the same seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from jaxtyping import Int
from torch import Tensor, nn

# PyTorch's global generator is one for all threads: two that learn at once would draw from each other's seed.
_turn = RLock()


def _begin_unlocked() -> None:
    """In a process that was forked no thread is left to unlock."""
    global _turn
    _turn = RLock()


os.register_at_fork(after_in_child=_begin_unlocked)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from PyTorch's global generator as if it had this seed, and leave it as it was.

    Threads take turns.
    """
    with _turn, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def minimise(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Int[Tensor, " B"], float], Tensor],
    num_rows: int,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> list[float]:
    """Lower a loss by Adam over shuffled minibatches; return the mean loss of every epoch.

    Args:
        parameters: what is trained.
        loss: of the rows of these numbers; and how far the training is, in [0, 1).
        num_rows: of all.
        epochs: times that every row is seen.
        batch_size: rows of a minibatch; a last one of a single row is left out, as its mean says little and
            some losses compare rows.
        learning_rate: at the start; it falls to zero along half a cosine.
        weight_decay: of AdamW.
    """
    trained = [one for one in parameters if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    history = []
    for epoch in range(epochs):
        order = torch.randperm(num_rows)
        total = seen = 0.0
        for start in range(0, num_rows, batch_size):
            batch = order[start : start + batch_size]
            if len(batch) < 2 and num_rows > 1:
                continue
            optimizer.zero_grad(set_to_none=True)
            value = loss(batch, epoch / epochs)
            value.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            total, seen = total + float(value.detach()) * len(batch), seen + len(batch)
        schedule.step()
        history.append(total / max(seen, 1.0))
    return history


def frozen(modules: Iterable[nn.Module]) -> None:
    """Let these modules learn nothing from here on."""
    for module in modules:
        module.requires_grad_(False)

"""Telling adapters that learn in stages of the optimizer's steps, in transformers' Trainer."""

from __future__ import annotations

from typing import Any, final

from transformers import TrainerCallback

from mixtura.errors import UserError


@final
class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the adapters of a model of every step; for a Trainer of one's own. `mixtura tune` has it.

    Raises:
        UserError: the model has no adapter of mixtura.
    """

    def __init__(self, model: Any) -> None:
        tuner: Any = getattr(model, "base_model", None)
        if not hasattr(tuner, "before_step"):
            raise UserError(
                f"{type(model).__name__} has no adapter of mixtura; give what get_peft_model returned"
            )
        self._tuner = tuner

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients of the whole step are there."""
        self._tuner.before_step(state.global_step, state.max_steps)

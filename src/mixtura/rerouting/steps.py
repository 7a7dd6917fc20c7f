"""What a `Trainer` tells of its steps and checkpoints, passed on to what keeps a model's routing."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

from transformers import TrainerCallback

from mixtura.errors import UserError
from mixtura.rerouting.side_files import has_side_files

_STATE = "trainer_state.json"
# What a Trainer's state and the file it was read from have in common, whatever the new run changes.
_SAME = ("global_step", "epoch", "total_flos", "log_history", "best_metric")


@runtime_checkable
class Stepping(Protocol):
    """What counts optimizer steps, and keeps states that belong to a checkpoint."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    def end_step(self) -> None:
        """An optimizer step is done and its gradients are still there."""

    def save(self, directory: Path) -> None:
        """Write the states beside a checkpoint."""

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""


@final
class Steps(TrainerCallback):  # type: ignore[misc]
    """Counts the steps of a `Trainer`; saves and restores with its checkpoints what it does not know of."""

    def __init__(self, states: Stepping) -> None:
        self._states = states

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training may go on from a checkpoint, whose weights the model has been given.

        Raises:
            UserError: it is not where this run writes its checkpoints, and its states were not loaded.
            CheckpointError: its states are damaged, or those of other routers and balancers.
        """
        if not state.global_step:
            return
        places = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        if isinstance(named := getattr(args, "resume_from_checkpoint", None), str):
            places.insert(0, Path(named))
        folder = next((place for place in places if _is_of(place, state)), None)
        if folder is not None and has_side_files(folder):
            self._states.load(folder)
        elif folder is not None:
            warnings.warn(
                f"{folder} was saved without routers and balancers, which start anew at its step",
                stacklevel=2,
            )
        elif self._states.step != state.global_step:
            raise UserError(
                f"training goes on from step {state.global_step} of a checkpoint that is not in "
                f"{args.output_dir}, where its routers and balancers would be found; read them before "
                "training: set_router(...).load(checkpoint) or balance(...).rerouting.load(checkpoint)"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are still there."""
        self._states.end_step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint was written, perhaps of adapters alone."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self._states.save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model may have been given the weights of its best checkpoint.

        Raises:
            CheckpointError: its states are damaged, or those of other routers and balancers.
        """
        best = state.best_model_checkpoint
        # Where it is gone, the Trainer has said so and left the model as it is.
        if args.load_best_model_at_end and best is not None and has_side_files(best):
            self._states.load(Path(best))


def _is_of(folder: Path, state: Any) -> bool:
    """Whether this is the checkpoint that a Trainer's state was read from."""
    try:
        saved = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(saved, dict):
        return False
    # As text: a loss that is NaN is the same NaN.
    there, here = [saved.get(name) for name in _SAME], [getattr(state, name, None) for name in _SAME]
    return json.dumps(there) == json.dumps(here)

"""What is changed about the routing of one model, kept on the model, and how it is taken back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback

from mixtura.checkpoints.view import MemoryView
from mixtura.errors import UserError
from mixtura.rerouting.passes import Pass, Passes
from mixtura.rerouting.seats import Clock, Seat
from mixtura.rerouting.side_files import Note, Swap, read_note, read_tensors, write_side_files
from mixtura.rerouting.watching import routings_of
from mixtura.types import Routing

_ATTRIBUTE = "mixtura_rerouting"
_IGNORED = -100


class Listener(Protocol):
    """What wants to know of a model's forward passes."""

    def before(self, here: Pass) -> None:
        """A pass begins; it may be told what to collect and whom to force."""

    def after(self, here: Pass, routings: Mapping[int, Routing]) -> Float[Tensor, ""] | None:
        """A pass is over; what to add to the training loss, scaled as the pass says."""

    def finish_step(self) -> None:
        """An optimizer step is done and its gradients are still there."""


@final
class Rerouting:
    """Everything that is changed about the routing of one model. `restore` takes it all back.

    Attributes:
        model: whose routing it is.
        seats: by decoder layer number, what stands in for its router.
        listeners: told of every pass, in order.
        loss: what the last training pass added to the model's loss (a model called without labels has
            no loss of its own: add it yourself).
        clock: optimizer steps done, for routers and balancers that go by them.
        swaps: the routers that were set.
        balancers: those that keep it balanced, by name and settings.
        undone: what else `restore` has to do, the last first.
    """

    def __init__(self, model: nn.Module) -> None:
        view = MemoryView(model)
        self.model = model
        self.clock = Clock()
        self.passes = Passes(model, [layer.router_name for layer in view.layers])
        self.seats = {
            layer.index: Seat(layer, place, self.passes, self.clock)
            for place, layer in enumerate(view.layers)
        }
        self.listeners: list[Listener] = []
        self.loss: Float[Tensor, ""] | None = None
        self.undone: list[Callable[[], None]] = []
        self.swaps: list[Swap] = []
        self.balancers: list[tuple[str, dict[str, Any]]] = []
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
            model.register_forward_hook(self._finally, always_call=True),
        ]

    @staticmethod
    def of(model: nn.Module) -> Rerouting:
        """That of a model, begun where there is none yet.

        Raises:
            UnsupportedModelError: the model is dense or of a family that mixtura cannot work on.
        """
        inner: Any = unwrapped(model)
        if getattr(getattr(inner, "config", None), "model_type", None) == "mixtura":
            raise UserError(
                "the routers and balancers of a mixtura model are part of its config; name them there instead"
            )
        found = vars(inner).get(_ATTRIBUTE)
        if not isinstance(found, Rerouting):
            found = Rerouting(inner)
            setattr(inner, _ATTRIBUTE, found)
        return found

    @property
    def callback(self) -> TrainerCallback:
        """For ``Trainer(callbacks=[...])``: counts optimizer steps and updates balancers after each."""
        return _Steps(self)

    def end_step(self) -> None:
        """An optimizer step is done and its gradients are still there; for loops without `callback`."""
        for listener in self.listeners:
            listener.finish_step()
        self.clock.step += 1

    def save(self, directory: str | Path) -> None:
        """Write the side files beside a checkpoint that ``save_pretrained`` of this model did not write.

        Adapters, for instance, are saved without the model they belong to. `callback` does it for every
        checkpoint of a `Trainer`.
        """
        note = Note(self.clock.step, tuple(self.swaps), tuple(self.balancers))
        write_side_files(Path(directory), note, self.seats)

    def load(self, directory: str | Path) -> None:
        """Read what `save` wrote for a model whose routers and balancers were set alike.

        Raises:
            CheckpointError: the directory has no side files, damaged ones, or those of other routers.
        """
        note = read_note(Path(directory))
        read_tensors(Path(directory), self.seats)
        self.clock.step = note.step

    def restore(self) -> None:
        """Give the model its own routers back."""
        for handle in self._handles:
            handle.remove()
        self.passes.remove()
        for seat in self.seats.values():
            seat.remove()
        for undo in reversed(self.undone):
            undo()
        with suppress(AttributeError):
            delattr(self.model, _ATTRIBUTE)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.loss = None
        here = self.passes.begin(model, args, kwargs)
        here.collecting = here.training and any(seat.router is not None for seat in self.seats.values())
        here.share = _share(kwargs)
        for listener in self.listeners:
            listener.before(here)

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        here = self.passes.active
        if here is None or not here.collecting:
            return output
        routings = routings_of(here, self.seats)
        share = 1.0 if here.share is None else here.share
        added = [share * loss for routing in routings.values() for loss in routing.losses.values()]
        found = [listener.after(here, routings) for listener in self.listeners]
        added += [loss for loss in found if loss is not None]
        if not here.training or not added:
            return output
        self.loss = torch.stack([loss.float() for loss in added]).sum()
        return with_loss(output, self.loss)

    def _finally(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Tensors of the pass and all they were computed from would live until the next one.
        self.passes.current.seen.clear()
        self.passes.end()


@final
class _Steps(TrainerCallback):  # type: ignore[misc]
    def __init__(self, rerouting: Rerouting) -> None:
        self._rerouting = rerouting

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are still there."""
        self._rerouting.end_step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint was written, perhaps of adapters alone."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self._rerouting.save(folder)


def restore(model: nn.Module) -> None:
    """Take back whatever `set_router`, `balance` and replaying changed about a model, bit for bit.

    Weights that were trained meanwhile, and the correction biases that balancing updated in families that
    have them, stay as they have become. A model that nothing was changed about is left alone.
    """
    found = vars(unwrapped(model)).get(_ATTRIBUTE)
    if isinstance(found, Rerouting):
        found.restore()


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside what wraps it for adapters or several processes."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:
            break
    assert isinstance(inner, nn.Module)
    return inner


def with_loss(output: Any, added: Float[Tensor, ""]) -> Any:
    """A model's output with something added to its loss, where it has one."""
    if isinstance(output, tuple):
        has_loss = bool(output) and isinstance(output[0], Tensor) and output[0].ndim == 0
        return (output[0] + added.to(output[0].device), *output[1:]) if has_loss else output
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        output.loss = loss + added.to(loss.device)
    return output


def _share(kwargs: Mapping[str, Any]) -> Tensor | None:
    """What part of the whole batch's loss this pass is, where the caller sums the parts' losses.

    A `Trainer` that accumulates gradients hands the model the number of labels of all parts, by which it
    divides each part's loss; else the caller averages, every part counts in full, and this is None.
    """
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or not isinstance(labels, Tensor):
        return None
    shifted = kwargs.get("shift_labels")
    counted = shifted if isinstance(shifted, Tensor) else labels[..., 1:]
    share: Tensor = counted.ne(_IGNORED).sum() / total
    return share


def require_layers(rerouting: Rerouting, layers: list[int] | None) -> list[Seat]:
    """The seats of these decoder layers, of all MoE layers where none are named.

    Raises:
        UserError: a layer has no experts.
    """
    if layers is None:
        return list(rerouting.seats.values())
    for index in layers:
        if index not in rerouting.seats:
            known = ", ".join(map(str, rerouting.seats))
            raise UserError(f"layer {index} has no experts; the layers with experts are {known}")
    return [rerouting.seats[index] for index in layers]

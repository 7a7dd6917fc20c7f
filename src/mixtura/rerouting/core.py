"""What is changed about the routing of one model, kept on the model, and how it is taken back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from mixtura.checkpoints.view import MemoryView
from mixtura.checkpoints.viewing.wrappers import plain_model, submodule
from mixtura.errors import CheckpointError, UserError
from mixtura.rerouting.arguments import cache_of, described
from mixtura.rerouting.passes import Pass, Passes
from mixtura.rerouting.seats import NO_GRADIENT, Clock, Seat
from mixtura.rerouting.side_files import Note, Swap, read_note, read_tensors, write_side_files
from mixtura.rerouting.steps import Steps
from mixtura.rerouting.watching import routings_of
from mixtura.types import Routing

_ATTRIBUTE = "mixtura_rerouting"


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
        self._loss: Float[Tensor, ""] | None = None
        self._unclaimed = False
        self.undone: list[Callable[[], None]] = []
        self.swaps: list[Swap] = []
        self.balancers: list[tuple[str, dict[str, Any]]] = []
        # A loss of one's own may be computed on the states of the model inside, called by itself.
        self._owners = (model, *_models_inside(model, [layer.router_name for layer in view.layers]))
        self._handles = self._hooked()

    def _hooked(self) -> list[Any]:
        return [
            handle
            for owner in self._owners
            for handle in (
                owner.register_forward_pre_hook(self._before, with_kwargs=True),
                owner.register_forward_hook(self._after, with_kwargs=True),
                owner.register_forward_hook(self._finally, always_call=True),
            )
        ]

    @property
    def is_paused(self) -> bool:
        """Whether the model runs as if nothing were changed, until `resume`."""
        return not self._handles

    def pause(self) -> None:
        """Take every hook away for a while, so that what looks for none finds none."""
        if self.is_paused:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.passes.remove()
        for seat in self.seats.values():
            seat.stand()

    def resume(self) -> None:
        """Put back what `pause` took away; nothing where it took nothing."""
        if not self.is_paused:
            return
        self._handles = self._hooked()
        self.passes.hook()
        for seat in self.seats.values():
            seat.sit()

    @staticmethod
    def of(model: nn.Module) -> Rerouting:
        """That of a model, begun where there is none yet.

        Raises:
            UnsupportedModelError: the model is dense, of a family that mixtura cannot work on, or its
                parameters are sharded already.
            UserError: it is a model of mixtura's own, or several models.
        """
        inner: Any = plain_model(model)
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
    def loss(self) -> Float[Tensor, ""] | None:
        """What the last training pass added to the model's loss.

        A model that was called without labels, or inside of which only the decoder was called, has no loss of
        its own: add this to yours.
        """
        self._unclaimed = False
        return self._loss

    @property
    def callback(self) -> TrainerCallback:
        """For ``Trainer(callbacks=[...])``: counts optimizer steps and updates balancers after each."""
        return Steps(self)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.clock.step

    def end_step(self) -> None:
        """An optimizer step is done and its gradients are still there; for loops without `callback`."""
        if self._unclaimed:
            warnings.warn(
                "routing had losses in this step, but the model's forward returned none that they could be "
                "added to; add the attribute loss of what balance or set_router returned to your own loss",
                stacklevel=2,
            )
            self._unclaimed = False
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
        self._require_alike(note, directory)
        read_tensors(Path(directory), self.seats)
        self.clock.step = note.step

    def restore(self) -> None:
        """Give the model its own routers back."""
        self.resume()
        for handle in self._handles:
            handle.remove()
        self.passes.remove()
        for seat in self.seats.values():
            seat.remove()
        for undo in reversed(self.undone):
            undo()
        with suppress(AttributeError):
            delattr(self.model, _ATTRIBUTE)

    def _require_alike(self, note: Note, directory: str | Path) -> None:
        """Settings may have changed since, but a state is only that of the method it was saved by."""
        here = [swap.router for swap in self.swaps], [name for name, _ in self.balancers]
        there = [swap.router for swap in note.routers], [name for name, _ in note.balancers]
        if here != there:
            raise CheckpointError(
                f"{directory} was saved with the routers {there[0]} and the balancers {there[1]}, and the "
                f"model has {here[0]} and {here[1]}; set the same ones first, or load it by load_router"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.passes.active is not None:
            return
        self._loss = None
        here = described(model, args, kwargs, self.passes.number + 1)
        self.passes.begin(model, here)
        here.collecting = here.training and any(seat.router is not None for seat in self.seats.values())
        for listener in self.listeners:
            listener.before(here)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        here = self.passes.active
        if here is None or self.passes.owner is not model or not here.collecting:
            return output
        here.cache = cache_of(output) if here.cache is None else here.cache
        routings = routings_of(here, self.seats)
        share = 1.0 if here.share is None else here.share
        added = [share * loss for routing in routings.values() for loss in routing.losses.values()]
        found = [listener.after(here, routings) for listener in self.listeners]
        added += [loss for loss in found if loss is not None]
        if not here.training or not added:
            return output
        self._require_gradient(here)
        self._loss = torch.stack([loss.float() for loss in added]).sum()
        self._unclaimed = self._unclaimed or (torch.is_grad_enabled() and not _has_loss(output))
        return with_loss(output, self._loss)

    def _require_gradient(self, here: Pass) -> None:
        trained = any(parameter.requires_grad for parameter in self.model.parameters())
        if here.without_gradient and torch.is_grad_enabled() and trained:
            raise UserError(NO_GRADIENT.format("the balancing loss"))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _finally(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.passes.owner is model:
            self.passes.end()


def restore(model: nn.Module) -> None:
    """Take back whatever `set_router`, `balance` and replaying changed about a model, bit for bit.

    Weights that were trained meanwhile, and the correction biases that balancing updated in families that
    have them, stay as they have become. A model that nothing was changed about is left alone.
    """
    found = vars(plain_model(model)).get(_ATTRIBUTE)
    if isinstance(found, Rerouting):
        found.restore()


def with_loss(output: Any, added: Float[Tensor, ""]) -> Any:
    """A model's output with something added to its loss, where it has one."""
    if not _has_loss(output):
        return output
    if isinstance(output, tuple):
        return (output[0] + added.to(output[0].device), *output[1:])
    output.loss = output.loss + added.to(output.loss.device)
    return output


def _has_loss(output: Any) -> bool:
    if isinstance(output, tuple):
        return bool(output) and isinstance(output[0], Tensor) and output[0].ndim == 0
    return isinstance(getattr(output, "loss", None), Tensor)


def _models_inside(model: nn.Module, routers: Sequence[str]) -> list[nn.Module]:
    """The models that a model holds between itself and its routers: its decoder, for instance."""
    found: dict[int, nn.Module] = {}
    for name in routers:
        parts = name.split(".")
        owners = (submodule(model, ".".join(parts[:end])) for end in range(1, len(parts)))
        found |= {id(owner): owner for owner in owners if isinstance(owner, PreTrainedModel)}
    return list(found.values())


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

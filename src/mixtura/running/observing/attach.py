"""Attaching observers to a model's experts for as long as a block runs, and putting everything back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, final

from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtura.checkpoints.viewing.wrappers import submodule
from mixtura.errors import UnsupportedModelError
from mixtura.kernels import AssignmentObserver, register_backend
from mixtura.running.observing.recorder import Cursor

BACKEND = "mixtura"
_ATTRIBUTE = "mixtura_observer"


@final
class Several:
    """Observers of one layer as one: each sees every call, in order."""

    def __init__(self, observers: Sequence[AssignmentObserver]) -> None:
        self._observers = tuple(observers)

    def start(
        self,
        hidden: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> None:
        """A batch begins."""
        for observer in self._observers:
            observer.start(hidden, top_k_index, top_k_weights)

    def expert(
        self,
        expert: int,
        token_ids: Int[Tensor, " N"],
        weights: Float[Tensor, " N"],
        inputs: Float[Tensor, "N D"],
        outputs: Float[Tensor, "N D"],
    ) -> None:
        """One expert has run on its rows."""
        for observer in self._observers:
            observer.expert(expert, token_ids, weights, inputs, outputs)

    def finish(self) -> None:
        """The batch is over."""
        for observer in self._observers:
            observer.finish()


@contextmanager
def attached(model: nn.Module, observers: Mapping[str, AssignmentObserver], cursor: Cursor) -> Iterator[None]:
    """Let each experts module, by its name in `model`, run through mixtura's backend under an observer.

    Rows that do not count (padding) reach no expert: their choices become absent before the experts
    see them. The model is in evaluation mode meanwhile. On the way out, also by an exception or
    Ctrl-C, the model is as it was.
    """
    register_backend()
    with ExitStack() as stack:
        training = [module for module in model.modules() if module.training]
        stack.callback(_set_training, training)
        model.eval()
        for name, observer in observers.items():
            experts = submodule(model, name)
            stack.callback(_put_back, experts, _ATTRIBUTE, experts.__dict__.get(_ATTRIBUTE))
            setattr(experts, _ATTRIBUTE, observer)
            config: Any = experts.config
            stack.callback(
                setattr, config, "_experts_implementation_internal", config._experts_implementation
            )
            config._experts_implementation_internal = BACKEND
            stack.callback(experts.register_forward_pre_hook(_masking(cursor)).remove)
        yield


def _set_training(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.training = True


def _put_back(module: nn.Module, name: str, value: object) -> None:
    if value is None:
        module.__dict__.pop(name, None)
    else:
        setattr(module, name, value)


def _masking(cursor: Cursor) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook that makes the choices of rows that do not count absent."""

    def mask(experts: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, index, weights, *rest = inputs
        if index.shape[0] != cursor.valid.shape[0]:
            raise UnsupportedModelError(
                f"{type(experts).__name__} was given {index.shape[0]} rows for a batch of "
                f"{cursor.valid.shape[0]} tokens, so that padding cannot be told apart"
            )
        absent = ~cursor.valid.to(index.device)[:, None]
        return (
            hidden,
            index.masked_fill(absent, experts.num_experts),
            weights.masked_fill(absent, 0.0),
            *rest,
        )

    return mask

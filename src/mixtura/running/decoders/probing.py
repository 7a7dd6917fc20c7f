"""Running a model on a text beside the decoding, and calibrating a method with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.errors import CheckpointError, UnsupportedModelError, UserError
from mixtura.methods.decoders import Calibration, Head, ModelFacts, Ran, View
from mixtura.running.decoders.bundle import Cost
from mixtura.running.decoders.steering import Steerer, stacked
from mixtura.types.saving import save_tensors
from mixtura.types.steering import Steering

_HEADER = "mixtura_calibration"


@final
class ModelProbe:
    """What methods run a model by; see `mixtura.methods.decoders.Probe`."""

    def __init__(
        self, model: PreTrainedModel, facts: ModelFacts, steerer: Steerer | None, cost: Cost
    ) -> None:
        self._model = model
        self._facts = facts
        self._steerer = steerer
        self._cost = cost

    def head(self, hidden: Tensor, tokens: Tensor | None) -> Tensor:
        """Logits of what a layer returned, of the whole vocabulary or of some tokens."""
        return head_of(self._model)(hidden, tokens)

    def run(
        self,
        token_ids: Sequence[int],
        *,
        steering: Mapping[int, Steering] | None = None,
        gradients: bool = False,
    ) -> Ran:
        """Read a text from its beginning."""
        steerer, ids = self._steerer, torch.tensor([list(token_ids)], device=self._model.device)
        with ExitStack() as undo:
            if steerer is not None:
                made = stacked(
                    self._facts, [View(dict(steering or {}))], ids.shape[1], prefill=True, last=True
                )
                undo.enter_context(steerer.seated(made))
                undo.enter_context(steerer.collecting())
            undo.enter_context(torch.set_grad_enabled(gradients))
            if gradients:
                undo.enter_context(_frozen(self._model))
            output: Any = self._model(
                input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=True
            )
            caught = {} if steerer is None else dict(steerer.caught)
        self._cost.num_passes += 1
        self._cost.num_tokens += ids.shape[1]
        self._cost.layer_passes += self._facts.num_layers
        self._cost.num_assignments += ids.shape[1] * sum(layer.top_k for layer in self._facts.layers)
        known = {layer.index for layer in self._facts.layers}
        kept = {index: found for index, found in caught.items() if index in known}
        return Ran(
            logits=output.logits[0].float(),
            hidden=output.hidden_states[-1][0].float(),
            layers=tuple(states[0] for states in output.hidden_states[1:-1]),
            probabilities={index: routing.scores for index, (routing, _, _) in kept.items()},
            chosen={index: ids.reshape(-1, ids.shape[-1]) for index, (_, _, ids) in kept.items()},
            weights={index: w.reshape(-1, w.shape[-1]) for index, (_, w, _) in kept.items()},
        )


def head_of(model: Any) -> Head:
    """From what a layer returned to logits: the decoder's last norm, then the output layer or rows of it.

    Raises:
        UnsupportedModelError: the model keeps these under other names.
    """
    norm = getattr(model.get_decoder(), "norm", None)
    output = model.get_output_embeddings()
    if norm is None or output is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no norm before an output layer that layers could leave to; choose "
            "another decoder"
        )

    def read(hidden: Tensor, tokens: Tensor | None) -> Tensor:
        states = norm(hidden.reshape(1, -1, hidden.shape[-1]))[0]
        made = output(states) if tokens is None else states @ output.weight[tokens].T
        as_float: Tensor = made.float()
        return as_float.view(*hidden.shape[:-1], -1)

    return read


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No gradient is computed for the model's own parameters."""
    trained = [one for one in model.parameters() if one.requires_grad]
    for one in trained:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in trained:
            one.requires_grad_(True)


def save_calibration(made: Calibration, path: Path) -> None:
    """Write it as one safetensors file, its values in the header.

    Raises:
        UserError: a value of it is no number, or it cannot be written there.
    """
    for name, tensor in made.tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise _not_finite(made.method, name)
    header = {"method": made.method, "mark": made.mark, "values": made.values}
    tensors = {name: tensor.contiguous() for name, tensor in made.tensors.items()}
    tensors = tensors or {"none": torch.zeros(1)}
    aside = path.with_name(path.name + ".part")
    try:
        text = json.dumps(header, allow_nan=False)
    except ValueError:
        raise _not_finite(made.method, "its values") from None
    save_tensors(tensors, aside, {_HEADER: text})
    aside.replace(path)


def _not_finite(method: str, what: str) -> UserError:
    return UserError(
        f"the calibration of {method} became NaN or infinite ({what}); the model is damaged, or its dtype "
        "cannot hold its activations: download it again or load it in float32"
    )


def load_calibration(path: Path, method: str, facts: ModelFacts) -> Calibration:
    """Read what `save_calibration` wrote.

    Raises:
        CheckpointError: there is no such file, or it is damaged or no calibration.
        UserError: it was made for another method or another model.
    """
    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        made = Calibration(
            method=header["method"], mark=header["mark"], values=header["values"], tensors=tensors
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no calibration that can be read ({error}); make it by 'mixtura calibrate {method}'"
        ) from None
    if made.method != method:
        raise UserError(f"{path} was made for {made.method}, not for {method}; make one for {method}")
    if made.mark != facts.mark:
        raise UserError(
            f"{path} was made for another model, whose sizes or routers differ; make one for this model by "
            f"'mixtura calibrate {method}'"
        )
    return made

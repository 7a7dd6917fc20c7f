"""A model at hand, run again for analyses: as it is, or steered by the seats that decoders use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.checkpoints.view import LayerView, MemoryView
from mixtura.checkpoints.viewing.wrappers import plain_model, submodule
from mixtura.data.tokens import TokenBatch
from mixtura.errors import UserError
from mixtura.methods.analyses import Passage, Read
from mixtura.methods.decoders import LayerFacts, ModelFacts, View
from mixtura.rerouting.core import Rerouting
from mixtura.running.decoders.facts import facts_of, steered
from mixtura.running.decoders.steering import Steerer, stacked
from mixtura.running.observing.catching import Caught, catching
from mixtura.types.steering import Steering


@contextmanager
def studying(
    model: PreTrainedModel, tokens: TokenBatch, tokenizer: Any = None, *, steers: bool = False
) -> Iterator[ModelStudy]:
    """A model and the text it is studied on; afterwards the model is exactly as it was.

    Args:
        model: in memory.
        tokens: the text; padding may be on any side.
        tokenizer: the model's, to show tokens as text; without it their numbers are shown.
        steers: whether it may be run routed otherwise.

    Raises:
        UnsupportedModelError: it is to be steered, and dense or of a family that mixtura cannot steer.
    """
    was_there = isinstance(vars(plain_model(model)).get("mixtura_rerouting"), Rerouting)
    modes = [(module, module.training) for module in model.modules()]
    found = steered(model) if steers else None
    steerer = None if found is None else Steerer(found)
    model.eval()
    try:
        yield ModelStudy(model, _passages(tokens), tokenizer, facts_of(model, found), steerer)
    finally:
        for module, mode in modes:
            module.training = mode
        if steerer is not None:
            steerer.remove()
        if found is not None and not was_there:
            found.restore()


def _passages(tokens: TokenBatch) -> tuple[Passage, ...]:
    rows = zip(tokens.input_ids, tokens.attention_mask.bool(), tokens.domains.tolist(), strict=True)
    made = (
        Passage(token_ids=tuple(ids[mask].tolist()), domain=tokens.domain_names[domain])
        for ids, mask, domain in rows
    )
    return tuple(one for one in made if one.token_ids)


@final
class ModelStudy:
    """What analyses run a model by; see `mixtura.methods.analyses.Study`. Made by `studying`."""

    def __init__(
        self,
        model: PreTrainedModel,
        passages: tuple[Passage, ...],
        tokenizer: Any,
        facts: ModelFacts,
        steerer: Steerer | None,
    ) -> None:
        self.passages = passages
        self._model = model
        self._tokenizer = tokenizer
        self._facts = facts
        self._steerer = steerer
        self._inside = plain_model(model)
        self._views = {layer.index: layer for layer in MemoryView(model).layers}

    @property
    def layers(self) -> tuple[LayerFacts, ...]:
        """Layers with experts; those that can be steered, where the study steers."""
        if self._steerer is not None:
            return self._facts.layers
        return tuple(
            LayerFacts(index=i, num_experts=one.num_experts, top_k=one.top_k, scoring=one.scoring)
            for i, one in self._views.items()
        )

    def words(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Each token as text; its number where no tokenizer is known."""
        if self._tokenizer is None:
            return tuple(map(str, token_ids))
        return tuple(str(self._tokenizer.decode([one])) for one in token_ids)

    def run(
        self,
        rows: Sequence[Sequence[int]],
        *,
        steering: Sequence[Mapping[int, Steering]] = (),
        last_only: bool = False,
        training: bool = False,
        scores: bool = False,
    ) -> tuple[Read, ...]:
        """Read rows of equally many tokens, all in one pass."""
        if len({len(row) for row in rows}) != 1:
            raise ValueError("rows of a pass must have equally many tokens")
        ids = torch.tensor([list(row) for row in rows], device=self._model.device)
        seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        with ExitStack() as stack:
            caught = self._watch(stack, seen, scores)
            if training:
                self._train(stack)
            if steering:
                self._steer(stack, steering, ids.shape[1], last_only)
            # A pass without gradients is none of training, whatever the modules' mode.
            with torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(training):
                output: Any = self._model(input_ids=ids, use_cache=False, return_dict=True)
        made = output.logits.detach()
        logits = {index: one.logits.detach() for index, one in caught.items() if one.logits is not None}
        return tuple(_read(place, len(rows), made[place], seen, logits) for place in range(len(rows)))

    def matrices(self, index: int, expert: int) -> Mapping[str, Float[Tensor, "F D"]]:
        """An expert's matrices, one row a neuron."""
        found = self._layer(index).expert(expert).tensors()
        return {
            name: (one.T if name == "down" else one).float()
            for name, one in found.items()
            if name in ("gate", "up", "down")
        }

    def router(self, index: int) -> Float[Tensor, "E D"]:
        """The rows of a layer's router."""
        return self._layer(index).router_weight().detach().float()

    @torch.no_grad()
    def outputs(self, index: int, inputs: Float[Tensor, "T D"]) -> Float[Tensor, "E T D"]:
        """What every expert of a layer makes of every row, not weighted."""
        layer = self._layer(index)
        experts: Any = submodule(self._inside, layer.name)
        ones = torch.ones(len(inputs), 1, dtype=inputs.dtype, device=inputs.device)
        chosen = torch.zeros(len(inputs), 1, dtype=torch.int64, device=inputs.device)
        made = [experts(inputs, chosen + expert, ones).float() for expert in range(layer.num_experts)]
        return torch.stack(made)

    def _train(self, stack: ExitStack) -> None:
        """Put the model into training for a pass; what it draws is the same in every such pass."""
        stack.callback(self._model.eval)
        self._model.train()
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)
        rerouting = vars(self._inside).get("mixtura_rerouting")
        if isinstance(rerouting, Rerouting):
            # Routers draw by the number of the pass.
            stack.callback(setattr, rerouting.passes, "number", rerouting.passes.number)
            rerouting.passes.number = 0

    def _layer(self, index: int) -> LayerView:
        if index not in self._views:
            raise UserError(f"layer {index} has no experts; the MoE layers are {sorted(self._views)}")
        return self._views[index]

    def _watch(
        self, stack: ExitStack, seen: dict[int, tuple[Tensor, Tensor, Tensor]], scores: bool
    ) -> dict[int, Caught]:
        """Keep what each experts module is given in the pass, and its router's logits where asked."""

        def keep(index: int) -> Callable[[Any, tuple[Any, ...]], None]:
            def hook(_: Any, given: tuple[Any, ...]) -> None:
                hidden, chosen, weights, *_ = given
                seen[index] = (hidden.detach(), chosen.detach(), weights.detach())

            return hook

        for index, layer in self._views.items():
            module = submodule(self._inside, layer.name)
            stack.callback(module.register_forward_pre_hook(keep(index)).remove)
        if not scores:
            return {}
        return {
            index: stack.enter_context(catching(self._inside, layer, {"logits"}))
            for index, layer in self._views.items()
        }

    def _steer(
        self, stack: ExitStack, steering: Sequence[Mapping[int, Steering]], columns: int, last_only: bool
    ) -> None:
        if self._steerer is None:
            raise UserError("this analysis steers; its file must say so by the tag 'steers'")
        views = [View(dict(one), since="last" if last_only else "prompt") for one in steering]
        stack.callback(setattr, self._steerer, "current", {})
        self._steerer.current = stacked(self._facts, views, columns, prefill=True, last=True)


def _read(
    place: int,
    num_rows: int,
    logits: Tensor,
    seen: Mapping[int, tuple[Tensor, Tensor, Tensor]],
    scores: Mapping[int, Tensor],
) -> Read:
    """The part of a pass that is one row's."""

    def part(whole: Tensor) -> Tensor:
        return whole.view(num_rows, -1, whole.shape[-1])[place]

    return Read(
        logits=logits.float(),
        inputs={index: part(one) for index, (one, _, _) in seen.items()},
        chosen={index: part(one).long().cpu() for index, (_, one, _) in seen.items()},
        weights={index: part(one).float().cpu() for index, (_, _, one) in seen.items()},
        scores={index: part(one).float().cpu() for index, one in scores.items()},
    )

"""Balanced experts in ordinary fine-tuning: with a `Trainer`, with adapters, or in a loop of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback

from mixtura.checkpoints.viewing.wrappers import is_elsewhere
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.methods import create, declared_tags
from mixtura.methods.balancers import Balancer
from mixtura.modeling.balance import Counts, LayerBalance, mean_of_parts
from mixtura.rerouting.arguments import Labels, num_labels
from mixtura.rerouting.core import Rerouting
from mixtura.rerouting.experts import experts_of
from mixtura.rerouting.passes import Pass
from mixtura.rerouting.saving import begin_saving
from mixtura.rerouting.seats import Seat
from mixtura.rerouting.states import balance_of, begin, biases, require_each_suited
from mixtura.types import BalancerInput, Routing

Named = str | tuple[str, dict[str, Any]]


def balance(
    model: nn.Module, balancers: Named | Sequence[Named], /, *, seed: int = 0, **settings: Any
) -> Balance:
    """Keep the experts of an ordinary transformers MoE model about equally busy while it is fine-tuned.

    Losses are taken layer by layer, over tokens that are not padding, and added to the model's own loss
    in every training pass. Biases of balancers such as ``loss_free`` move once an optimizer step, by the
    assignments of all its micro-batches and processes: the family's own ``e_score_correction_bias`` (or
    what it calls it) where it has one, else a bias that is added to the scores when experts are chosen,
    which `load_router` needs to find the same experts again.

    With a `Trainer`, pass ``callbacks=[made.callback]``; in a loop of your own call ``made.end_step()``
    after ``optimizer.step()`` and before the gradients are cleared. Call `balance` before wrapping the
    model for several processes; a model with PEFT adapters is given as `get_peft_model` made it. Losses
    over the counts of the whole batch see those of this step's micro-batches so far, as the global-batch
    loss is published; `Balance.counting`, or `Balance.count_first` with a `Trainer`, makes them exact.
    Where a loss is used that is not the model's own (label smoothing, ``compute_loss_func``, one on the
    states of the decoder), add `Balance.loss` to it; a step whose balancing loss nobody took is warned of.
    A `Trainer` that resumes, or that loads its best checkpoint at the end, gets that checkpoint's states.
    Leave the family's own ``output_router_logits`` off in training: it adds the loss of transformers, which
    pools all layers.

    Args:
        model: of any family that `mixtura.open_model` knows.
        balancers: the name of one, or several, each a name or a pair of name and settings.
        seed: of balancers that draw.
        **settings: those of a single balancer.

    Raises:
        UnsupportedModelError: the model is dense or of a family that mixtura cannot work on.
        UnknownNameError: there is no such balancer.
        SettingError: a setting is unknown or out of range.
        UserError: the model is balanced already, or a balancer is made for another router.
    """
    named = [balancers] if isinstance(balancers, str | tuple) else list(balancers)
    pairs = [(one, settings) if isinstance(one, str) else one for one in named]
    rerouting = Rerouting.of(model)
    if rerouting.balancers:
        raise UserError(
            "the model is balanced already; give all balancers at once, or restore the model first"
        )
    made = Balance(rerouting, [create("balancers", name, **given) for name, given in pairs], seed)
    rerouting.balancers = [(name, dict(given)) for name, given in pairs]
    rerouting.listeners.append(made)
    begin_saving(rerouting)
    return made


@final
class Balance:
    """The balancers of a model in training. Made by `balance`."""

    def __init__(self, rerouting: Rerouting, balancers: Sequence[Balancer], seed: int) -> None:
        self.rerouting = rerouting
        self.balancers = tuple(balancers)
        self.seed = seed
        self._averaged = [
            place
            for place, one in enumerate(self.balancers)
            if "whole_batch" in declared_tags(type(one)) and type(one).update is not Balancer.update
        ]
        seats = [s for s in rerouting.seats.values() if s.router is not None or not s.layer.hash_routed]
        for seat in seats:
            require_each_suited(self.balancers, [seat], None if seat.router is None else type(seat.router))
        for seat in seats:
            begin(seat, self.balancers)
        self._counting = False
        self._version = 0
        self._whole: Counts | None = None
        self._global: Counts | None = None
        self._here: Counts | None = None
        self._parts: list[dict[int, Routing]] = []
        self._ids: list[Tensor | None] = []
        self._labels = Labels()

    @property
    def _seats(self) -> dict[int, Seat]:
        """The layers that are balanced: not those that a table of token ids decides in."""
        return {index: seat for index, seat in self.rerouting.seats.items() if seat.balance is not None}

    @property
    def callback(self) -> TrainerCallback:
        """For ``Trainer(callbacks=[...])``."""
        return self.rerouting.callback

    @property
    def loss(self) -> Float[Tensor, ""] | None:
        """What the last training pass added to the model's loss; add it yourself where there was none."""
        return self.rerouting.loss

    def biases(self) -> dict[int, Float[Tensor, " E"]]:
        """By decoder layer, the bias that is added to scores when experts are chosen."""
        found = {index: balance_of(seat).bias for index, seat in self._seats.items()}
        return {index: bias for index, bias in found.items() if bias is not None}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Passes in here only count: run a step's micro-batches in it first, then train on them.

        The losses of the step then see the counts of its whole batch from the first micro-batch on, at
        the cost of one more forward pass. Works with dropout only as far as that does not change routing.
        """
        self._counting, self._whole, self._labels = True, None, Labels()
        try:
            with torch.no_grad():
                yield
        finally:
            self._counting = False
        if self._whole is not None:
            self._whole = self._whole.over_processes()
            self._labels = self._labels.over_processes()

    def count_first(self, trainer: Any) -> None:
        """Let a `Trainer` run each step's micro-batches in `counting` before it trains on them."""
        plain = trainer.get_batch_samples

        def counted(*args: Any, **kwargs: Any) -> Any:
            batches, num_items = plain(*args, **kwargs)
            self.rerouting.model.train()
            with self.counting():
                for batch in batches:
                    inputs = trainer._prepare_inputs(batch)
                    self._labels = self._labels.plus(num_labels(self.rerouting.model, inputs))
                    self.rerouting.model(**{k: v for k, v in inputs.items() if k != "labels"})
            return batches, num_items

        trainer.get_batch_samples = counted

    def before(self, here: Pass) -> None:
        """A pass begins."""
        if here.training:
            self._warn_of_missing_end()
        if self._counting:
            self._labels = self._labels.plus(here.num_labels)
        here.training = here.training or self._counting
        here.collecting = here.collecting or here.training

    def _warn_of_missing_end(self) -> None:
        """Counts of several steps would be taken for those of one."""
        version = sum(p._version for p in self.rerouting.model.parameters() if p.requires_grad)
        if self._here is not None and version != self._version:
            warnings.warn(
                "the model was trained without telling its balancers that a step was over; give the Trainer "
                "callbacks=[balance.callback], or call balance.end_step() after optimizer.step()",
                stacklevel=2,
            )
        self._version = version

    def after(self, here: Pass, routings: Mapping[int, Routing]) -> Float[Tensor, ""] | None:
        """A pass is over; the balancers' losses on it."""
        known = {index: routing for index, routing in routings.items() if index in self._seats}
        if not known:
            return None
        counts = self._counts(known)
        if self._counting:
            self._whole = counts if self._whole is None else self._whole.plus(counts)
            return None
        if not here.training:
            return None
        ids = here.sequence_ids
        self._note(counts, known, ids)
        if all(type(one).loss is Balancer.loss for one in self.balancers):
            return None
        seen = self._whole
        if seen is None:
            self._global = _sum(self._global, counts.over_processes())
            seen = self._global
        found = [
            balance_of(self._seats[index]).loss(
                lambda which, p=place, i=index, r=routing: self._inputs(which, p, i, r, seen, ids)  # type: ignore[misc]
            )
            for place, index in enumerate(self._seats)
            if (routing := known.get(index)) is not None
        ]
        total = torch.stack([loss for loss in found if loss is not None]).sum()
        if here.share is None:
            return total
        if self._whole is not None:
            return total * (counts.num_tokens / max(self._whole.num_tokens, 1)) * self._labels.scale(here)
        return total * here.share

    def _counts(self, known: Mapping[int, Routing]) -> Counts:
        """What was asked for in one pass; nothing of layers that had no tokens in it."""
        seen = Counts.of(list(known.values()))
        loads = dict(zip(known, seen.loads, strict=True))
        device = seen.loads[0].device
        every = (
            loads.get(index, torch.zeros(seat.layer.num_experts, dtype=torch.float64, device=device))
            for index, seat in self._seats.items()
        )
        return Counts(tuple(every), seen.num_tokens)

    def _note(self, counts: Counts, known: Mapping[int, Routing], ids: Tensor | None) -> None:
        """Keep what the update at the end of the step needs of this micro-batch."""
        self._here = _sum(self._here, counts)
        updates = any(type(one).update is not Balancer.update for one in self.balancers)
        if updates:
            if not self._averaged:
                self._parts.clear()
                self._ids.clear()
            self._parts.append({index: detached(routing) for index, routing in known.items()})
            self._ids.append(ids)

    def end_step(self) -> None:
        """An optimizer step is done and its gradients are still there; for loops without `callback`.

        Updates the balancers' states. Every process that trains together calls it.
        """
        self.rerouting.end_step()

    def finish_step(self) -> None:
        """Update the balancers' states, as `end_step` and `callback` ask for."""
        outside, self.rerouting.passes.num_outside = self.rerouting.passes.num_outside, 0
        if outside:
            warnings.warn(
                f"routers ran {outside} times in training outside of a forward pass of the model or its "
                "decoder, where they are not balanced; call the model, or the decoder in it",
                stacklevel=2,
            )
        if self._here is not None and self._parts:
            whole = self._global if self._global is not None else self._here.over_processes()
            for place, index in enumerate(self._seats):
                self._update(place, index, whole)
        self._keep_gradients()
        self._whole = self._global = self._here = None
        self._parts.clear()
        self._ids.clear()

    @torch.no_grad()
    def _update(self, place: int, index: int, whole: Counts) -> None:
        seat = self._seats[index]
        # In whatever dtype the model was moved to meanwhile: small steps would vanish in bfloat16.
        own = balance_of(seat).float()
        self._read_correction(seat, own)
        for which, balancer in enumerate(self.balancers):
            pairs = [(p, ids) for p, ids in zip(self._parts, self._ids, strict=True) if index in p]
            if not pairs:
                continue
            if which not in self._averaged:
                pairs = pairs[-1:]
            states = [
                balancer.update(self._inputs(which, place, index, part[index], whole, ids))
                for part, ids in pairs
            ]
            for name, held in own.state(which).items():
                if not isinstance(held, nn.Parameter):
                    values = [state[name] for state in states]
                    held.copy_(mean_of_parts(values) if which in self._averaged else values[0])
        if own.bias is not None and seat.router is None and seat.layer.site.correction_bias is not None:
            seat.layer.set_correction_bias(own.bias)

    def _read_correction(self, seat: Seat, own: LayerBalance) -> None:
        """Go on from the family's own bias where something else has set it, such as a checkpoint."""
        held = seat.layer.correction_bias()
        biased = biases(own)
        if held is None or own.bias is None or seat.router is not None:
            return
        if not torch.equal(own.bias.to(held), held):
            biased[0].add_(held.to(own.bias) - own.bias)

    def _keep_gradients(self) -> None:
        for seat in self._seats.values():
            own = balance_of(seat)
            if own.keeps_gradients:
                own.keep_gradients(experts_of(seat.layer).gate_up)

    def _inputs(
        self, which: int, place: int, index: int, routing: Routing, counts: Counts, ids: Tensor | None
    ) -> BalancerInput:
        seat = self._seats[index]
        own = balance_of(seat)
        tags = declared_tags(type(self.balancers[which]))
        step = self.rerouting.clock.step
        optional: dict[str, Any] = {"step": step, "sequence_ids": ids}
        if "reads:generator" in tags:
            mixed = hash((self.seed, step, place, which)) % (1 << 62)
            optional["generator"] = torch.Generator().manual_seed(mixed)
        if "reads:experts" in tags:
            optional["experts"] = experts_of(seat.layer)
        if "reads:router_weight" in tags:
            optional["router_weight"] = _rows(seat)
        if own.gradients is not None:
            optional["gradients"] = own.gradients
        asked = {name: value for name, value in optional.items() if f"reads:{name}" in tags}
        return BalancerInput(
            routing=routing,
            load=counts.loads[place],
            loads=counts.table,
            num_tokens=counts.num_tokens,
            state=own.state(which),
            **asked,
        )


def _rows(seat: Seat) -> Float[Tensor, "E D"]:
    """The rows that a router decides by, as a loss over a whole pass reads them.

    Raises:
        UnsupportedModelError: they are there for the router's own forward only.
    """
    if is_elsewhere(seat.matrix):
        raise UnsupportedModelError(
            f"the router of layer {seat.layer.index} is offloaded or sharded, so that a balancer cannot read "
            "its rows; choose one without the tag reads:router_weight"
        )
    return seat.matrix[: seat.layer.num_experts]


def _sum(first: Counts | None, second: Counts) -> Counts:
    return second if first is None else first.plus(second)


def detached(routing: Routing) -> Routing:
    """A routing without its graph, to be looked at later."""
    return Routing.from_assignments(
        routing.token_ids,
        routing.expert_ids,
        routing.weights.detach(),
        scores=routing.scores.detach(),
        logits=routing.logits.detach(),
        valid=routing.valid,
    )

"""mixtura's own format: each routed expert at a width of its own or dropped, the rest in 8 bits or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.applying.card import MeasuredLoss
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.packed import is_packed
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.fitting.budget import Allowance, allowance
from mixtura.fitting.candidates import choice_bytes
from mixtura.fitting.depth import Depth, Work, choose_depth, keeps_rounded, options_near, shortened
from mixtura.fitting.forms.base import Form, Told, Tools
from mixtura.fitting.observing import forget_prices, observed
from mixtura.fitting.pace import measure_pace
from mixtura.fitting.palette import DROP, KEEP, OPTIONS, STORED, option_of
from mixtura.fitting.pricing import uniform_bytes
from mixtura.fitting.quality import ALL
from mixtura.fitting.records import Candidate, Observed, Parts, Quality, Request
from mixtura.fitting.rest import Rest
from mixtura.fitting.rounding import Rounder, rounder_for
from mixtura.fitting.texts import Texts
from mixtura.fitting.verifying import Verified, verify
from mixtura.kernels import ExpertTensors
from mixtura.running.stream import Streamed
from mixtura.types import Action, Drop, Plan

_DEPTH = "depth"
_LEAST_OPTIONS = 2


@final
class ExpertsForm(Form):
    """Routed experts in mixtura's widths, written as a directory."""

    def __init__(self, request: Request, view: CheckpointView) -> None:
        super().__init__(request, view)
        self._allowed: Allowance | None = None
        self._rounder: Rounder | None = None
        self._depth = Depth()
        # Candidates share most of their experts, and rounding them takes a third of a measurement.
        self._rounded: dict[tuple[int, int, int], ExpertTensors] = {}
        self._keeps_rounded = keeps_rounded(view)

    def allowance(self) -> Allowance:
        """See `Form.allowance`."""
        if self._allowed is None:
            self._allowed = allowance(self.request, self.view)
        return self._allowed

    @property
    def rounder(self) -> Rounder:
        """Makes experts in fewer bits, and keeps them."""
        assert self._rounder is not None
        return self._rounder

    def begin(self, tools: Tools) -> None:
        """See `Form.begin`."""
        super().begin(tools)
        self._rounder = rounder_for(self.view, tools.journal)

    def in_time(self, texts: Texts) -> Texts:
        """As much text, and as many experts priced, as the time allows on this machine.

        A fit that goes on measures as it began: numbers of other text are no numbers to compare with.
        """
        tools = self.tools
        known = tools.journal.notes().get(_DEPTH)
        near = options_near(uniform_bytes(self.view), self.allowance().most_expert_bytes)
        if known is None:
            tools.notify("timing a layer of this model on this machine")
            work = Work(self.view, measure_pace(self.view))
            known = asdict(choose_depth(work, texts, tools.clock.left_s, near))
            tools.journal.note(_DEPTH, known)
        depth = Depth(**{**known, "options": None if known["options"] is None else tuple(known["options"])})
        if near[0] not in depth.stored:
            # Begun for another budget; the text stays, and so do the codes and numbers there are.
            options = tuple(sorted({*depth.stored, *near[:_LEAST_OPTIONS]}))
            depth = replace(depth, options=options)
            tools.journal.note(_DEPTH, asdict(depth))
            forget_prices(tools.journal)
        if not depth.is_full:
            texts = shortened(texts, depth)
            self.notes.append(f"to keep the time, {depth.told}; a longer --time measures more")
            tools.notify(f"{self.notes[-1]}, once {tools.journal.directory} is removed")
        self._depth = depth
        return texts

    def observed(self, texts: Texts) -> Observed:
        """See `Form.observed`."""
        tools = self.tools
        seen = observed(
            self.view,
            texts,
            self._depth,
            tools.journal,
            self.rounder,
            clock=tools.clock,
            notify=tools.notify,
        )
        if seen.num_unseen_layers:
            self.notes.append(
                f"the time for observing was over before {seen.num_unseen_layers} of "
                f"{len(self.view.layers)} layers were reached; their experts are priced like the others on "
                f"average"
            )
        self.price_with(seen.prices)
        return seen

    def original(self) -> Streamed:
        """See `Form.original`."""
        return Streamed(self.view)

    def streamed(self, candidate: Candidate) -> Streamed:
        """The candidate, from the original's files: experts are rounded when they are first read."""
        parts = self.prices.parts
        options = {
            (int(layer), int(number)): option
            for layer, number, option in zip(parts.layers, parts.numbers, candidate.choice, strict=True)
        }

        ways: dict[int, dict[int, tuple[int, ...]]] = {}
        dropped: dict[int, list[int]] = {}
        for (layer, number), option in options.items():
            if option == DROP:
                dropped.setdefault(layer, []).append(number)
            elif option != KEEP:
                ways.setdefault(layer, {})[number] = (option,)

        def instead(layer: int, expert: int, dtype: torch.dtype) -> ExpertTensors | None:
            option = options[layer, expert]
            if option in (KEEP, DROP):
                return None
            # All of a layer at once, side by side, when the first of them is asked for.
            self.rounder.ensure(layer, ways.pop(layer, {}))
            return self._expert(layer, expert, option, dtype)

        changed = self._rest.changed if candidate.packs_rest else None
        return Streamed(self.view, instead, dropped=dropped, changed=changed)

    def _expert(self, layer: int, expert: int, option: int, dtype: torch.dtype) -> ExpertTensors:
        known = self._rounded.get((layer, expert, option))
        if known is None:
            known = self.rounder.decoded(layer, expert, option, dtype)
            if self._keeps_rounded:
                self._rounded[layer, expert, option] = known
        return known

    @property
    def _rest(self) -> Rest:
        return self.allowance().rest

    def _saved_bytes(self, candidate: Candidate) -> int:
        return self._rest.saved_bytes if candidate.packs_rest else 0

    def account_bytes(self, candidate: Candidate) -> int:
        """See `Form.account_bytes`."""
        fixed = self.allowance().fixed_bytes - self._saved_bytes(candidate)
        return fixed + choice_bytes(self.prices, candidate.choice)

    def weights_bytes(self, candidate: Candidate) -> int:
        """See `Form.weights_bytes`."""
        account = self.allowance().account
        rest = account.weights_bytes - account.expert_bytes - self._saved_bytes(candidate)
        return rest + choice_bytes(self.prices, candidate.choice)

    def active_bytes(self, candidate: Candidate) -> float:
        """Dense weights, and each layer's experts by their load."""
        chosen, prices = np.asarray(candidate.choice), self.prices
        sizes = prices.num_bytes[np.arange(len(chosen)), chosen]
        total = self.allowance().dense_active_bytes
        total -= self._rest.saved_active_bytes if candidate.packs_rest else 0.0
        for layer, top_k in prices.parts.top_k.items():
            here = prices.parts.of_layer(layer) & (chosen != DROP)
            load: Float[ndarray, " M"] = prices.load[here].astype(float) + 1e-9
            total += top_k * float((sizes[here] * load).sum() / load.sum())
        return total

    def write(self, candidate: Candidate, directory: Path, quality: Quality | None) -> None:
        """See `Form.write`."""
        plan = self._plan(candidate)
        by_layer: dict[int, dict[int, tuple[int, ...]]] = {}
        for (layer, expert), action in plan.quantized().items():
            by_layer.setdefault(layer, {})[expert] = (option_of(action),)
        for layer, wanted in by_layer.items():
            self.rounder.ensure(layer, wanted)
        apply_plan(
            plan,
            self.view.path,
            directory,
            measured=None if quality is None else loss_of(quality),
            rounded=self.rounder.kept,
            source_name=self.request.name or None,
            name=self.request.out.name,
        )

    def _plan(self, candidate: Candidate) -> Plan:
        return plan_of(candidate, self.prices.parts, self._rest, checkpoint_digest(self.view.path))

    def verify(
        self, directory: Path, name: str, key: str, *, context: int, needed_bytes: int = 0
    ) -> Verified:
        """See `Form.verify`."""
        tools = self.tools
        return verify(
            directory, context, tools.journal, name, tools.notify, key=key, needed_bytes=needed_bytes
        )

    def told(self, candidate: Candidate, directory: Path) -> Told:
        """See `Form.told`."""
        plan = self._plan(candidate)
        return Told(
            plan,
            _choice_map(self.prices.parts, candidate),
            _untouched(self.view, plan),
            _commands(directory, self.request.out),
        )


def plan_of(candidate: Candidate, parts: Parts, rest: Rest, source_digest: str) -> Plan:
    """The plan that makes a candidate."""
    chosen = np.asarray(candidate.choice)
    actions: list[Action] = []
    for layer in dict.fromkeys(parts.layers.tolist()):
        gone = parts.numbers[(chosen == DROP) & parts.of_layer(layer)]
        if len(gone):
            actions.append(Drop(int(layer), tuple(int(e) for e in gone)))
    for layer, number, option in zip(parts.layers, parts.numbers, chosen, strict=True):
        if KEEP < option < DROP:
            actions.append(STORED[int(option)].action(int(layer), int(number)))
    if candidate.packs_rest:
        actions.extend(rest.actions)
    return Plan(source_digest, tuple(actions))


def loss_of(quality: Quality) -> MeasuredLoss:
    """What the model card says was lost."""
    return MeasuredLoss(
        kl=quality.kl,
        kl_interval=(quality.kl_low, quality.kl_high),
        same_token=quality.equal_top,
        perplexity=quality.perplexity[ALL],
        num_tokens=quality.num_tokens,
        text="held-out text",
        chose=True,
        details="`measured.json` has all of it, with how it was measured; `report.html` shows it.",
    )


def _choice_map(parts: Parts, candidate: Candidate) -> dict[str, tuple[str, ...]]:
    options = np.asarray(candidate.choice)
    layers = dict.fromkeys(parts.layers.tolist())
    return {
        str(layer): tuple(OPTIONS[option] for option in options[parts.of_layer(layer)]) for layer in layers
    }


def _untouched(view: CheckpointView, plan: Plan) -> tuple[str, ...]:
    """Tensors that stay as they are; routers lose rows only where experts are dropped."""
    experts = {
        name
        for layer in view.layers
        for e in range(layer.num_experts)
        for name in layer.expert_tensor_names(e)
    }
    return tuple(name for name in view.tensor_names if name not in experts | plan.matrices().keys())


def _commands(written: Path, out: Path) -> Mapping[str, str]:
    """Where the result runs: in mixtura, and elsewhere only where it is an ordinary checkpoint."""
    found = {"mixtura": f'mixtura generate {out} "..."'}
    if not is_packed(written):
        found |= {"vLLM": f"vllm serve {out}", "llama.cpp": f"mixtura export {out} --out {out}.gguf"}
    return found

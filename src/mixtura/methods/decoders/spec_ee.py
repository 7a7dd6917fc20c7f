"""Leaving the model early where a few likely tokens are decided already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.methods.decoders import Branch, Candidate, Decoder, Head, ModelFacts, Probe, Prompt, Sample
from mixtura.methods.decoders._exits import features, predict, successors_of, trained_predictor

METHOD = {
    "paper": 217,
    "title": "SpecEE: Accelerating Large Language Model Inference with Speculative Early Exiting",
    "tags": ["exits", "needs:calibration"],
}
_RECENT = 5


@final
class SpecEe(Decoder):
    """Speculative early exit: leave after a layer at which one of a few drafted tokens is decided.

    Drafts are the tokens that followed the last one most often in calibration. After a layer that is tested,
    logits of the drafts, their shares, and how these changed since the layer tested before go into a small
    trained predictor; above ``threshold`` the whole vocabulary is looked at, and the model is left if its
    likeliest token is a draft. Tested are the layers where calibration could leave most often, and those
    about the last exits.

    Shapes:
        Hidden states [D] to whether to leave.

    Raises:
        SettingError: a setting is out of range.
        UserError: the calibration is of another model, or its texts are too short.

    Cost:
        One forward pass a token, of one row, through the layers up to the exit: weights of the others,
        experts among them, are not read. A test reads ``drafts`` rows of the output layer, an exit all of it
        once more. Several prompts are decoded one after another.

    Example:
        >>> from mixtura.methods.decoders._exits import features
        >>> import torch
        >>> features(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 0.5]])).tolist()
        [[0.0, 0.0, 0.5, 0.5, 0.0, 0.0]]

    Differences from the paper:
        Drafts come from pairs of tokens in calibration text, where the paper asks a draft model; layers above
        an exit get the keys and values of the layer that was left, where its code leaves their caches
        shorter. Predictors are of 32 hidden units and trained on all positions of the calibration texts, with
        changes since the layer before. The likeliest token is compared at the exit, so that sampling is from
        what that layer says. Layers about the last exits are tested from the first exit on, and a token that
        passes all layers is no exit; its code waits for five tokens, and counts such a one as the last layer.

    Reference:
        SpecEE: Accelerating Large Language Model Inference with Speculative Early Exiting (paper 217); its
        code, MathsCode/ISCA25-SpecEE at 535c411, ``AutoEE/Pure/model_llama_ee.py``.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"threshold": 1.1}

    def __init__(self, *, threshold: float = 0.5, drafts: int = 4, tested: float = 0.5) -> None:
        check_range("SpecEe", "threshold", threshold, 0, 1.1)
        check_range("SpecEe", "drafts", drafts, 1, 64)
        check_range("SpecEe", "tested", tested, 0, 1)
        self.threshold = threshold
        self.drafts = drafts
        self.tested = tested

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        found = prompt.made_for_it("spec_ee")
        return (Branch(state=_State(found.tensors, frozenset(found.values["layers"]))),)

    def leave(self, layer: int, hidden: Float[Tensor, " D"], head: Head, candidate: Candidate) -> bool:
        state: _State = candidate.branch.state
        if layer == 0:
            state.before = None
        about = {exit_at + step for exit_at in state.exits for step in (-2, 0, 2)}
        weights = state.tensors
        if self.threshold > 1 or layer >= len(weights["first"]) or layer not in state.layers | about:
            return False
        drafts = weights["successors"][candidate.token_ids[-1]].long()
        logits = head(hidden, drafts)[None].cpu()
        before = torch.zeros_like(logits) if state.before is None else state.before
        surety = predict(weights, layer, features(logits, before))
        state.before = logits.softmax(-1)
        if float(surety) <= self.threshold or int(head(hidden, None).argmax()) not in drafts.tolist():
            return False
        state.exits = [*state.exits, layer][-_RECENT:]
        return True

    def calibrate(
        self, probe: Probe, samples: Sequence[Sample], facts: ModelFacts
    ) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        if sum(len(one.token_ids) for one in samples) < 16 or facts.num_layers < 2:
            raise UserError("spec_ee needs a model of several layers and texts of 16 tokens and more")
        successors = successors_of(probe, samples, facts.vocabulary, self.drafts)
        rows: list[list[Tensor]] = [[] for _ in range(facts.num_layers - 1)]
        right: list[list[Tensor]] = [[] for _ in range(facts.num_layers - 1)]
        for one in samples:
            ran = probe.run(one.token_ids)
            drafts = successors[torch.tensor(one.token_ids)].long()
            said, before = ran.logits.argmax(-1).cpu(), None
            for layer, hidden in enumerate(ran.layers):
                whole = probe.head(hidden, None).cpu()
                logits = whole.gather(-1, drafts)
                rows[layer].append(features(logits, torch.zeros_like(logits) if before is None else before))
                before = logits.softmax(-1)
                drafted = (drafts == said[:, None]).any(-1)
                right[layer].append((whole.argmax(-1) == said) & drafted)
        trained = [trained_predictor(torch.cat(x), torch.cat(y)) for x, y in zip(rows, right, strict=True)]
        shares = [float(torch.cat(y).float().mean()) for y in right]
        number = max(1, round(self.tested * len(shares)))
        layers = sorted(sorted(range(len(shares)), key=lambda layer: -shares[layer])[:number])
        tensors = {name: torch.stack([one[name] for one in trained]) for name in trained[0]}
        return {"layers": layers, "decided": shares}, tensors | {"successors": successors}


@final
@dataclass(slots=True)
class _State:
    """The predictors, the layers that are always tested, the last exits, and the shares tested last."""

    tensors: Mapping[str, Tensor]
    layers: frozenset[int]
    exits: list[int] = field(default_factory=list)
    before: Tensor | None = None

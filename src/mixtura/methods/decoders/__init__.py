"""Generating text in another way with a model that is already trained.

A decoder decides and one loop of the core (`mixtura.running.decoders`) acts: it runs the model, keeps caches,
draws tokens, stops, and gives the model back as it was. A prompt begins as one or several `Branch`es, texts
that grow side by side; each runs under one or several `View`s, ways to run the model on that same text.

What the hard ones came to:

===================================  =====================================================================
two routings contrasted (8)          a branch of two views, whose logits ``mix`` makes one of
logit vectors learnt on the fly (22) ``prompt.probe`` with gradients; ``revise`` gives new views as text grows
reference samples (37)               a `Calibration` that ``calibrate`` made; a steering since the last token
search over numbers of experts (39)  branches of different ``ranks``; ``choose`` at the ends of steps
thresholds by layer (66)             ``least`` in each layer's steering, from a `Calibration`
early exit (217)                     ``leave``, asked after layers, with the branch's drafts as its state
===================================  =====================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, final, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixtura.errors import UserError
from mixtura.types.steering import Steering

KIND = {
    "base": "Decoder",
    "summary": "Generates text in another way with a model that is already trained.",
    "tags": {
        "steers": "Changes routing, so that the model must be a MoE model whose routers mixtura can steer.",
        "several": "Grows several branches of a prompt side by side, of which one is given out.",
        "searches": "Forks and drops branches while they grow.",
        "needs:verifier": "Needs something that scores texts; `--verifier` names it.",
        "may_use:verifier": "Chooses by a verifier where one is given.",
        "needs:calibration": "Needs a file that `mixtura calibrate` makes with the model it is for.",
        "needs:models": "Needs further models of the same vocabulary.",
        "reads:confidence": "Reads the probabilities of the tokens that were drawn.",
        "reads:gradients": "Computes gradients while decoding.",
        "exits": "May leave the model after any layer; one branch of one prompt at a time.",
    },
}

Verifier = Callable[[str, Sequence[str]], Sequence[float]]
# From a layer's output to logits of the whole vocabulary or of some tokens.
Head = Callable[[Tensor, Tensor | None], Tensor]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """What a decoder may know of one layer with experts."""

    index: int
    num_experts: int
    top_k: int
    scoring: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a decoder may know of the model.

    Attributes:
        layers: those with experts whose routing can be changed, in order.
        num_layers: all decoder layers.
        vocabulary: entries of the vocabulary.
        ends: tokens that end a text.
        mark: names the model's sizes and routers, so that what was made for it is told from another's.
    """

    layers: tuple[LayerFacts, ...]
    num_layers: int
    vocabulary: int
    ends: tuple[int, ...]
    mark: str

    def steer_all(self, make: Callable[[LayerFacts], Steering]) -> dict[int, Steering]:
        """A steering for every layer with experts."""
        return {layer.index: make(layer) for layer in self.layers}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a method learnt of a model before decoding: JSON values, tensors, whose they are."""

    method: str
    mark: str
    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One text as the model read it.

    Attributes:
        logits: of the token after each.
        hidden: what the output layer was given, or what the last layer returned, as the family keeps it.
        layers: what each decoder layer but the last returned.
        probabilities: by decoder layer, what the router's scores are over all experts.
        chosen: by decoder layer, each token's experts, absent ones E or more.
        weights: by decoder layer, what these were weighted by.
    """

    logits: Float[Tensor, "T V"]
    hidden: Float[Tensor, "T D"]
    layers: tuple[Float[Tensor, "T D"], ...]
    probabilities: Mapping[int, Float[Tensor, "T E"]]
    chosen: Mapping[int, Int[Tensor, "T K"]]
    weights: Mapping[int, Float[Tensor, "T K"]]


@runtime_checkable
class Probe(Protocol):
    """Lets a method run the model on a text beside the decoding."""

    def head(self, hidden: Tensor, tokens: Tensor | None) -> Tensor:
        """Logits of what a layer returned, of the whole vocabulary or of some tokens."""

    def run(
        self,
        token_ids: Sequence[int],
        *,
        steering: Mapping[int, Steering] | None = None,
        gradients: bool = False,
    ) -> Ran:
        """Read a text from its beginning, steered so; with ``gradients`` these reach the steering."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A text that a method is calibrated on: tokens, where the answer to its question begins, its label."""

    token_ids: tuple[int, ...]
    answer_from: int
    label: str = ""


@final
@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A way to run a model on a branch's text.

    Attributes:
        steering: by decoder layer, how its choice of experts differs.
        since: the first token it is for: all of the ``prompt``, the ``last`` of it, or only ``new`` ones.
        skipped: decoder layers that new tokens do not pass; not the first.
        model: 0 for the model, else the place of one of the further models, counted from 1.
    """

    steering: Mapping[int, Steering] = field(default_factory=dict)
    since: Literal["prompt", "last", "new"] = "prompt"
    skipped: frozenset[int] = frozenset()
    model: int = 0

    @property
    def plain(self) -> bool:
        """Whether it is the model as it is."""
        return not self.skipped and not self.model and all(one.idle for one in self.steering.values())


@final
@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A text that grows from a prompt.

    Attributes:
        views: the ways the model runs on it; as many in every branch.
        temperature: of its draws, 0 for the likeliest token; None for what the user asked for.
        forced: tokens it begins with.
        state: the method's own; it goes along where the branch is forked.
    """

    views: tuple[View, ...] = (View(),)
    temperature: float | None = None
    forced: tuple[int, ...] = ()
    state: Any = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a decoder begins from; ``temperature`` is what the user asked for, 0 where nothing was."""

    text: str
    token_ids: tuple[int, ...]
    facts: ModelFacts
    max_new_tokens: int
    temperature: float
    probe: Probe
    encode: Callable[[str], tuple[int, ...]]
    decode: Callable[[Sequence[int]], str]
    calibration: Calibration | None = None
    verify: Verifier | None = None
    num_models: int = 1

    def made_for_it(self, method: str) -> Calibration:
        """The method's calibration.

        Raises:
            UserError: there is none.
        """
        if self.calibration is None:
            raise UserError(
                f"{method} needs a calibration; make one with 'mixtura calibrate {method} MODEL --out FILE' "
                "and give it by --calibration FILE"
            )
        return self.calibration


@final
@dataclass(slots=True, kw_only=True, eq=False)
class Candidate:
    """A branch as it grows.

    Attributes:
        prompt: what it grows from.
        branch: how.
        token_ids: new tokens so far.
        log_probabilities: of these at temperature 1, forced ones left out; kept for the tag
            ``reads:confidence``.
        certainties: divergence (Kullback-Leibler) from the uniform distribution to each token's, likewise.
        verdicts: what the verifier said at the ends of steps, the last in the end.
        step_ends: numbers of new tokens at which steps have ended.
        finished: it has ended, or may have no more tokens.
        ended: it ended by itself.
        text: the new tokens as text.
    """

    prompt: Prompt
    branch: Branch
    token_ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    certainties: list[float] = field(default_factory=list)
    verdicts: list[float] = field(default_factory=list)
    step_ends: list[int] = field(default_factory=list)
    finished: bool = False
    ended: bool = False

    @property
    def text(self) -> str:
        """The new tokens as text."""
        return self.prompt.decode(self.token_ids)

    def fork(self) -> Candidate:
        """Another that has grown the same way so far."""
        return Candidate(
            prompt=self.prompt,
            branch=self.branch,
            token_ids=list(self.token_ids),
            log_probabilities=list(self.log_probabilities),
            certainties=list(self.certainties),
            verdicts=list(self.verdicts),
            step_ends=list(self.step_ends),
            finished=self.finished,
            ended=self.ended,
        )


class Decoder(ABC):
    """Decides how text is generated.

    Of the methods below ``open`` is needed; the others do nothing unless they are written. Settings with
    which the method does no more than plain decoding are its ``neutral``, at least at the temperatures
    ``neutral_at``.
    """

    neutral: ClassVar[Mapping[str, Any]] = {}
    neutral_at: ClassVar[tuple[float, ...]] = (0.0, 0.9)

    @abstractmethod
    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        """The branches that a prompt begins as.

        Raises:
            UserError: the model, or what the method needs besides, does not suit its settings.
        """

    def mix(self, logits: Float[Tensor, "B W V"], candidates: Sequence[Candidate]) -> Float[Tensor, "B V"]:
        """What to draw the next tokens from, made of what a branch's views say; in float32."""
        del candidates
        return logits[:, 0]

    def soften(
        self, probabilities: Float[Tensor, "B V"], candidates: Sequence[Candidate]
    ) -> tuple[Bool[Tensor, " B"], Float[Tensor, "B V"]] | None:
        """Branches that go on from a mean of embeddings instead of one token's, and the shares in it."""
        del probabilities, candidates
        return None

    def force(self, candidate: Candidate) -> tuple[int, ...]:
        """Tokens that come next whatever the model says; asked before each token."""
        del candidate
        return ()

    def revise(self, candidate: Candidate) -> Branch | None:
        """The branch as it goes on from here if that is otherwise; its whole text is read again then."""
        del candidate
        return None

    def ends_step(self, candidate: Candidate) -> bool:
        """Whether a step of a search ends with the last token; the branch waits for the others then."""
        del candidate
        return False

    def choose(self, candidates: Sequence[Candidate]) -> Sequence[int]:
        """Where all of a prompt's branches are at the end of a step: whose texts go on, several times or not.

        The finished are among them, and stay only if they are named.
        """
        return range(len(candidates))

    def select(self, candidates: Sequence[Candidate]) -> int:
        """Which of the finished branches is the answer."""
        del candidates
        return 0

    def leave(self, layer: int, hidden: Float[Tensor, " D"], head: Head, candidate: Candidate) -> bool:
        """Whether a new token skips all layers after this one; asked of one branch, after each layer."""
        del layer, hidden, head, candidate
        return False

    def calibrate(
        self, probe: Probe, samples: Sequence[Sample], facts: ModelFacts
    ) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        """What `Prompt.calibration` is to hold: JSON values and tensors.

        Raises:
            UserError: the method needs none, or the samples are too few.
        """
        del probe, samples, facts
        raise UserError(f"{type(self).__name__} needs no calibration")

"""The one loop that every decoder is run by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from mixtura.errors import UserError
from mixtura.methods.decoders import Candidate, Decoder, ModelFacts, Prompt
from mixtura.running.decoders.bundle import Bundle, Cost, Row
from mixtura.running.decoders.drawing import Drawing
from mixtura.running.decoders.probing import head_of
from mixtura.running.decoders.skipping import AfterLayer
from mixtura.running.decoders.steering import Steerer
from mixtura.running.decoders.stepping import Stepping

OnToken = Callable[[int], None]


@final
@dataclass(slots=True, kw_only=True)
class Runner:
    """A model that views run, with what is known of it."""

    model: PreTrainedModel
    facts: ModelFacts
    steerer: Steerer | None
    stepping: Stepping


@final
@dataclass(slots=True, kw_only=True)
class Loop:
    """Grows the branches of some prompts side by side.

    Attributes:
        decoder: what decides.
        tags: that its file declares.
        runners: the model, then the further models.
        drawing: draws tokens.
        prompts: to begin from.
        stops: by prompt, what ends its texts besides an end token.
        cost: what it took, counted.
        on_token: told of tokens, where there is one prompt of one branch.
    """

    decoder: Decoder
    tags: frozenset[str]
    runners: Sequence[Runner]
    drawing: Drawing
    prompts: Sequence[Prompt]
    stops: Sequence[StoppingCriteria | None]
    cost: Cost
    on_token: OnToken | None = None
    groups: list[list[Candidate]] = field(default_factory=list)
    _bundles: dict[tuple[int, frozenset[int]], Bundle] = field(default_factory=dict)
    _waiting: set[int] = field(default_factory=set)

    def run(self) -> list[list[Candidate]]:
        """By prompt, the branches that have grown to their ends."""
        for prompt in self.prompts:
            branches = self.decoder.open(prompt)
            room = prompt.max_new_tokens
            self.groups.append(
                [Candidate(prompt=prompt, branch=one, token_ids=list(one.forced[:room])) for one in branches]
            )
        for one in self._all():
            one.finished = len(one.token_ids) >= one.prompt.max_new_tokens
        if self._growing():
            logits = self._read()
        while self._growing():
            awake = [one for one in self._growing() if id(one) not in self._waiting]
            soft = self._extend(logits, awake)
            self._search()
            revised = [self._revised(one) for one in self._growing()]
            if not self._growing():
                break
            logits = self._read() if any(revised) else self._advance(soft)
        if "reads:verdicts" in self.tags or any(one.verify for one in self.prompts):
            for group in self.groups:
                self._judge(group)
        return self.groups

    def _all(self) -> list[Candidate]:
        return [one for group in self.groups for one in group]

    def _growing(self) -> list[Candidate]:
        return [one for one in self._all() if not one.finished]

    def _read(self) -> Float[Tensor, "B W V"]:
        """Begin caches anew from the texts as they are."""
        self._bundles.clear()
        growing = self._growing()
        rows: dict[tuple[int, frozenset[int]], list[Row]] = {}
        for one in growing:
            for place, view in enumerate(one.branch.views):
                rows.setdefault((view.model, view.skipped), []).append(Row(one, place))
        more = max(one.prompt.max_new_tokens - len(one.token_ids) for one in growing)
        found = []
        for key, own in rows.items():
            runner = self.runners[key[0]]
            bundle = Bundle(runner.model, runner.facts, runner.stepping, key[1], self.cost)
            if "searches" in self.tags:
                bundle.require_pausing(type(self.decoder).__name__)
            if key[1] or "exits" in self.tags:
                bundle.require_skipping(type(self.decoder).__name__)
            self._bundles[key] = bundle
            found.append((bundle, bundle.read(own, more)))
        return self._gathered(found)

    def _gathered(self, found: Sequence[tuple[Bundle, Float[Tensor, "R V"]]]) -> Float[Tensor, "B W V"]:
        """What the rows say, by growing branch and view."""
        places = {id(one): place for place, one in enumerate(self._growing())}
        views = max(row.view for bundle, _ in found for row in bundle.rows) + 1
        if len(found) == 1 and views == 1:
            return found[0][1][:, None]
        vocabulary = found[0][1].shape[-1]
        made = torch.full((len(places), views, vocabulary), float("nan"))
        for bundle, logits in found:
            branches = torch.tensor([places[id(row.candidate)] for row in bundle.rows])
            made[branches, torch.tensor([row.view for row in bundle.rows])] = logits
        return made

    def _extend(
        self, logits: Float[Tensor, "B W V"], awake: Sequence[Candidate]
    ) -> dict[int, Float[Tensor, " V"]]:
        """Add a token to each branch that is awake; by branch, the shares of embeddings to go on from."""
        places = {id(one): place for place, one in enumerate(self._growing())}
        chosen = torch.tensor([places[id(one)] for one in awake])
        mixed = self.decoder.mix(logits[chosen], awake)
        tokens, probabilities = self.drawing.draw(mixed, awake)
        softened = self.decoder.soften(probabilities, awake)
        soft: dict[int, Tensor] = {}
        read = mixed.log_softmax(-1) if "reads:confidence" in self.tags else None
        for place, one in enumerate(awake):
            forced = self.decoder.force(one)
            token = forced[0] if forced else tokens[place]
            if softened is not None and not forced and bool(softened[0][place]):
                soft[id(one)] = softened[1][place]
                token = int(softened[1][place].argmax())
            one.token_ids.append(token)
            if read is not None and not forced:
                one.log_probabilities.append(float(read[place, token]))
                one.certainties.append(certainty(read[place]))
            self._close(one, token)
        return soft

    def _close(self, one: Candidate, token: int) -> None:
        """Note whether a branch ends, or a step of it."""
        if self.on_token is not None:
            self.on_token(token)
        stop = self.stops[self.prompts.index(one.prompt)]
        one.ended = token in one.prompt.facts.ends
        if stop is not None and not one.ended:
            whole = torch.tensor([[*one.prompt.token_ids, *one.token_ids]])
            one.ended = bool(stop(whole, None)[0])
        one.finished = one.ended or len(one.token_ids) >= one.prompt.max_new_tokens
        if "searches" in self.tags and not one.finished and self.decoder.ends_step(one):
            one.step_ends.append(len(one.token_ids))
            self._waiting.add(id(one))

    def _search(self) -> None:
        """Where all of a prompt's branches wait or have ended, let the decoder choose among them."""
        parents: dict[int, int] = {}
        for place, group in enumerate(self.groups):
            waiting = [one for one in group if id(one) in self._waiting]
            if not waiting or any(not one.finished for one in group if id(one) not in self._waiting):
                continue
            self._judge(group)
            self._waiting -= {id(one) for one in waiting}
            kept: list[Candidate] = []
            named: set[int] = set()
            for index in self.decoder.choose(group):
                one = group[index].fork() if index in named else group[index]
                parents[id(one)] = id(group[index])
                named.add(index)
                kept.append(one)
            self.groups[place] = kept
        self._keep(parents)

    def _keep(self, parents: dict[int, int]) -> None:
        """Drop the rows of branches that do not grow, and copy those of branches that were forked."""
        growing = self._growing()
        for bundle in self._bundles.values():
            where = {(id(row.candidate), row.view): place for place, row in enumerate(bundle.rows)}
            rows = [
                (where[key], Row(one, view))
                for one in growing
                for view in range(len(one.branch.views))
                if (key := (parents.get(id(one), id(one)), view)) in where
            ]
            if rows:
                bundle.keep([place for place, _ in rows], [row for _, row in rows])

    def _judge(self, group: Sequence[Candidate]) -> None:
        """Let the verifier score the texts as they are."""
        verify = group[0].prompt.verify
        if verify is None:
            return
        scores = verify(group[0].prompt.text, [one.text for one in group])
        if len(scores) != len(group):
            raise UserError(
                f"the verifier gave {len(scores)} scores for {len(group)} texts; it must give one for each"
            )
        for one, score in zip(group, scores, strict=True):
            one.verdicts.append(float(score))

    def _revised(self, one: Candidate) -> bool:
        branch = self.decoder.revise(one)
        if branch is not None:
            one.branch = branch
        return branch is not None

    def _advance(self, soft: dict[int, Float[Tensor, " V"]]) -> Float[Tensor, "B W V"]:
        """Run the last token of every branch that is awake."""
        found = []
        for bundle in self._bundles.values():
            awake = torch.tensor([id(row.candidate) not in self._waiting for row in bundle.rows])
            tokens = torch.tensor([row.candidate.token_ids[-1] for row in bundle.rows])
            softly = [soft.get(id(row.candidate)) for row in bundle.rows]
            embeddings = None
            if any(one is not None for one in softly):
                embeddings = _embedded(bundle.model, tokens, softly)
            logits = bundle.step(tokens, awake, embeddings, self._after(bundle))
            found.append((bundle, logits))
        return self._gathered(found)

    def _after(self, bundle: Bundle) -> AfterLayer | None:
        if "exits" not in self.tags:
            return None
        if len(bundle.rows) > 1:
            raise UserError("a decoder that leaves layers grows one branch; combine it with none of several")
        (row,) = bundle.rows
        head = head_of(bundle.model)
        return lambda layer, hidden: self.decoder.leave(layer, hidden[0, -1], head, row.candidate)


def certainty(log_probabilities: Float[Tensor, " V"]) -> float:
    """Kullback-Leibler divergence from the uniform distribution to this one, in nats."""
    number = log_probabilities.shape[-1]
    # What cannot be drawn at all would make it infinite.
    finite = log_probabilities.clamp(min=torch.finfo(torch.float32).min / number)
    return float(-finite.mean() - torch.tensor(float(number)).log())


def _embedded(
    model: PreTrainedModel, tokens: Tensor, shares: Sequence[Tensor | None]
) -> Float[Tensor, "R 1 D"]:
    """Embeddings of tokens, or means of several by their shares."""
    table = model.get_input_embeddings()
    made: Tensor = table(tokens.to(model.device))
    for place, share in enumerate(shares):
        if share is not None:
            ids = share.nonzero().flatten()
            each = table(ids.to(model.device))
            made[place] = (share[ids].to(each)[:, None] * each).sum(0)
    return made[:, None]

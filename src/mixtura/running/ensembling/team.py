"""Models that share a tokenizer, held to that before any of them runs together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.errors import UserError
from mixtura.methods import declared_tags
from mixtura.methods.ensembles import Ensemble, Facts
from mixtura.running.decoders.facts import mark_of
from mixtura.running.ensembling.reading import Reading
from mixtura.running.whole import load_any

# What tokenizers of one vocabulary may still split in different ways.
_PROBE = "Two tokenizers, 17 * 23 = 391:\n\tdef f(x): return 'naïve café' # x\n"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Team:
    """Models that answer together.

    Attributes:
        models: that are frozen.
        tokenizer: of all of them.
        names: of the models, for words to the user.
        own: the method's own model, where it has one.
    """

    models: tuple[PreTrainedModel, ...]
    tokenizer: Any
    names: tuple[str, ...]
    own: PreTrainedModel | None = None

    @property
    def all(self) -> tuple[PreTrainedModel, ...]:
        """The models, the method's own last."""
        return self.models if self.own is None else (*self.models, self.own)

    @property
    def facts(self) -> Facts:
        """What a method may know of them."""
        configs = [one.config.get_text_config(decoder=True) for one in self.all]
        return Facts(
            vocabulary=int(configs[0].vocab_size),
            widths=tuple(int(one.hidden_size) for one in configs),
            num_layers=tuple(int(one.num_hidden_layers) for one in configs),
        )

    @property
    def marks(self) -> list[str]:
        """Names of the frozen models' sizes and weights, by which others are told from them."""
        return [mark_of(one, None) for one in self.models]

    def with_own(self, ensemble: Ensemble, model: PreTrainedModel | None = None) -> Team:
        """The same with a model of the method's own where it needs one: a copy of one given, or the first."""
        if "own_model" not in declared_tags(type(ensemble)):
            return replace(self, own=None)
        made = copy.deepcopy(self.models[0] if model is None else model).float().eval()
        made.requires_grad_(requires_grad=True)
        return replace(self, own=made)

    def read(
        self,
        token_ids: Int[Tensor, "S T"],
        valid: Int[Tensor, "S T"] | None = None,
        prompt: Int[Tensor, " S"] | None = None,
        *,
        grows: bool = False,
    ) -> Reading:
        """Rows of text as these models read them."""
        own = self.own is not None
        return Reading(self.all, token_ids, valid, prompt, has_own=own, grows=grows)


def team_of(models: Sequence[PreTrainedModel], tokenizers: Sequence[Any], names: Sequence[str] = ()) -> Team:
    """Models as a team.

    Raises:
        UserError: there is one alone, or tokenizers or vocabularies differ.
    """
    known = tuple(names) or tuple(f"model {place + 1}" for place in range(len(models)))
    if len(models) < 2:
        raise UserError(f"an ensemble is of two models or more, got {len(models)}; give further ones")
    for place in range(1, len(models)):
        why = difference(tokenizers[0], tokenizers[place])
        if why is not None:
            raise UserError(
                f"{known[place]} has another tokenizer than {known[0]} ({why}); an ensemble mixes tokens, so "
                "give models of one tokenizer"
            )
        first, other = (int(one.config.get_text_config().vocab_size) for one in (models[0], models[place]))
        if first != other:
            raise UserError(
                f"{known[place]} has a vocabulary of {other} entries, {known[0]} one of {first}; give models "
                "of one vocabulary, or resize the embeddings"
            )
    return Team(tuple(models), tokenizers[0], known)


def difference(first: Any, second: Any) -> str | None:
    """How two tokenizers differ, in words; None where they do not."""
    one, other = first.get_vocab(), second.get_vocab()
    if one != other:
        token = min((one.keys() ^ other.keys()) or {t for t in one if one[t] != other[t]})
        return f"{token!r} is token {other.get(token, 'none')} there and {one.get(token, 'none')} here"
    if first(_PROBE)["input_ids"] != second(_PROBE)["input_ids"]:
        return "they split the same text into different tokens"
    return None


def open_team(paths: Sequence[Path], names: Sequence[str]) -> Team:
    """The models and tokenizers of directories, as a team; tokenizers are compared before models are read.

    Raises:
        UserError: they do not go together.
    """
    from mixtura.checkpoints.tokenizer import load_tokenizer

    tokenizers = [load_tokenizer(path) for path in paths]
    for place, other in enumerate(tokenizers[1:], start=1):
        why = difference(tokenizers[0], other)
        if why is not None:
            raise UserError(
                f"{names[place]} has another tokenizer than {names[0]} ({why}); an ensemble mixes tokens, so "
                "give models of one tokenizer"
            )
    return team_of([load_any(path) for path in paths], tokenizers, names)


@contextmanager
def frozen(team: Team) -> Iterator[None]:
    """The models are in evaluation mode and learn nothing in here; then they are as they were."""
    were = [(one, one.training, [p for p in one.parameters() if p.requires_grad]) for one in team.models]
    for one, _, trained in were:
        one.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        for one, was_training, trained in were:
            one.train(was_training)
            for parameter in trained:
                parameter.requires_grad_(True)

"""What every ensemble promises."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._read_together import VOCABULARY, built, said, team
from mixtura.methods.ensembles import Ensemble, Mixed
from mixtura.running.ensembling.lessons import Pair, Row
from mixtura.running.ensembling.saving import open_ensemble, save
from mixtura.running.ensembling.team import Team
from mixtura.running.ensembling.training import Training, train

__all__ = ["said"]

# Tokens of a row, and those of them that are the prompt.
_LENGTH, _PROMPT = 10, 4
# Parts that are not trained stand in for trained ones.
_APART = 0.2


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> Tensor:
    """Two rows of tokens."""
    del method
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (2, _LENGTH), generator=generator)


def use(ensemble: Ensemble, token_ids: Tensor) -> Tensor:
    """What it says of them."""
    of = team(ensemble)
    return _mixed(built(ensemble, of, apart=_APART), of, token_ids).log_probabilities


def check_says_probabilities(method: Subject) -> None:
    """What it says sums to 1 for every token, and so do the shares of the models."""
    ensemble, of = _ready(method)
    mixed = _mixed(ensemble, of, sample(method, 10))
    wanted = (2, _LENGTH, VOCABULARY)
    got = tuple(mixed.log_probabilities.shape)
    require(got == wanted, f"log-probabilities must be {list(wanted)}, got {list(got)}")
    sums = mixed.log_probabilities.exp().sum(-1)
    require(bool(((sums - 1).abs() < 1e-4).all()), f"probabilities sum to {float(sums.flatten()[0]):.6g}")
    shares = mixed.shares
    require(shares.shape[-1] == 2, f"there must be a share for each of 2 models, got {shares.shape[-1]}")
    require(bool((shares >= 0).all()), "a share is negative")
    require(bool(((shares.sum(-1) - 1).abs() < 1e-4).all()), "shares do not sum to 1")


def check_later_tokens_change_nothing(method: Subject) -> None:
    """What it says of a token does not depend on later ones, those of the prompt aside."""
    ensemble, of = _ready(method)
    ids = sample(method, 11)
    other = ids.clone()
    other[:, -2:] = (other[:, -2:] + 7) % VOCABULARY
    first, second = (_mixed(ensemble, of, one).log_probabilities for one in (ids, other))
    _require_near(first[:, _PROMPT - 1 : -2], second[:, _PROMPT - 1 : -2], "with other tokens after it")


def check_token_by_token_is_at_once(method: Subject) -> None:
    """Continued token by token, with caches, it says what it says of the whole text at once."""
    ensemble, of = _ready(method)
    ids = sample(method, 12)[:1]
    whole = _mixed(ensemble, of, ids).log_probabilities
    text = of.read(ids[:, :_PROMPT], grows=True)
    with torch.no_grad():
        mixed = ensemble(text)
        for place in range(_PROMPT, _LENGTH):
            _require_near(whole[:, place - 1], mixed.log_probabilities[:, -1], f"token {place} by itself")
            text.extend(ids[:, place : place + 1])
            mixed = ensemble(text, mixed.state)


def check_rows_are_independent(method: Subject) -> None:
    """A row says the same alone as beside a longer one, whatever pads it."""
    ensemble, of = _ready(method)
    ids = sample(method, 13)
    short = _LENGTH - 3
    alone = _mixed(ensemble, of, ids[:1, :short]).log_probabilities
    valid = torch.ones_like(ids)
    valid[0, short:] = 0
    with torch.no_grad():
        beside = ensemble(of.read(ids, valid, torch.full((2,), _PROMPT))).log_probabilities
    _require_near(alone, beside[:1, :short], "beside a longer row")


def check_equal_models_are_one(method: Subject) -> None:
    """Of the same model twice, an ensemble without a model of its own says what that one says."""
    if method.has("own_model"):
        return
    ensemble = method.create()
    of = team(ensemble, equal=True)
    built(ensemble, of)
    ids = sample(method, 14)
    with torch.no_grad():
        alone = of.models[0](input_ids=ids).logits.log_softmax(-1)
    _require_near(alone, _mixed(ensemble, of, ids).log_probabilities, "of one model twice")


def check_a_model_that_is_sure_is_heard(method: Subject) -> None:
    """Where all models hold a token for the likeliest, so does an ensemble that nothing trained."""
    if method.has("trained"):
        return
    says = torch.tensor([[3.0, 0.0, 0.0], [2.0, 0.0, 1.0]])
    found = method.create()(said(says)).log_probabilities[0, 0]
    require(int(found.argmax()) == 0, f"both models say token 0, it says {int(found.argmax())}")


def check_training_leaves_models_alone(method: Subject) -> None:
    """Training changes all parts of the method and nothing of the models; saved and opened it is the same."""
    if not method.has("trained"):
        return
    ensemble = method.create()
    require(ensemble.stages, "what is trained names the stages of its training")
    of = team(ensemble)
    before = [one.detach().clone() for model in of.models for one in model.parameters()]
    begun = {name: one.detach().clone() for name, one in built(method.create(), of).named_parameters()}
    how = Training(steps=3, batch=2, learning_rate=0.01, own_learning_rate=0.01)
    rows = [Row(tuple(one), _PROMPT) for one in sample(method, 15).tolist()]
    pairs = [Pair(rows[0], rows[1])] if method.has("pairs") else []
    stages = train(ensemble, of, rows, how, pairs)
    require([one.name for one in stages] == list(ensemble.stages), "stages are left out")
    after = [one for model in of.models for one in model.parameters()]
    require(all(map(torch.equal, before, after)), "training changes a model that is not the method's own")
    require(all(one.requires_grad for one in after), "a model is frozen afterwards")
    still = {name for name, one in ensemble.named_parameters() if torch.equal(one, begun.get(name, one[:0]))}
    require(not still, f"training leaves {', '.join(sorted(still))} as it was")
    _check_saved(method, ensemble, of)


def _check_saved(method: Subject, ensemble: Ensemble, of: Team) -> None:
    ids = sample(method, 16)
    with TemporaryDirectory() as folder:
        if type(ensemble).__module__.startswith("mixtura.methods."):
            save(Path(folder) / "made", ensemble, of, [])
            again, other = open_ensemble(Path(folder) / "made", of)
            first = _mixed(ensemble, of, ids).log_probabilities
            second = _mixed(again, other, ids).log_probabilities
            require(torch.equal(first, second), "saved and opened it says something else")


def _ready(method: Subject) -> tuple[Ensemble, Team]:
    ensemble = method.create()
    of = team(ensemble)
    return built(ensemble, of, apart=_APART), of


def _mixed(ensemble: Ensemble, of: Team, token_ids: Tensor) -> Mixed:
    with torch.no_grad():
        found: Mixed = ensemble(of.read(token_ids, prompt=torch.full((len(token_ids),), _PROMPT)))
        return found


def _require_near(first: Float[Tensor, "*A V"], second: Float[Tensor, "*A V"], where: str) -> None:
    apart = float((first - second).abs().max())
    require(apart < 1e-3, f"{where} a log-probability is another by {apart:.3g}")

"""From the name that a client asks for to the models that are tried, and a note of why."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from mixtura.errors import UserError, counted_names, suggest
from mixtura.running.composing.fitted import FittedRouter, load_model_router
from mixtura.serving.api.refusals import ApiError
from mixtura.serving.gateway.config import Config, Route
from mixtura.serving.gateway.counting import Size
from mixtura.types.models import Decision, ModelCard, Prompt

_MOST_CONVERSATIONS: Final = 20_000


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """Which models are tried.

    Attributes:
        models: the first is asked first.
        how: ``named``, ``router``, ``explored``, ``sticky``, ``fallback`` or ``abstained``.
        propensity: with which probability the first was chosen, where that was by chance or might have been.
        scores: expected score of each model.
        prompt: as the router read it.
    """

    models: tuple[str, ...]
    how: str = "named"
    propensity: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    prompt: Prompt | None = None

    def row(self, request: str, account: str, asked: str, *, keep_text: bool) -> dict[str, Any]:
        """As the ledger keeps it."""
        prompt = self.prompt or Prompt(id=request)
        return {
            "request": request, "account": account, "asked": asked,
            "model": self.models[0] if self.models else "", "how": self.how, "propensity": self.propensity,
            "scores": json.dumps({name: round(value, 4) for name, value in self.scores.items()}),
            "labels": json.dumps(dict(prompt.labels)), "prompt": prompt.text if keep_text else None,
            "at": time.time(),
        }  # fmt: skip


@final
class Chooser:
    """Knows every name.

    Args:
        config, cards: what there is.

    Raises:
        UserError: a router is missing or damaged, or has never heard of a model.
    """

    def __init__(self, config: Config, cards: Mapping[str, ModelCard]) -> None:
        self._config = config
        self._routers = {name: _opened(name, route, cards) for name, route in config.routers.items()}
        self._stays: OrderedDict[str, str] = OrderedDict()

    def check(self, name: str, allowed: Iterable[str] | None) -> None:
        """Refuse a name that there is not, or that a key may not ask for.

        Raises:
            ApiError: it is one.
        """
        names = self._config.names if allowed is None else tuple(allowed)
        if name not in names:
            raise ApiError(
                f"there is no model {name[:200]!r} for this key; {suggest(name[:200], names)}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip

    def choose(self, name: str, request: str, who: str, body: Mapping[str, Any], size: Size) -> Choice:
        """The models to try for a request.

        Args:
            name: that it asks for; a model or a router.
            request: its number.
            who: asks; conversations of different keys are different ones.
            body, size: of the request.
        """
        if name not in self._routers:
            return Choice((name, *self._config.models[name].fallbacks))
        route, (router, cards) = self._config.routers[name], self._routers[name]
        prompt = _prompt(request, body, size, router)
        (decision,) = router.decide([prompt], route.wish, route.seed, cards)
        choice = _choice(decision, prompt)
        return self._staying(choice, f"{who}\0{name}\0{_beginning(body)}", body) if route.sticky else choice

    def _staying(self, choice: Choice, conversation: str, body: Mapping[str, Any]) -> Choice:
        """The model that began a conversation goes on with it, where it may still be asked."""
        key = hashlib.blake2b(conversation.encode("utf-8", "replace"), digest_size=16).hexdigest()
        before = self._stays.get(key)
        goes_on = any(one.get("role") == "assistant" for one in body.get("messages") or [])
        if goes_on and before in choice.models and before is not None:
            self._stays.move_to_end(key)
            rest = tuple(name for name in choice.models if name != before)
            return Choice((before, *rest), "sticky", None, choice.scores, choice.prompt)
        if choice.models:
            self._stays[key] = choice.models[0]
            if len(self._stays) > _MOST_CONVERSATIONS:
                self._stays.popitem(last=False)
        return choice


def _opened(
    name: str, route: Route, cards: Mapping[str, ModelCard]
) -> tuple[FittedRouter, tuple[ModelCard, ...]]:
    router = load_model_router(route.path)
    learned = set(router.method.models)
    chosen = route.models or tuple(one for one in cards if one in learned)
    if not chosen:
        raise UserError(
            f"the router {name} knows {counted_names(sorted(learned))}, and none of these is a model here; "
            "name the models as its table does"
        )
    for one in chosen:
        if one not in learned:
            raise UserError(f"the router {name} never learned of {one!r}; {suggest(one, learned)}")
    if route.fallback and route.fallback not in chosen:
        chosen = (*chosen, route.fallback)
    found = tuple(cards[one] for one in chosen)
    # Asked once now, so that a wish that cannot be heeded is refused before anybody waits for an answer.
    router.decide([Prompt(id="0", text="?", labels=dict.fromkeys(router.labels, "?"))], route.wish, 0, found)
    return router, found


def _choice(decision: Decision, prompt: Prompt) -> Choice:
    if not decision.models:
        if decision.abstained:
            return Choice((), "abstained", None, decision.quality, prompt)
        reasons = "; ".join(f"{name}: {why}" for name, why in decision.ineligible.items())
        raise ApiError(f"no model can answer this ({reasons})", code="no_model")
    how = "fallback" if decision.abstained else "explored" if decision.explored else "router"
    first = decision.models[0]
    return Choice(decision.models, how, decision.propensities.get(first), decision.quality, prompt)


def _prompt(request: str, body: Mapping[str, Any], size: Size, router: FittedRouter) -> Prompt:
    """A request as routers read it: the last thing that the user says."""
    metadata = body.get("metadata") or {}
    needs = {"tools"} if body.get("tools") else set()
    needs |= {"images"} if size.has_media else set()
    wanted = body.get("response_format")
    needs |= {"json"} if isinstance(wanted, dict) and wanted.get("type") != "text" else set()
    return Prompt(
        id=request, text=_last_words(body), needs=frozenset(needs), num_tokens=size.read_estimate,
        max_tokens=size.wanted, labels={key: str(metadata[key]) for key in router.labels if key in metadata},
    )  # fmt: skip


def _last_words(body: Mapping[str, Any]) -> str:
    for message in reversed(body.get("messages") or []):
        if message.get("role") == "user":
            return text_of(message.get("content"))
    prompt = body.get("prompt")
    return prompt if isinstance(prompt, str) else " ".join(x for x in prompt or [] if isinstance(x, str))


def text_of(content: Any) -> str:
    """The text of a message's content."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _beginning(body: Mapping[str, Any]) -> str:
    """What a conversation is known by: everything up to the user's first words."""
    begun = []
    for message in body.get("messages") or []:
        begun.append(message)
        if message.get("role") == "user":
            break
    return json.dumps(begun, sort_keys=True, default=str)

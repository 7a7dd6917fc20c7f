"""What a gateway is told: upstreams, models, routers, policies, keys. Read once, refused in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mixtura.data.yaml_core import parse_yaml
from mixtura.errors import UserError, one_line, suggest
from mixtura.running.composing.reading import CARD_FIELDS, card_from
from mixtura.types.models import PICO_PER_DOLLAR, ModelCard, Wish

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
# What a name of an environment variable looks like: a secret that was put in its place rarely does.
VARIABLE: Final = re.compile(r"[A-Z_][A-Z0-9_]*")
# Numbers of a ledger have 64 bits; so has every sum of two of these.
MOST_DOLLARS: Final = 4_000_000

Dollars = Annotated[float, Field(ge=0, le=MOST_DOLLARS)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Share = Annotated[float, Field(ge=0, le=1)]


@final
class Upstream(BaseModel):
    """An address that speaks the OpenAI format, and what it allows.

    Attributes:
        address: the base, such as ``http://127.0.0.1:8000/v1``.
        key: the environment variable that holds its key.
        connect_s, stall_s: how long to wait for a connection, and for the next byte.
        concurrency, requests_per_minute: that it is sent at most.
        limit_field: what it calls the most tokens of an answer.
    """

    model_config = _STRICT
    address: str
    key: str = ""
    connect_s: Seconds = 5.0
    stall_s: Seconds = 120.0
    concurrency: Count | None = None
    requests_per_minute: Count | None = None
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"


@final
class Model(BaseModel):
    """What is said of a model beside its card.

    Attributes:
        upstream: its name.
        fallbacks: models that are asked where this one cannot answer.
        template_tokens: that an upstream may add to a conversation before it counts its tokens.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    upstream: str
    fallbacks: tuple[str, ...] = ()
    template_tokens: Annotated[int, Field(ge=0)] = 128


@final
class Route(BaseModel):
    """A fitted router under a name that clients ask for.

    Attributes:
        path: the folder that `mixtura route fit` wrote.
        models: those it may choose; all that it learned of where that is empty.
        quality_per_dollar, most_cost, least_quality, floor, fallback, explore: see `mixtura route ask`.
        sticky: whether a conversation stays with the model that began it.
        seed: of what is drawn at random.
    """

    model_config = _STRICT
    path: Path
    models: tuple[str, ...] = ()
    quality_per_dollar: Annotated[float, Field(ge=0)] = 0.0
    most_cost: Dollars | None = None
    least_quality: Share | None = None
    floor: Share | None = None
    fallback: str = ""
    explore: Share = 0.0
    sticky: bool = True
    seed: int = 0

    @property
    def wish(self) -> Wish:
        """What is preferred."""
        return Wish(
            quality_per_dollar=self.quality_per_dollar,
            most_cost=None if self.most_cost is None else self.most_cost * PICO_PER_DOLLAR,
            least_quality=self.least_quality, floor=self.floor, fallback=self.fallback, explore=self.explore,
        )  # fmt: skip


@final
class Policy(BaseModel):
    """An aggregator under a name that clients ask for."""

    model_config = _STRICT
    aggregator: str
    models: Annotated[tuple[str, ...], Field(min_length=1)]
    settings: dict[str, Any] = {}


@final
class Key(BaseModel):
    """Somebody who may ask, and for how much.

    Attributes:
        secret: the environment variable that holds it.
        budget: dollars; None for no limit.
        per: the budget begins anew each day or month (UTC).
        models: names that it may ask for; all where that is None.
        requests_per_minute, tokens_per_minute, concurrency: at most.
        admin: whether it may see metrics, the dashboard's numbers and the log.
    """

    model_config = _STRICT
    secret: str
    budget: Dollars | None = None
    per: Literal["", "day", "month"] = ""
    models: tuple[str, ...] | None = None
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrency: Count | None = None
    admin: bool = False

    @property
    def limit(self) -> int | None:
        """The budget in pico-dollars."""
        return None if self.budget is None else round(self.budget * PICO_PER_DOLLAR)


@final
class Resting(BaseModel):
    """When a model or an upstream that fails is left alone, and for how long."""

    model_config = _STRICT
    failures: Count = 3
    window_s: Seconds = 60.0
    rest_s: Seconds = 30.0


@final
class Cache(BaseModel):
    """Answers given again. A near match may be the answer to another question: see docs/gateway.md.

    Attributes:
        exact: answer a request that is the same to the letter.
        near: cosine from which another wording counts as the same; None for never.
        entries, age_s: that are kept at most.
        verify: share of hits that are asked again, so that their precision is known.
    """

    model_config = _STRICT
    exact: bool = True
    near: Annotated[float, Field(ge=0.5, le=1)] | None = None
    entries: Count = 1000
    age_s: Seconds = 3600.0
    verify: Share = 0.05


@final
class Config(BaseModel):
    """All of a gateway.

    Attributes:
        ledger: SQLAlchemy's URL of a SQLite or PostgreSQL database, or ``$NAME`` of the environment.
        attempts: calls that a request may take, fallbacks included.
        deadline_s: until an answer begins.
        most_tokens: of an answer, where neither request nor card says.
        unsettled: what becomes of calls whose gateway was killed: charged in full, or released.
        keep_text: whether prompts are written to the ledger, for `mixtura route fit`.
        tracing: spans for OpenTelemetry.
    """

    model_config = _STRICT
    upstreams: Annotated[dict[str, Upstream], Field(min_length=1)]
    models: Annotated[dict[str, Model], Field(min_length=1)]
    routers: dict[str, Route] = {}
    policies: dict[str, Policy] = {}
    keys: dict[str, Key] = {}
    ledger: str = "sqlite:///gateway.db"
    attempts: Annotated[int, Field(ge=1, le=20)] = 4
    deadline_s: Seconds = 180.0
    most_tokens: Count = 4096
    resting: Resting = Resting()
    unsettled: Literal["charge", "release"] = "charge"
    keep_text: bool = False
    cache: Cache | None = None
    tracing: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that clients may ask for."""
        return (*self.models, *self.routers, *self.policies)


def read_config(path: Path) -> tuple[Config, dict[str, ModelCard]]:
    """A gateway's configuration, and the cards of its models by name.

    Raises:
        UserError: the file is missing or no such configuration; names the place and the nearest name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"cannot read {path}: {reason}; give a gateway's configuration") from None
    return parse_config(parse_yaml(text, str(path)), str(path), path.parent)


def parse_config(found: Any, what: str, folder: Path) -> tuple[Config, dict[str, ModelCard]]:
    """A configuration from YAML's values; paths in it are from ``folder``.

    Raises:
        UserError: it is none.
    """
    if not isinstance(found, dict):
        raise UserError(f"{what} has no upstreams and models; see docs/gateway.md for an example")
    try:
        config = Config.model_validate(found)
    except ValidationError as error:
        # A name that is not known explains one that is missing.
        found_first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        raise UserError(f"{what}: {_problem(found_first)}") from None
    routes = {
        name: one.model_copy(update={"path": folder / one.path}) for name, one in config.routers.items()
    }
    config = config.model_copy(update={"routers": routes})
    cards = {name: _card(name, one, what) for name, one in config.models.items()}
    _check_names(config, what)
    _check_secrets(config, what)
    _check_prices(config, cards, what)
    return config, cards


def _problem(error: Mapping[str, Any]) -> str:
    """What is wrong, where, and the nearest name."""
    place = [str(one) for one in error["loc"] if one not in ("[key]",)]
    where = ".".join(place) or "it"
    if error["type"] == "extra_forbidden":
        owner = _model_at(place[:-1])
        hint = "leave it out" if owner is None else suggest(place[-1], owner.model_fields)
        return f"there is no {where!r}; {hint}"
    if error["type"] == "missing":
        return f"{where} is missing"
    return one_line(f"{where}: {error['msg']}, got {error['input']!r}", 300)


def _model_at(place: Sequence[str]) -> type[BaseModel] | None:
    """The part of a configuration at a place; names that users give lie between."""
    parts: Mapping[str, type[BaseModel]] = {
        "upstreams": Upstream, "models": Model, "routers": Route, "policies": Policy, "keys": Key,
    }  # fmt: skip
    if not place:
        return Config
    if len(place) == 1:
        single: Mapping[str, type[BaseModel]] = {"resting": Resting, "cache": Cache}
        return single.get(place[0])
    return parts.get(place[0])


def _card(name: str, model: Model, what: str) -> ModelCard:
    given = model.model_extra or {}
    own = [field for field in Model.model_fields if field != "model_config"]
    for field in given:
        # The address is the upstream's, the name is the key.
        if field not in CARD_FIELDS or field in ("name", "address"):
            options = [*own, *(one for one in CARD_FIELDS if one not in ("name", "address"))]
            raise UserError(f"{what}: there is no 'models.{name}.{field}'; {suggest(field, options)}")
    return card_from({**given, "name": name}, f"{what}, models.{name}")


def _check_names(config: Config, what: str) -> None:
    seen: set[str] = set()
    for name in config.names:
        if name in seen:
            raise UserError(f"{what}: {name!r} is the name of two things; give each a name of its own")
        seen.add(name)
    models = config.models
    for name, model in models.items():
        _known([model.upstream], config.upstreams, f"{what}: models.{name}.upstream")
        _known(model.fallbacks, models, f"{what}: models.{name}.fallbacks")
    for name, route in config.routers.items():
        _known(route.models, models, f"{what}: routers.{name}.models")
        _known([route.fallback] if route.fallback else [], models, f"{what}: routers.{name}.fallback")
        if route.fallback and route.floor is None:
            raise UserError(f"{what}: routers.{name}.fallback is for abstention; give a floor, too")
    for name, policy in config.policies.items():
        _known(policy.models, models, f"{what}: policies.{name}.models")
    for name, key in config.keys.items():
        if not re.fullmatch(r"[\w.-]{1,64}", name):
            raise UserError(
                f"{what}: keys.{name}: a key's name has letters, digits, dots, - and _ only, at most 64"
            )
        _known(key.models or (), config.names, f"{what}: keys.{name}.models")


def _known(given: Iterable[str], options: Iterable[str], where: str) -> None:
    names = list(options)
    for one in given:
        if one not in names:
            raise UserError(f"{where} names {one!r}, which is not there; {suggest(one, names)}")


def _check_secrets(config: Config, what: str) -> None:
    """Secrets are named here, never given."""
    named = {f"upstreams.{name}.key": one.key for name, one in config.upstreams.items() if one.key}
    named |= {f"keys.{name}.secret": one.secret for name, one in config.keys.items()}
    for place, variable in named.items():
        if not VARIABLE.fullmatch(variable):
            # The value is not shown: it may be the secret itself.
            raise UserError(
                f"{what}: {place} is the name of an environment variable that holds the secret, such as "
                "TEAM_KEY; what stands there is none"
            )
    for name, upstream in config.upstreams.items():
        if not upstream.address.startswith(("http://", "https://")):
            raise UserError(f"{what}: upstreams.{name}.address must be one such as http://127.0.0.1:8000/v1")
        if "@" in upstream.address.partition("//")[2].partition("/")[0]:
            raise UserError(f"{what}: upstreams.{name}.address has a secret in it; give it by key")


def _check_prices(config: Config, cards: Mapping[str, ModelCard], what: str) -> None:
    """Where a budget must hold, what is asked must have a price."""
    for name, key in config.keys.items():
        if key.budget is None:
            continue
        for one in _reachable(config, key.models or config.names):
            if not cards[one].is_priced:
                raise UserError(
                    f"{what}: models.{one} has no prices, and the key {name} has a budget; give input_price "
                    "and output_price in dollars a million tokens, 0 for a model of your own"
                )


def _reachable(config: Config, names: Iterable[str]) -> dict[str, None]:
    """Models that a request for one of these names may be sent to."""
    found: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in config.policies:
            waiting += config.policies[name].models
        elif name in config.routers:
            route = config.routers[name]
            waiting += [*(route.models or config.models), *([route.fallback] if route.fallback else [])]
        elif name not in found:
            found[name] = None
            waiting += config.models[name].fallbacks
    return found

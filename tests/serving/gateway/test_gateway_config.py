"""Mistakes in a configuration end in one sentence that names the place and the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")
pytest.importorskip("aiohttp")
pytest.importorskip("limits")

from mixtura.data.yaml_core import parse_yaml
from mixtura.errors import UserError
from mixtura.serving.gateway.config import parse_config, read_config
from mixtura.serving.gateway.opening import open_gateway

WHOLE = """
upstreams:
  local: {address: http://127.0.0.1:8000/v1}
models:
  small:
    {upstream: local, model: specimen, input_price: 0.1, output_price: 0.2, context: 4096, abilities: [tools]}
  large: {upstream: local, input_price: 1, output_price: 2, fallbacks: [small]}
policies:
  careful: {aggregator: cascade, models: [small, large], settings: {num_samples: 2}}
keys:
  alice: {secret: ALICE_KEY, budget: 1.5, models: [careful]}
ledger: "sqlite:///a.db"
"""
OTHERS = {"ALICE_KEY": "a", "UP": "b"}


def test_what_is_right_is_read() -> None:
    config, cards = parse_config(parse_yaml(WHOLE, "it"), "it", Path())
    assert config.names == ("small", "large", "careful")
    assert (cards["small"].model, cards["small"].input_price, cards["small"].context) == (
        "specimen",
        100_000,
        4096,
    )
    assert cards["small"].abilities == {"tools"}
    assert config.keys["alice"].limit == 1_500_000_000_000


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("upstreams:", "upstream:", "there is no 'upstream'; did you mean 'upstreams'?"),
        ("input_price: 0.1", "input_prise: 0.1", "no 'models.small.input_prise'; did you mean 'input_price'"),
        ("fallbacks: [small]", "fallback: [small]", "no 'models.large.fallback'; did you mean 'fallbacks'?"),
        ("fallbacks: [small]", "fallbacks: [smal]", "models.large.fallbacks names 'smal', which is"),
        ("upstream: local, model", "upstream: lokal, model", "'lokal', which is not there; did you mean"),
        ("models: [careful]", "models: [carefull]", "keys.alice.models names 'carefull', which"),
        ("budget: 1.5", "budjet: 1.5", "there is no 'keys.alice.budjet'; did you mean 'budget'?"),
        ("budget: 1.5", "budget: -1", "keys.alice.budget: Input should be greater than or equal to 0"),
        ("budget: 1.5", "budget: .inf", "keys.alice.budget"),
        ("secret: ALICE_KEY, ", "", "keys.alice.secret is missing"),
        ("input_price: 1, output_price: 2, ", "", "models.large has no prices, and the key alice has"),
        ("output_price: 2", "output_price: dear", "output_price of large in it, models.large must be"),
        ("address: http", "adress: http", "did you mean 'address'?"),
        ("address: http://127.0.0.1", "address: 127.0.0.1", "must be one such as http://127.0.0.1:8000/v1"),
        ("  careful:", "  small:", "'small' is the name of two things"),
        ("  alice:", "  a@b:", "a key's name has letters"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(old: str, new: str, said: str) -> None:
    assert old in WHOLE
    with pytest.raises(UserError) as error:
        parse_config(parse_yaml(WHOLE.replace(old, new), "it"), "it", Path())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["secret: ALICE_KEY", "address: http://127.0.0.1:8000/v1"])
def test_a_secret_in_the_file_is_refused_and_not_repeated(place: str) -> None:
    secret = {"secret: ALICE_KEY": "secret: sk-very-secret"}
    given = secret.get(place, "address: http://me:sk-very-secret@h/v1")
    with pytest.raises(UserError) as error:
        parse_config(parse_yaml(WHOLE.replace(place, given), "it"), "it", Path())
    assert "sk-very-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("aggregator: cascade", "aggregator: kascade", "did you mean 'cascade'"),
        ("num_samples: 2", "num_sample: 2", "num_samples"),
        ("aggregator: cascade", "aggregator: medprompt", "cannot be served: medprompt needs examples"),
        ("secret: ALICE_KEY", "secret: BOB_KEY", "environment variable BOB_KEY, which is not set"),
        ("sqlite:///a.db", "mysql://h/d", "SQLite or PostgreSQL, not mysql"),
        ("sqlite:///a.db", "nonsense", "no database URL"),
        ("sqlite:///a.db", "sqlite:////no/such/folder/a.db", "cannot be opened"),
        ("sqlite:///a.db", "$LEDGER_URL", "LEDGER_URL, which is not set"),
        ("sqlite:///a.db", "postgresql://me:sk-very-secret@h/d", "password in it"),
        ("policies:", "routers: {auto: {path: nowhere}}\npolicies:", "there is no router in"),
        ("{address: http", "{key: UPSTREAM, address: http", "UPSTREAM; set it"),
    ],
)  # fmt: skip
def test_what_cannot_be_opened_is_said_before_anybody_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = WHOLE.replace(old, new)
    if "medprompt" in new:
        text = text.replace(", settings: {num_samples: 2}", "")
    (tmp_path / "gateway.yaml").write_text(text)
    config, cards = read_config(tmp_path / "gateway.yaml")
    with pytest.raises(UserError) as error:
        open_gateway(config, cards, OTHERS)
    assert said in str(error.value)
    assert "sk-very-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"), [(None, "cannot read"), ("[1]", "no upstreams"), ("a: [", "not YAML")]
)
def test_no_configuration_at_all(tmp_path: Path, text: Any, said: str) -> None:
    path = tmp_path / "gateway.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_config(path)

"""YAML by the core schema: numbers are numbers, words are words, and keys are given once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtura.data.yaml_core import parse_yaml
from mixtura.errors import SettingError, UserError
from mixtura.train.config import read_config


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-3", 0.001),
        ("3E4", 30000.0),
        ("-1e+2", -100.0),
        ("1.e1", 10.0),
        (".5", 0.5),
        ("+.5e1", 5.0),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        ("-.inf", -math.inf),
        ("010", 10),
        ("-007", -7),
        ("0o10", 8),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("2026-11-27", "2026-11-27"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("=", "="),
        ("1e", "1e"),
        ("e3", "e3"),
        ("'1e-3'", "1e-3"),
        ("!!str 5", "5"),
        ("top_k", "top_k"),
    ],
)
def test_a_word_is_what_it_looks_like(word: str, value: Any) -> None:
    found = parse_yaml(f"key: {word}", "a test")["key"]
    assert found == value
    assert type(found) is type(value)


def test_structures_are_those_of_pyyaml() -> None:
    text = """
    base: &base {a: 1, b: [x, 2.5, null]}
    more:
      <<: *base
      b: |
        lines
        of text
    again: *base
    1: one
    """
    assert parse_yaml(text, "a test") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is given twice.*line 3"),
        ("a: {b: 1, 'b': 2}", "the key 'b' is given twice"),
        ("a: [", "a test is not YAML"),
        ("!!python/object:os.system {}", "could not determine a constructor"),
        ("[" * 5000, "a test is not YAML"),
        ("9" * 5000, "a test is not YAML"),
        ("{[1]: 2}", "a test is not YAML"),
        ("a: 1\n---\nb: 2", "a test is not YAML"),
    ],
    ids=range(8),
)
def test_what_is_no_yaml_is_a_sentence(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        parse_yaml(text, "a test")
    assert len(str(refused.value)) < 500


def test_a_configuration_takes_numbers_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_bytes(b"\xef\xbb\xbftraining: {learning_rate: 1e-3, num_steps: 0500, bf16: true}\n")
    config = read_config(file, ["weight_decay=5e-2"])
    assert config.training.learning_rate == 0.001
    assert config.training.num_steps == 500
    assert config.training.weight_decay == 0.05


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("bf16=yes", "bf16 of training must be of type bool, got 'yes'; write true or false"),
        ("tokenizer=5", "tokenizer of data must be of type str, got 5; write it in quotes: '5'"),
        ("text=1e3", r"text of data must be of type str \| None, got 1000.0; write it in quotes"),
        ("learning_rate=1:30", "learning_rate of training must be of type float, got '1:30'"),
        ("router={name: top_k, name: switch}", "the key 'name' is given twice"),
    ],
)
def test_a_value_of_the_wrong_type_says_what_to_write(tmp_path: Path, change: str, says: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("seed: 0\n")
    with pytest.raises(SettingError, match=says):
        read_config(file, [change])

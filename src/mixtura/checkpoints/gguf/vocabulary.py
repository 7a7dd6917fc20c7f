"""A tokenizer as llama.cpp is told of it: from tokenizer.json, which says everything that it does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.errors import CheckpointError, UnsupportedModelError

_FILE = "tokenizer.json"
# Kinds of tokens, as the format numbers them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# How words are split before they are merged: by llama.cpp's name, the patterns of tokenizer.json's steps.
_GPT2 = "byte level"
_SPLITS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gpt-2": ((_GPT2,),),
    "smollm": (("digits", _GPT2),),
    "qwen2": (
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
            r"\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
    ),
    "llama-bpe": (
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
            r"\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
    ),
    "deepseek-v3": (
        (
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
            " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        ),
    ),
}


@final
@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer under the format's own names."""

    fields: dict[str, Any]


def vocabulary(path: Path, num_embeddings: int) -> Vocabulary:
    """What the file says of the tokenizer of a model directory.

    Args:
        path: the directory.
        num_embeddings: rows of the model's embedding; tokens that the tokenizer has not are unused ones.

    Raises:
        CheckpointError: there is no tokenizer.json, or it is damaged.
        UnsupportedModelError: llama.cpp has no tokenizer that does the same.
    """
    stated = _read(path / _FILE)
    model = stated["model"]
    tokens, kinds = _tokens(stated, num_embeddings)
    fields: dict[str, Any] = {"tokens": tokens, "token_type": kinds}
    if model.get("byte_fallback"):
        fields |= {"model": "llama", "scores": _scores(model, tokens)} | _spaces(stated)
    else:
        fields |= {
            "model": "gpt2",
            "pre": _split_name(stated),
            "merges": [" ".join(m) for m in _merges(model)],
        }
    tokenizer = load_tokenizer(path)
    return Vocabulary(fields | _special(tokenizer) | _templates(tokenizer))


def _read(file: Path) -> dict[str, Any]:
    try:
        stated: Any = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {file}, from which the tokenizer goes into a GGUF file; save the tokenizer again "
            f"with transformers, which writes it"
        ) from None
    except ValueError:
        raise CheckpointError(f"{file} is damaged: it holds no JSON; download it again") from None
    found: dict[str, Any] = stated if isinstance(stated, dict) else {}
    kind = found.get("model", {}).get("type")
    if kind != "BPE":
        raise UnsupportedModelError(
            f"{file} holds a tokenizer of the type {kind}; only BPE can be written to GGUF files"
        )
    return found


def _tokens(stated: dict[str, Any], num_embeddings: int) -> tuple[list[str], list[int]]:
    """Every token by its number, and its kind."""
    model = stated["model"]
    by_number = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(by_number, _NORMAL)
    if model.get("byte_fallback"):
        kinds |= {number: _BYTE for number, token in by_number.items() if _is_byte(token)}
    for added in stated.get("added_tokens", ()):
        by_number[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        kinds[unknown] = _UNKNOWN
    last = max(by_number, default=-1)
    if last >= num_embeddings:
        raise UnsupportedModelError(
            f"the tokenizer has a token {last}, and the model has {num_embeddings} embeddings; llama.cpp "
            f"needs one for each token"
        )
    numbers = range(num_embeddings)
    return [by_number.get(n, f"[PAD{n}]") for n in numbers], [kinds.get(n, _UNUSED) for n in numbers]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _merges(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """The earlier a token is made by merging, the higher its score: so the same pairs are merged first."""
    ranks: dict[str, int] = {}
    for rank, (first, second) in enumerate(_merges(model)):
        ranks.setdefault(first + second, rank)
    least = -float(len(ranks) + 1)
    return [-float(ranks[token]) if token in ranks else least for token in tokens]


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A step of tokenizer.json as the plain steps it is made of."""
    if step is None:
        return []
    parts = step.get("pretokenizers", step.get("normalizers"))
    return [step] if parts is None else [one for part in parts for one in _steps(part)]


def _split_name(stated: dict[str, Any]) -> str:
    """llama.cpp's name of how words are split."""
    words = []
    for step in _steps(stated.get("pre_tokenizer")):
        if step["type"] == "Split":
            words.append(str(step["pattern"].get("Regex", step["pattern"].get("String"))))
        elif step["type"] == "Digits" and step.get("individual_digits"):
            words.append("digits")
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            words += [_GPT2] if step.get("use_regex", True) else []
        else:
            words.append(step["type"])
    normalizers = [one["type"] for one in _steps(stated.get("normalizer"))]
    found = next((name for name, ways in _SPLITS.items() if tuple(words) in ways), None)
    if found is None or set(normalizers) - {"NFC"}:
        raise UnsupportedModelError(
            f"llama.cpp's ways to split text into words are known here for {', '.join(_SPLITS)}, and this "
            f"tokenizer splits otherwise ({', '.join(words + normalizers)[:200]})"
        )
    return found


def _spaces(stated: dict[str, Any]) -> dict[str, Any]:
    """Whether a space is put before the text, of a tokenizer that marks spaces in its tokens."""
    types = {one["type"] for key in ("normalizer", "pre_tokenizer") for one in _steps(stated.get(key))}
    if not types & {"Prepend", "Replace", "Metaspace"} or types - {"Prepend", "Replace", "Metaspace"}:
        raise UnsupportedModelError(
            f"llama.cpp knows tokenizers with byte fallback that mark spaces, and this one has the steps "
            f"{', '.join(sorted(types)) or 'none'}"
        )
    metaspace = [s for s in _steps(stated.get("pre_tokenizer")) if s["type"] == "Metaspace"]
    before = "Prepend" in types or any(step.get("prepend_scheme") != "never" for step in metaspace)
    return {"add_space_prefix": before}


def _special(tokenizer: Any) -> dict[str, Any]:
    """Numbers of tokens with a meaning, and which of them begin and end every text."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    fields: dict[str, Any] = {name: int(number) for name, number in ids.items() if number is not None}
    encoded = tokenizer("a")["input_ids"]
    begins = bool(encoded) and encoded[0] == tokenizer.bos_token_id
    ends = bool(encoded) and encoded[-1] == tokenizer.eos_token_id
    return fields | {"add_bos_token": begins, "add_eos_token": ends}


def _templates(tokenizer: Any) -> dict[str, Any]:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return {"chat_template": str(template)} if template else {}

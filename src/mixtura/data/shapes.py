"""The shapes of records that text is given in: plain, a question and its answer, a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixtura.data.records import Document, TextError, readable
from mixtura.errors import counted_names

# What a record holds, in the order in which it is looked for.
SHAPES = (
    ("text",),
    ("prompt", "answer"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("messages",),
    ("conversations",),
)
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def has_shape(entry: Any) -> bool:
    """Whether a JSON value is an object of one of `SHAPES`."""
    return isinstance(entry, dict) and any(set(keys) <= entry.keys() for keys in SHAPES)


def document_of(entry: Any, domain: str, name: str, where: str, tokenizer: Any | None) -> Document:
    """The document that a JSON value describes; its own "domain" comes before the one given.

    Raises:
        TextError: it has none of `SHAPES`, or is wrong in it; names ``where`` it stands.
    """
    if not isinstance(entry, dict):
        raise TextError(f"{where} is not a JSON object; give one object a line")
    keys = next((keys for keys in SHAPES if set(keys) <= entry.keys()), None)
    if keys is None:
        raise TextError(
            f"{where} has {counted_names(map(repr, entry), 8) or 'no keys'}; give "
            + ", or ".join(" with ".join(map(repr, keys)) for keys in SHAPES).replace("'", '"')
        )
    domain = _domain(entry, domain, where)
    if keys == ("text",):
        return Document(_string(entry, "text", where), domain, name)
    turns = conversation_of(entry, where)
    if turns is not None:
        return Document(word_chat(turns, tokenizer, where), domain, name)
    prompt, answer = _asked(entry, keys, where)
    return Document(prompt + answer, domain, name, prompt, answer)


def conversation_of(entry: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The turns of a record that is a conversation; None for another.

    Raises:
        TextError: it is malformed; names ``where`` it stands.
    """
    keys = next((keys for keys in SHAPES if set(keys) <= entry.keys()), ())
    if keys == ("prompt", "completion") and isinstance(entry["prompt"], list):
        return [*_turns(entry["prompt"], "prompt", where), *_turns(entry["completion"], "completion", where)]
    if len(keys) != 1 or keys == ("text",):
        return None
    turns = _turns(entry[keys[0]], keys[0], where)
    if isinstance(entry.get("system"), str) and entry["system"] and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": readable(entry["system"])}, *turns]
    return turns


def word_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any | None,
    where: str,
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as the model's chat template words it; ``variables`` are others that the template knows.

    Raises:
        TextError: there is no such template, or it does not take these messages.
    """
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        raise TextError(f'the messages in {where} need a model with a chat template; give "text" instead')
    try:
        worded = tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(variables or {}),
        )
    except Exception as error:
        # A template is a program of the model's author, and raises what it likes.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TextError(
            f"the model's chat template does not take the messages in {where}: {reason}"
        ) from error
    return readable(str(worded))


def _domain(entry: Mapping[str, Any], domain: str, where: str) -> str:
    own = entry.get("domain")
    if own is None or own == "":
        return domain
    if isinstance(own, bool) or not isinstance(own, str | int | float):
        raise TextError(f'"domain" in {where} must be a string, got {type(own).__name__}')
    return readable(str(own))


def _string(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry[key]
    if not isinstance(value, str):
        raise TextError(f'"{key}" in {where} must be a string, got {type(value).__name__}')
    return readable(value)


def _asked(entry: Mapping[str, Any], keys: tuple[str, ...], where: str) -> tuple[str, str]:
    """A question and its answer, to be read one after the other."""
    prompt, answer = _string(entry, keys[0], where), _string(entry, keys[1], where)
    if keys[0] == "instruction" and entry.get("input") not in (None, ""):
        prompt = f"{prompt}\n\n{_string(entry, 'input', where)}"
    # A completion may begin with its own space.
    parted = not prompt or prompt[-1].isspace() or (keys[1] == "completion" and answer[:1].isspace())
    return prompt if parted else f"{prompt}\n", answer


def _turns(messages: Any, key: str, where: str) -> list[dict[str, Any]]:
    """The turns of a conversation with "role" and "content", whichever of two ways they are written in."""
    if not isinstance(messages, list) or not messages:
        raise TextError(f'"{key}" in {where} must be a list of objects with "role" and "content"')
    return [_turn(message, key, where) for message in messages]


def _turn(message: Any, key: str, where: str) -> dict[str, Any]:
    known = message if isinstance(message, dict) else {}
    role, content = known.get("role"), known.get("content")
    if "from" in known and "value" in known:
        role, content = _ROLES.get(str(known["from"])), known["value"]
        if role is None:
            raise TextError(
                f'"{key}" in {where} has a turn from {known["from"]!r}; known are {", ".join(_ROLES)}'
            )
    elif not isinstance(role, str) or "content" not in known:
        raise TextError(
            f'"{key}" in {where} must be a list of objects with "role" and "content", or "from" and "value"'
        )
    rest = {name: value for name, value in known.items() if name not in ("from", "value")}
    return rest | {"role": role, "content": content}

"""Conversations as a model's chat template words them, and answers taken apart.

Both are transformers': its chat templates, its parser of answers and the templates of answers it knows by
family.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final, final

from transformers import PreTrainedModel
from transformers.utils.chat_parsing import ResponseParser

from mixtura.data.shapes import word_chat
from mixtura.serving.api.refusals import ApiError
from mixtura.serving.api.schemas import ChatRequest, Message

_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
# Arguments of the template's function that a request may not take over.
_OWN_VARIABLES: Final = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs",
}  # fmt: skip


@final
class Answering:
    """What a model's answers are made of: how they are asked for and how they are taken apart."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template = _template_of(model, tokenizer)

    def prompt(self, request: ChatRequest) -> str:
        """The conversation of a request in the words that the model learned, up to its answer.

        Raises:
            ApiError: the model has no chat template, or its template has no place for tools.
            TextError: the template does not take these messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise ApiError(
                "this model's tokenizer has no chat template; use /v1/completions with a prompt of your own",
                param="messages",
            )
        messages = [_plain(message) for message in request.messages]
        variables = dict(request.chat_template_kwargs or {})
        if wrong := sorted(variables.keys() & _OWN_VARIABLES):
            raise ApiError(
                f"chat_template_kwargs may not have {wrong[0]!r}", param=f"chat_template_kwargs.{wrong[0]}"
            )
        if request.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", request.reasoning_effort)
        tools = self._tools(request)
        worded = self._worded(messages, tools, variables)
        if tools and worded == self._worded(messages, None, variables):
            raise ApiError(
                "this model's chat template does not show tools to the model; leave tools out", param="tools"
            )
        if tools and not self.parses(worded):
            raise _unknown_calls()
        return worded

    def parses(self, prompt: str) -> bool:
        """Whether answers to a prompt are taken apart.

        What is known of a family's answers holds for prompts in the family's own words only.
        """
        if self._template is None:
            return False
        anchor = self._template.get("start_anchor") or []
        anchors = [anchor] if isinstance(anchor, str) else list(anchor)
        return not anchors or any(one in prompt for one in anchors)

    def parser(self, request: ChatRequest, prompt: str) -> Parser:
        """What takes an answer to a prompt apart; arguments of calls have the types that tools say."""
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
        return Parser(ResponseParser(self._template, prefix=prompt, tools=tools))

    def _worded(self, messages: Sequence[Mapping[str, Any]], tools: Any, variables: Mapping[str, Any]) -> str:
        return word_chat(
            messages,
            self._tokenizer,
            "the request",
            add_generation_prompt=True,
            tools=tools,
            variables=variables,
        )

    def _tools(self, request: ChatRequest) -> list[dict[str, Any]] | None:
        choice = request.tool_choice
        if choice is not None and choice not in ("auto", "none"):
            raise ApiError(
                'tool_choice can be "auto" or "none" on this server: the model chooses which tool is called',
                param="tool_choice",
            )
        if not request.tools or choice == "none":
            return None
        if self._template is None or "tool_calls" not in self._template.get("fields", {}):
            raise _unknown_calls()
        return [tool.model_dump(exclude_none=True) for tool in request.tools]


def _template_of(model: PreTrainedModel, tokenizer: Any) -> Any:
    """How a model's answers are taken apart: as its tokenizer says, else as transformers knows its family."""
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        return own
    try:
        # Where its own server keeps them; a release may well move that.
        from transformers.cli.serving.utils import get_response_template
    except ImportError:
        return None
    return get_response_template(tokenizer, model)


def _unknown_calls() -> ApiError:
    return ApiError(
        "how this model writes calls of tools is not known, so they could not be found in its answer; leave "
        "tools out",
        param="tools",
    )


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates read it."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if content is None and not message.tool_calls:
        if message.role != "assistant":
            raise ApiError(f"a message of the role {message.role!r} has no content", param="messages")
        content = message.refusal or ""
    # What OpenAI calls the developer's message templates call the system's.
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    plain["content"] = content or ""
    for name in ("name", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            plain[name] = value
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


def _arguments(text: str) -> Any:
    """Arguments as the object that templates write out; as they are where they are none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


@final
class Parser:
    """Takes an answer apart while it comes; what transformers' parser cannot read stays text."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self._is_broken = False
        # What was fed since something came of it.
        self._unsaid = ""
        self.num_calls = 0

    def feed(self, text: str) -> list[dict[str, Any]]:
        """What is new: changes of a message as OpenAI streams them."""
        made: list[dict[str, Any]] = []
        for place, letter in enumerate(text):
            if self._is_broken:
                return [*made, {"content": text[place:]}]
            self._unsaid += letter
            try:
                # One by one: what comes of the others is not lost with the one that cannot be read.
                found = self._changes(self._parser.feed(letter))
            except (ValueError, KeyError, TypeError):
                found = self._given_up()
            if found:
                self._unsaid = ""
            made += found
        return _merged(made)

    def end(self) -> list[dict[str, Any]]:
        """What is left when the answer is over."""
        if self._is_broken:
            return []
        try:
            _, events = self._parser.finalize()
            return self._changes(events)
        except (ValueError, KeyError, TypeError):
            return self._given_up()

    def _given_up(self) -> list[dict[str, Any]]:
        self._is_broken = True
        return [{"content": self._unsaid}] if self._unsaid else []

    def _changes(self, events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for event in events:
            field, text = event.get("field"), event.get("text")
            if event["type"] == "region_chunk" and not event.get("dirty") and text:
                name = "reasoning_content" if field in _REASONING else field
                if name in ("content", "reasoning_content"):
                    made.append({name: text})
            elif event["type"] == "region_close" and field == "tool_calls":
                made.append({"tool_calls": [self._call(event["value"])]})
        return made

    def _call(self, value: Mapping[str, Any]) -> dict[str, Any]:
        function = value["function"]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments)
        self.num_calls += 1
        return {
            "index": self.num_calls - 1,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": str(function["name"]), "arguments": arguments},
        }


def _merged(changes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Changes with neighbours of one text in one."""
    made: list[dict[str, Any]] = []
    for change in changes:
        (name,) = change
        if made and name in made[-1] and name != "tool_calls":
            made[-1] = {name: made[-1][name] + change[name]}
        else:
            made.append(change)
    return made

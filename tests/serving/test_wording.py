"""Conversations in a family's words, and its answers taken apart."""

from __future__ import annotations

import json
from typing import Any

import pytest
from families import tiny_model
from tiny_checkpoints import tiny_tokenizer

pytest.importorskip("fastapi")

from mixtura.serving.api.refusals import ApiError
from mixtura.serving.api.schemas import ChatRequest
from mixtura.serving.api.wording import Answering

# As Qwen's words them, in short.
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.arguments.city }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ANSWER = (
    "<think>\nWhere is it?\n</think>\nLet me look."
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def answering() -> Answering:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Answering(tiny_model("qwen3_moe"), tokenizer)


def request(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "Warm?"}], **more})


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_reasoning_and_calls_are_found_however_they_come(answering: Answering, size: int) -> None:
    prompt = answering.prompt(request(tools=[TOOL]))
    assert "weather" in prompt
    parser = answering.parser(request(tools=[TOOL]), prompt)
    changes = [c for first in range(0, len(ANSWER), size) for c in parser.feed(ANSWER[first : first + size])]
    changes += parser.end()
    assert "".join(change.get("reasoning_content", "") for change in changes).strip() == "Where is it?"
    assert "".join(change.get("content", "") for change in changes).strip() == "Let me look."
    calls = [call for change in changes for call in change.get("tool_calls", ())]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [
        {"city": "Oslo"},
        {"city": "Rome"},
    ]
    assert [call["index"] for call in calls] == [0, 1]
    assert len({call["id"] for call in calls}) == parser.num_calls


def test_a_call_that_is_no_json_does_not_end_the_answer(answering: Answering) -> None:
    parser = answering.parser(request(), answering.prompt(request()))
    changes = parser.feed("So: <tool_call>{broken</tool_call> and more") + parser.end()
    text = "".join(change.get("content", "") for change in changes)
    assert text == "So: <tool_call>{broken</tool_call> and more"


def test_earlier_calls_and_variables_reach_the_template(answering: Answering) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turns = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "9 C", "tool_call_id": "1"},
    ]
    prompt = answering.prompt(request(messages=turns, chat_template_kwargs={"enable_thinking": False}))
    assert "system\nBe brief." in prompt
    assert "<call>Oslo</call>" in prompt
    assert prompt.endswith("</think>\n")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages'"),
        ({"messages": [{"role": "user"}]}, "no content"),
    ],
)
def test_what_cannot_be_is_said(answering: Answering, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ApiError) as caught:
        answering.prompt(request(**more))
    assert said in caught.value.message


def test_tools_are_refused_where_calls_would_not_be_found() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<|im_start|>", "#")
    other = Answering(tiny_model("qwen3_moe"), tokenizer)
    assert not other.parses(other.prompt(request()))
    with pytest.raises(ApiError) as caught:
        other.prompt(request(tools=[TOOL]))
    assert "not known" in caught.value.message

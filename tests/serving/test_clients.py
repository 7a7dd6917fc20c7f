"""Other people's clients against a real server: LiteLLM, LangChain and lm-eval.

They bring heavy packages of their own, so they may live in another environment: MIXTURA_CLIENTS names its
Python (`pip install litellm langchain-openai "lm-eval[api]" transformers` there). Each is asked in a process
of its own; one that is not installed is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")

import torch
from served import QUESTION, Server
from serving_helpers import PATIENCE_S, SPECIMEN

from mixtura.running.generation import generate, new_tokens

pytestmark = pytest.mark.slow

PYTHON = os.environ.get("MIXTURA_CLIENTS", sys.executable)
TEXTS = ("Question: 3 + 4 = ?", "What is 17 + 28?\nAnswer: 45", "sort: 3 1 2")

LITELLM = """
import litellm
common = {"model": "openai/tiny", "api_base": base, "api_key": "none", "temperature": 0, "max_retries": 0}
messages = [{"role": "user", "content": question}]
whole = litellm.completion(messages=messages, max_tokens=60, **common)
parts = litellm.completion(messages=messages, max_tokens=60, stream=True, **common)
common_text = {**common, "model": "text-completion-openai/tiny"}
text = litellm.text_completion(prompt=texts[0], max_tokens=4, **common_text)
try:
    litellm.completion(messages=messages, **{**common, "model": "openai/another"})
    refused = None
except litellm.NotFoundError as error:
    refused = str(error)
say({
    "whole": whole.choices[0].message.content,
    "parts": "".join(part.choices[0].delta.content or "" for part in parts),
    "text": text.choices[0].text,
    "used": whole.usage.completion_tokens,
    "refused": refused,
})
"""
LANGCHAIN = """
from langchain_openai import ChatOpenAI, OpenAI
common = {"model": "tiny", "base_url": base, "api_key": "none", "temperature": 0, "max_retries": 0}
chat = ChatOpenAI(max_tokens=60, **common)
say({
    "whole": chat.invoke(question).content,
    "parts": "".join(part.content for part in chat.stream(question)),
    "batch": [one.content for one in chat.batch([question, question])],
    "text": OpenAI(max_tokens=4, **common).invoke(texts[0]),
    "used": chat.invoke(question).usage_metadata["output_tokens"],
})
"""
HARNESS = """
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
lm = LocalCompletionsAPI(
    base_url=base + "/completions", model="tiny", tokenizer=tokenizer, tokenizer_backend="huggingface",
    batch_size=2, num_concurrent=2, max_length=256, max_retries=1,
)
pairs = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
until = {"until": ["\\n"], "max_gen_toks": 8}
kinds = {"loglikelihood": pairs, "generate_until": [(text, dict(until)) for text in texts]}
made = {}
for kind, asked in kinds.items():
    wanted = [Instance(request_type=kind, doc={}, arguments=one, idx=n) for n, one in enumerate(asked)]
    made[kind] = getattr(lm, kind)(wanted)
encoded = [lm._encode_pair(*pair) for pair in pairs]
say({**made, "pairs": encoded, "prompts": [lm.tok_encode(text) for text in texts]})
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server(SPECIMEN)
    yield made
    made.opened.engine.close(0)


def asked_by(package: str, script: str, server: Server) -> dict[str, Any]:
    """What a script says that asks a server through a package."""
    if subprocess.run([PYTHON, "-c", f"import {package}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{package} is not installed")
    known = {"base": f"http://127.0.0.1:{server.port}/v1", "question": QUESTION, "texts": TEXTS}
    lines = ["import json", "say = lambda found: print('said:' + json.dumps(found))"]
    lines += [f"{name} = {value!r}" for name, value in {**known, "tokenizer": str(SPECIMEN)}.items()]
    done = subprocess.run(
        [PYTHON, "-c", "\n".join(lines) + script],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("said:")]
    assert found, done.stderr[-3000:]
    made: dict[str, Any] = json.loads(found[-1].removeprefix("said:"))
    return made


def by_itself(server: Server, text: str, num: int, *, chat: bool = False) -> str:
    opened = server.opened
    made = generate(opened.engine.model, opened.tokenizer, text, chat=chat, max_new_tokens=num)
    return made.text


@pytest.mark.parametrize(("package", "script"), [("litellm", LITELLM), ("langchain_openai", LANGCHAIN)])
def test_chats_and_texts(server: Server, package: str, script: str) -> None:
    found = asked_by(package, script, server)
    said = by_itself(server, QUESTION, 60, chat=True)
    assert found["whole"] == found["parts"] == said
    assert found.get("batch", [said]) == [said] * len(found.get("batch", [said]))
    assert found["text"] == by_itself(server, TEXTS[0], 4)
    assert found["used"] > 5
    assert "another" in found.get("refused", "another")


def test_a_harness_gets_the_likelihoods_of_the_model(server: Server) -> None:
    found = asked_by("lm_eval", HARNESS, server)
    model: Any = server.opened.engine.model
    for (context, rest), (said, is_greedy) in zip(found["pairs"], found["loglikelihood"], strict=True):
        ids = context + rest
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        places = range(len(context) - 1, len(ids) - 1)
        expected = sum(float(logprobs[place, ids[place + 1]]) for place in places)
        assert said == pytest.approx(expected, abs=1e-2)
        assert is_greedy == all(int(logprobs[place].argmax()) == ids[place + 1] for place in places)
    for ids, said in zip(found["prompts"], found["generate_until"], strict=True):
        made = new_tokens(model, torch.tensor(ids), max_new_tokens=8)
        text = server.opened.tokenizer.decode(made, skip_special_tokens=True)
        assert said == text.partition("\n")[0]

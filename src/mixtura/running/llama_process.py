"""A process that runs a GGUF file in llama.cpp and reports what it took and made: run as a module.

It reads a request from standard input and imports nothing of PyTorch, so that what it takes is llama.cpp's.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from typing import Any

_PROMPT = 64


def main() -> None:
    """Answer one request; see `mixtura.running.llama`."""
    request = json.load(sys.stdin)
    import numpy as np

    llama_cpp: Any = import_module("llama_cpp")

    answer: dict[str, Any] = {}
    if request["path"] is None:
        llama_cpp.llama_backend_init()
    else:
        has_scores = bool(request["sequences"])
        leave_weights(llama_cpp)
        llama = llama_cpp.Llama(
            request["path"],
            n_ctx=request["context"],
            n_threads=request["threads"],
            n_threads_batch=request["threads"],
            logits_all=has_scores,
            verbose=False,
        )
        answer["answers"] = [_written(llama, *prompt) for prompt in request["prompts"]]
        answer["losses"] = [_loss(llama, np, ids) for ids in request["sequences"]]
        if request["num_new_tokens"]:
            answer |= _timed(llama, request["context"], request["num_new_tokens"])
    from mixtura.running.memory.process import peak_resident_bytes

    answer["peak_bytes"] = peak_resident_bytes()
    sys.stdout.write(json.dumps(answer) + "\n")


def leave_weights(llama_cpp: Any) -> None:
    """Have weights used as they lie in the file: no second copy in another order, which no account has.

    The copies for AMX also end the process on some machines (llama-cpp-python 0.3.36, tensors in q4_0).
    """
    defaults = llama_cpp.llama_model_default_params

    def without() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    # Where the class that runs a file looks for it.
    llama_cpp.llama_cpp.llama_model_default_params = without


def _written(llama: Any, prompt: str, num_tokens: int) -> str:
    made = llama.create_completion(prompt, max_tokens=num_tokens, temperature=0.0, repeat_penalty=1.0)
    return str(made["choices"][0]["text"])


def _loss(llama: Any, np: Any, ids: list[int]) -> float:
    """Negative log-likelihood of the tokens after the first, added up."""
    llama.reset()
    llama.eval(ids)
    logits = np.array(llama.scores[: len(ids) - 1], dtype=np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    total = np.log(np.exp(shifted).sum(1))
    return float((total - shifted[np.arange(len(ids) - 1), ids[1:]]).sum())


def _timed(llama: Any, context: int, num_new_tokens: int) -> dict[str, float]:
    """Fill the context, and time tokens after a short prompt."""
    vocabulary = llama.n_vocab()
    spread = [(7919 * place) % vocabulary for place in range(max(1, context - num_new_tokens))]
    for prompt in (spread, spread[: min(_PROMPT, len(spread))]):
        llama.reset()
        llama.eval(prompt)
        started = time.perf_counter()
        for _ in range(num_new_tokens):
            llama.eval([llama.sample(temp=0.0)])
        seconds = time.perf_counter() - started
    return {"tokens_per_second": num_new_tokens / seconds}


if __name__ == "__main__":
    main()

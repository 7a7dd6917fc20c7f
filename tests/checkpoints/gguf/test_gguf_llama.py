"""What llama.cpp itself makes of the files: the logits, the tokens and the loss that transformers gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_sources import CONFIGS, TEXT, save_source
from test_gguf import read
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixtura.data import specimen
from mixtura.running.gguf import export_gguf
from mixtura.running.llama_process import leave_weights

llama_cpp: Any = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed; pip install 'mixtura[llama]' compiles it"
)
pytestmark = pytest.mark.slow
# As mixtura runs files: copies of weights for AMX end the process on some machines.
leave_weights(llama_cpp)
LENGTH = 24


@contextmanager
def running(path: Path, length: int = 128) -> Iterator[Any]:
    """A file in llama.cpp, with everything that it could round in float32."""
    llama = llama_cpp.Llama(
        str(path), n_ctx=length, n_batch=length, n_threads=1, n_threads_batch=1, logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
    )  # fmt: skip
    try:
        yield llama
    finally:
        llama.close()


def logits_there(llama: Any, ids: list[int]) -> torch.Tensor:
    """Logits at every position."""
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(np.array(llama.scores[: len(ids)]))


@pytest.mark.parametrize("family", CONFIGS)
def test_the_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "model", family)
    export_gguf(source, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.randint(3, 300, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(ids).logits[0]
    with running(tmp_path / "model.gguf") as llama:
        found = logits_there(llama, ids[0].tolist())
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=2e-3 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_text_has_the_same_tokens(family: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "model", family)
    export_gguf(source, tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = (TEXT, "fox", " the  dog 2026", "Füchse 狐 🦊", "dogs<fox>dogs", "")
    with running(tmp_path / "model.gguf") as llama:
        for text in texts:
            assert llama.tokenize(text.encode(), special=True) == tokenizer(text)["input_ids"], text


def test_the_specimen_goes_on_with_the_same_text(tmp_path: Path) -> None:
    export_gguf(specimen.path(), tmp_path / "specimen.gguf", ["f32"])
    tokenizer = AutoTokenizer.from_pretrained(specimen.path())
    model = AutoModelForCausalLM.from_pretrained(specimen.path(), dtype=torch.float32)
    prompt = "def add(a, b):"
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(**ids, max_new_tokens=LENGTH, do_sample=False)[0]
    wanted = tokenizer.decode(made[ids["input_ids"].shape[1] :], skip_special_tokens=True)
    with running(tmp_path / "specimen.gguf", 512) as llama:
        found = llama(prompt, max_tokens=LENGTH, temperature=0.0)["choices"][0]["text"]
    assert found.strip()
    assert found == wanted


def test_the_specimens_loss_is_ours(tmp_path: Path) -> None:
    export_gguf(specimen.path(), tmp_path / "specimen.gguf", ["q8_0"])
    model = AutoModelForCausalLM.from_pretrained(specimen.path(), dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(specimen.path())(TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        wanted = float(model(ids, labels=ids).loss)
    with running(tmp_path / "specimen.gguf", 512) as llama:
        logits = logits_there(llama, ids[0].tolist())
    found = float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]))
    assert found == pytest.approx(wanted, rel=0.01)


def with_values(source: Path, tensors: dict[str, torch.Tensor]) -> Any:
    """The model of transformers with a file's values."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    dense = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate": "ffn_gate_inp",
    }
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
        "lm_head.weight": tensors["output.weight"],
    }
    for number in range(model.config.num_hidden_layers):
        own, there = f"model.layers.{number}", f"blk.{number}"
        state |= {f"{own}.{a}.weight": tensors[f"{there}.{b}.weight"] for a, b in dense.items()}
        gate, up, down = (tensors[f"{there}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        state[f"{own}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        state[f"{own}.mlp.experts.down_proj"] = down
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("kind", ["q2_k", "q4_k", "q6_k", "iq2_xxs", "iq3_s", "iq4_xs", "q4_0", "iq4_nl"])
def test_every_kind_of_type_is_run_as_it_was_rounded(kind: str, calibrate: bool, tmp_path: Path) -> None:
    if kind == "iq2_xxs" and not calibrate:
        pytest.skip("llama.cpp does not make it without importance")
    source = save_source(tmp_path / "model", "qwen3_moe", hidden_size=256, moe_intermediate_size=256)
    planned = export_gguf(source, tmp_path / "model.gguf", [f"experts={kind}"], calibrate=calibrate)
    assert kind in planned.types
    ids = torch.randint(3, 300, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = with_values(source, read(tmp_path / "model.gguf")[1])(ids).logits[0]
        before = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits[0]
    with running(tmp_path / "model.gguf") as llama:
        found = logits_there(llama, ids[0].tolist())
    # It multiplies with inputs of eight bits, for which a token now and then chooses another expert.
    error, rounding = (median_error(one, wanted) for one in (found, before))
    assert error < 0.04
    assert error < rounding


def median_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of all positions the middle one's error, as a share of its logits."""
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).median())

"""A model of an ordinary family's parts is that family's model: same logits, loadable without us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.tiny_models import some_ids, tiny_model
from transformers import AutoModelForCausalLM

from mixtura.checkpoints.view import open_model
from mixtura.errors import OutputError, UnsupportedModelError
from mixtura.modeling.family import export

DEEPSEEK = {"name": "deepseek_v3", "top_k": 2, "num_groups": 2, "top_groups": 1, "scaling": 1.5}
CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"query_key_norm": "none"},
    "qwen3_moe": {"query_key_norm": "head", "layers": ["dense", None], "head_dim": 16},
    "olmoe": {
        "query_key_norm": "full",
        "moe": {"router": {"name": "top_k", "top_k": 2, "renormalize": False}},
    },
    "dots1": {
        "query_key_norm": "head",
        "layers": ["dense", None],
        "moe": {"router": DEEPSEEK, "shared_width": 32, "balancers": ["loss_free"]},
    },
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", CASES)
def test_the_family_gives_the_same_logits(tmp_path: Path, family: str, tied: bool) -> None:
    fields = dict(CASES[family])
    model = tiny_model(fields.pop("moe", None), tie_word_embeddings=tied, **fields)
    bias = model.model.balance.of(0).bias
    if bias is not None:
        getattr(model.model.balance.of(0), "0_bias").copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    assert export(model, tmp_path / "out") == family
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    assert type(theirs).__module__.startswith(f"transformers.models.{family}.")
    torch.testing.assert_close(theirs(some_ids()).logits, model(some_ids()).logits)
    assert len(open_model(tmp_path / "out").layers) == len(model.model.blocks)


@pytest.mark.slow
def test_it_loads_where_mixtura_is_not_imported(tmp_path: Path) -> None:
    export(tiny_model(query_key_norm="none"), tmp_path / "out")
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "assert not [name for name in sys.modules if name.startswith('mixtura')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_no_family_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="the router top_k, not switch"):
        export(tiny_model({"router": "switch"}), tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="mixers"):
        export(tiny_model({"router": None, "mixer": "smear"}), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(OutputError, match="not empty"):
        export(tiny_model(query_key_norm="none"), tmp_path / "full")

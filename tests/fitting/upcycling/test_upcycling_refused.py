"""Bad input of upcycle and compose: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dense_checkpoints import save_dense
from tiny_checkpoints import run_mixtura, save_tiny

import mixtura
from mixtura.errors import UserError


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"top_k": 9, "experts": 8}, r"--top-k .* must be in \[1, 8\], got 9"),
        ({"experts": 1}, r"--experts of upcycle must be in \[2"),
        ({"method": "copeis"}, "did you mean 'copies'"),
        ({"settings": {"redrwn": 0.5}}, "no setting 'redrwn'; did you mean 'redrawn'"),
        ({"settings": {"redrawn": 2.0}}, r"redrawn of Copies must be in \[0, 1\]"),
        ({"target": "mixtrl"}, "did you mean 'mixtral'"),
        ({"target": "qwen3_moe"}, "qwen3_moe cannot hold this model: .*mixtral, granitemoeshared"),
        (
            {"target": "mixtral", "method": "sparse_unified_model"},
            "every token visits; granitemoeshared, qwen2_moe and",
        ),
        ({"method": "split", "experts": 7}, "48 wide, which 7 equal parts do not make"),
        ({"method": "dume"}, "dume makes one model of several: mixtura compose"),
    ],
)
def test_what_one_model_cannot_become(
    asked: dict[str, Any], said: str, dense: tuple[Path, ...], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        mixtura.upcycle(dense[0], tmp_path / "out", **{"measure": False, "text": text, **asked})
    # Other settings can be given for the same place at once.
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method": "copies"}, "copies takes one model: mixtura upcycle"),
        ({"method": "prompt_gates"}, r"needs prompts for each model: give --prompts FILE\.json"),
        ({"method": "random_gates", "experts": 4}, "3 sources are 3 experts, not 4; leave --experts out"),
        ({"method": "innovator", "experts": 3}, "2 models besides the first cannot share 3 experts"),
    ],
)
def test_what_several_models_cannot_become(
    asked: dict[str, Any], said: str, dense: tuple[Path, ...], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        mixtura.compose(dense, tmp_path / "out", measure=False, **asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("{", "is no JSON"),
        ("[]", "must hold an object of prompts by model"),
        ({"a": ["x y"], "b": ["x y"]}, "has prompts for .*c nowhere"),
        ({"a": ["x y"], "0": ["x y"], "b": ["x y"], "c": ["x y"]}, "has prompts for .*a twice"),
        ({"a": ["x y"], "b": ["x y"], "c": ["x y"], "d": ["x"]}, "for 'd', which is no model"),
        ({"a": [], "b": ["x y"], "c": ["x y"]}, "must be a list of texts that are not empty"),
        ({"a": {"fr": ["x y"]}, "b": ["x y"], "c": ["x y"]}, "expected 'for' and perhaps 'not_for'"),
        ({"a": "no-such-file", "b": ["x y"], "c": ["x y"]}, "no-such-file"),
    ],
)
def test_prompts_that_say_nothing(said: Any, error: str, dense: tuple[Path, ...], tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(said if isinstance(said, str) else json.dumps(said))
    with pytest.raises(UserError, match=error):
        mixtura.compose(dense, tmp_path / "out", prompts=file, measure=False)


def test_sources_that_do_not_match_are_named_tensor_by_tensor(
    dense: tuple[Path, ...], tmp_path: Path
) -> None:
    wider = save_dense(tmp_path / "wider", intermediate_size=64)
    with pytest.raises(UserError, match=r"wider does not match .*layers\.0\.mlp\.\w+\.weight, \[64, 32\] wh"):
        mixtura.compose([dense[0], wider], tmp_path / "out", method="random_gates", measure=False)
    other = save_dense(tmp_path / "other", "qwen3")
    with pytest.raises(UserError, match=r"other \(qwen3\) computes otherwise than .* \(llama\)"):
        mixtura.compose([dense[0], other], tmp_path / "out", method="random_gates", measure=False)


def test_what_only_configs_say_is_looked_at(dense: tuple[Path, ...], tmp_path: Path) -> None:
    heads = save_dense(tmp_path / "heads", num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(UserError, match=r"heads has \(8, 4, 4\) as numbers of heads.* \(4, 2, 8\)"):
        mixtura.compose([dense[0], heads], tmp_path / "out", method="random_gates", measure=False)
    eps = save_dense(tmp_path / "eps", rms_norm_eps=1e-3)
    made = mixtura.compose([dense[0], eps], tmp_path / "out", method="random_gates", measure=False)
    assert any("other rms_norm_eps than" in note for note in made.notes)


def test_commands_refuse_in_one_sentence(dense: tuple[Path, ...], tmp_path: Path) -> None:
    moe, out = save_tiny(tmp_path / "moe"), tmp_path / "out"
    for arguments, said in (
        (["upcycle", str(moe)], "Mixture-of-Experts model already"),
        (["upcycle", str(dense[0]), "--top-k", "9"], "--top-k"),
        (["compose", str(dense[0])], "give two directories or more"),
        (["upcycle", str(dense[0]), "--out", str(dense[0] / "in")], "lies inside it"),
    ):
        place = [] if "--out" in arguments else ["--out", str(out)]
        done = run_mixtura(*arguments, *place, "--no-measure")
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]

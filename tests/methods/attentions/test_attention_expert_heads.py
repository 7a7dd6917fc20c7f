"""Tokens that take what one head gathers beside plain loops, and the model that is left of a head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from methods.attentions.plain_heads import one_head
from modeling.tiny_models import some_ids, tiny_model
from tiny_checkpoints import run_mixtura

from mixtura import load, specimen
from mixtura.authoring.contracts._attended import SHAPE, gather, text
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data.tokens import vocabulary_size
from mixtura.errors import SettingError, UnsupportedModelError
from mixtura.methods.attentions.expert_heads import ExpertHeads
from mixtura.running.heads import ExpertHeadModel


@torch.no_grad()
def test_equals_plain_loops() -> None:
    method, given, width = ExpertHeads(SHAPE, width=20, seed=6), text(1), SHAPE.d_head
    found = gather(method, given)[0]
    groups = SHAPE.num_groups
    queries, keys, values = (one.weight.split(width) for one in (method.q_proj, method.k_proj, method.v_proj))
    for row in range(2):
        x = given.x[row]
        gates = (x.double() @ method.gate.double().T).softmax(-1)
        everyone = list(range(len(x)))
        by_head = [
            one_head(x, (queries[h], keys[h // groups], values[h // groups]), everyone, everyone)
            for h in range(SHAPE.num_heads)
        ]
        for t in everyone:
            best = max(range(SHAPE.num_heads), key=lambda h, t=t: float(gates[t, h]))
            hidden = method.up_proj.weight.double() @ by_head[best][t].double()
            made = method.o_proj.weight.double() @ (hidden * hidden.sigmoid()) * gates[t, best]
            torch.testing.assert_close(found[row, t].double(), made, rtol=1e-4, atol=1e-5)


def test_normed_over_all_heads_is_refused() -> None:
    with pytest.raises(SettingError, match="tokens of its own in each head"):
        ExpertHeads(SHAPE, query_key_norm="full")
    with pytest.raises(SettingError, match="width"):
        ExpertHeads(SHAPE, width=0)


@pytest.mark.parametrize("bias", [False, True])
def test_tokens_that_chose_a_head_that_stays_are_as_they_were_but_for_the_gate(
    bias: bool, tmp_path: Path
) -> None:
    model = tiny_model(num_hidden_layers=1, attention="expert_heads", attention_bias=bias)
    model.save_pretrained(tmp_path / "model")
    opened = ExpertHeadModel(tmp_path / "model")
    ids = some_ids(2, 12)
    old = opened.model.model(ids).head_routings[0]
    for head in range(4):
        left = opened.with_heads([[head]])
        before, after = opened.model.model.layers[0].self_attn, left.model.layers[0].self_attn
        x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(head))
        rows = slice(head * 8, head * 8 + 8)
        torch.testing.assert_close(after.q_proj(x), before.q_proj(x)[..., rows])
        shared = slice(head // 2 * 8, head // 2 * 8 + 8)
        torch.testing.assert_close(after.k_proj(x), before.k_proj(x)[..., shared])
        torch.testing.assert_close(after.v_proj(x), before.v_proj(x)[..., shared])
        new = left.model(ids).head_routings[0]
        assert new.load.tolist() == [24]
        assert new.weights.eq(1).all()
        assert left.num_parameters() < model.num_parameters()
    assert int(old.load.sum()) == 24
    # All heads of a layer but one: the routing among them is the old one where it chose one of them.
    rest = opened.with_heads([[0, 1, 3]]).model(ids).head_routings[0]
    new_of_old = {0: 0, 1: 1, 3: 2}
    for token, was in zip(old.token_ids.tolist(), old.expert_ids.tolist(), strict=True):
        if was in new_of_old:
            place = rest.token_ids.tolist().index(token)
            assert rest.expert_ids[place] == new_of_old[was]


def test_the_most_used_stay() -> None:
    usage = torch.tensor([[5, 9, 0, 9], [1, 1, 1, 1]])
    assert ExpertHeadModel.most_used(usage, 2) == [[1, 3], [0, 1]]


def test_the_command_leaves_the_heads_that_text_chooses(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(specimen.path())
    model = tiny_model(attention="expert_heads", vocab_size=vocabulary_size(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    said = ["--tokens", "300", "--out", str(tmp_path / "out"), "--json"]
    found = run_mixtura("condense", str(tmp_path / "model"), "--heads", "1", *said)
    assert found.returncode == 0, found.stderr
    kept = json.loads(found.stdout)["heads"]
    opened = ExpertHeadModel(tmp_path / "model")
    usage = opened.usage(opened.text(None, 300))
    assert usage.sum(-1).tolist() == [300, 300]
    assert kept == [[int(row.argmax())] for row in usage]
    ids = some_ids()
    torch.testing.assert_close(
        load(tmp_path / "out")(ids).logits, opened.with_heads(kept)(ids).logits, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("attention", "heads", "said"),
    [
        ("expert_heads", "4", "from 1 to 3, got 4"),
        ("expert_heads", "0", "from 1 to 3, got 0"),
        ("grouped_query", "1", "grouped_query, whose heads share a last matrix"),
    ],
)
def test_what_cannot_be_done_is_refused(attention: str, heads: str, said: str, tmp_path: Path) -> None:
    tiny_model(attention=attention).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    found = run_mixtura("condense", str(tmp_path / "model"), "--heads", heads, "--out", str(out))
    assert found.returncode == 2
    assert said in " ".join(found.stderr.split())
    assert not out.exists()


def test_other_families_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="a qwen3_moe, whose heads are no experts"):
        ExpertHeadModel(specimen.path())

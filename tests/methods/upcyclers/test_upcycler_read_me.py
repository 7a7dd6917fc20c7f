"""What the upcycler read_me promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_checkpoints import dense_model, save_dense

import mixtura
from mixtura.authoring.contracts import sample_dense_trace
from mixtura.errors import SettingError, UnmetError
from mixtura.methods.upcyclers.read_me import ReadMe
from mixtura.running.dense_overlaps import shares_of
from mixtura.running.loading import load_own_model
from mixtura.types import RouterInput
from mixtura.types.upcycling import Build, DenseShape, Recipe, UpcycleShape

DENSE = DenseShape(d_model=6, d_ffn=8, num_layers=1, num_words=64)


def recipe_of(domains: torch.Tensor, num_experts: int = 2, **settings: float) -> Recipe:
    trace = sample_dense_trace(DENSE)
    trace = replace(trace, layers=(replace(trace.layers[0], domains=domains),))
    return ReadMe(**settings).recipe((DENSE,), UpcycleShape(num_experts=num_experts, top_k=1), trace)


def test_what_all_domains_use_is_shared_and_the_rest_is_theirs() -> None:
    domains = torch.tensor([[9.0, 8, 7, 6, 1, 1, 1, 1], [9.0, 8, 1, 1, 1, 1, 6, 7]])
    recipe = recipe_of(domains)
    groups = {
        a.expert: recipe.arrays[str(a.neurons)].tolist() for a in recipe.actions if isinstance(a, Build)
    }
    assert groups == {None: [0, 1], 0: [2, 3], 1: [6, 7]}
    assert recipe.own["layers"] == [{"d_expert": 2, "shared_width": 2}]
    assert recipe.lessons == 500


def test_bad_text_and_settings_are_refused() -> None:
    alike = torch.arange(8).float().repeat(2, 1)
    with pytest.raises(UnmetError, match="all 2 domains activate the same 4 neurons most in layer 0"):
        recipe_of(alike)
    with pytest.raises(UnmetError, match="there are 2, not 5; give --experts 2"):
        recipe_of(alike, 5)
    with pytest.raises(SettingError, match="must be even"):
        ReadMe(width=5)


def test_shares_of_the_most_active_neurons() -> None:
    # The most active five neurons of the first token are 0 to 4 in order, of the second 9 to 5.
    activations = torch.stack([torch.arange(10, 0, -1), torch.arange(1, 11)]).float()
    found = shares_of(activations, [torch.arange(5), torch.arange(5, 10)])
    # Neuron i is in the sets of the 1, 2, ... 5 most active that are larger than its rank.
    whole = sum(5 - rank for rank in range(5)) / 15
    torch.testing.assert_close(found, torch.tensor([[whole, 0.0], [0.0, whole]]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[mixtura.Upcycled, Path]:
    """Two kinds of text that no word is common to, and a model whose neurons go by words."""
    folder = tmp_path_factory.mktemp("read_me")
    source = save_dense(folder / "dense", "llama", hidden_size=48, intermediate_size=96)
    text = folder / "text"
    text.mkdir()
    for name, letters in (("first", "abcd"), ("second", "wxyz")):
        rows = torch.randint(4, (60, 24), generator=torch.Generator().manual_seed(len(name))).tolist()
        (text / f"{name}.txt").write_text("\n".join("".join(letters[one] for one in row) for row in rows))
    result = mixtura.upcycle(
        source,
        folder / "out",
        method="read_me",
        experts=2,
        top_k=1,
        text=text,
        tokens=2000,
        length=25,
        settings={"steps": 60, "width": 8, "keep": 0.4},
    )
    return result, folder


def test_experts_are_the_dense_models_neurons(made: tuple[mixtura.Upcycled, Path]) -> None:
    own, dense = load_own_model(made[1] / "out"), dense_model("llama", hidden_size=48, intermediate_size=96)
    first = own.model.blocks[1]
    matrices, part = first.experts.matrices, dense.model.layers[1].mlp
    rows = {tuple(row.tolist()): n for n, row in enumerate(part.up_proj.weight)}
    chosen = [[rows[tuple(row.tolist())] for row in matrices.up[e]] for e in range(2)]
    assert not set(chosen[0]) & set(chosen[1]) or first.shared is None or len(chosen[0]) == len(chosen[1])
    shared = 0 if first.shared is None else first.shared.experts.shape.d_expert
    assert len(chosen[0]) + shared == int(0.4 * 96)


def test_one_taught_router_tells_the_domains_apart_in_all_layers(made: tuple[mixtura.Upcycled, Path]) -> None:
    own = load_own_model(made[1] / "out")
    blocks = own.model.blocks
    assert blocks[0].router is blocks[1].router
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made[1] / "dense")
    chosen = []
    for words in ("abcdabdcbacdab", "wxyzzyxwwxzyxz"):
        ids = torch.tensor(tokenizer(words, add_special_tokens=False).input_ids)
        told = RouterInput.of(torch.zeros(len(ids), 48), token_ids=ids, positions=torch.arange(len(ids)))
        chosen.append(blocks[0].router(told).load.tolist())
    assert chosen[0][0] + chosen[1][1] >= 24
    assert {float(w) for w in blocks[0].router(told).weights} == {1.0}

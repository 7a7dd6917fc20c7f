"""Models read side by side: caches, teams, lessons, scores against loops of their own, saving, generation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mixtura.authoring.contracts._decoded import tokenizer
from mixtura.authoring.contracts._read_together import built, team, tiny
from mixtura.data.records import Document
from mixtura.errors import OutputError, SettingError, UserError
from mixtura.methods.ensembles import NO_TARGET, Ensemble
from mixtura.methods.ensembles.bayes_mixture import BayesMixture
from mixtura.methods.ensembles.fusion_route import FusionRoute
from mixtura.methods.ensembles.mean_logits import MeanLogits
from mixtura.methods.ensembles.mixture_of_thoughts import MixtureOfThoughts
from mixtura.running.ensembling.generating import continue_text
from mixtura.running.ensembling.lessons import Pair, Row, in_turn, lesson_of, read_pairs, rows_of
from mixtura.running.ensembling.reading import ends_of_stacks
from mixtura.running.ensembling.saving import open_ensemble, save
from mixtura.running.ensembling.scoring import score
from mixtura.running.ensembling.team import Team, team_of
from mixtura.running.ensembling.training import Training, train

ROWS = [
    Row((5, 3, 60, 3, 3, 17, 0, 41), 3, "code"),
    Row((9, 9, 2, 31), 1, "prose"),
    Row((7, 8, 9, 10, 11, 12), 2, "prose"),
]


def made(ensemble: Ensemble, apart: float = 0.3) -> Team:
    of = team(ensemble)
    built(ensemble, of, apart=apart)
    return of


@pytest.mark.parametrize("family", [MeanLogits, BayesMixture, FusionRoute, MixtureOfThoughts])
@torch.no_grad()
def test_greedy_text_is_a_loop_without_caches(family: Any) -> None:
    ensemble = family()
    of = made(ensemble)
    found = continue_text(ensemble, of, "abcde", max_new_tokens=8)
    prompt = of.tokenizer("abcde")["input_ids"]
    ids = list(prompt)
    for token in found.token_ids:
        whole = ensemble(of.read(torch.tensor([ids]), prompt=torch.tensor([len(prompt)])))
        assert token == int(whole.log_probabilities[0, -1].argmax())
        ids.append(token)
    assert len(found.token_ids) == 8 or found.token_ids[-1] == of.tokenizer.eos_token_id
    assert sum(found.shares) == pytest.approx(1.0, abs=1e-5)
    assert found.num_prompt_tokens == len(prompt)


def test_drawn_text_is_that_of_its_seed() -> None:
    of = team(MeanLogits())
    texts = {
        seed: continue_text(MeanLogits(), of, "abc", max_new_tokens=12, temperature=2.0, seed=seed).token_ids
        for seed in (0, 1)
    }
    again = continue_text(MeanLogits(), of, "abc", max_new_tokens=12, temperature=2.0, seed=1)
    assert texts[0] != texts[1] == again.token_ids
    pieces: list[str] = []
    told = continue_text(MeanLogits(), of, "abc", max_new_tokens=6, on_text=pieces.append)
    assert "".join(pieces) == told.text


@torch.no_grad()
def test_scores_are_sums_over_tokens_after_prompts() -> None:
    of = team(MeanLogits())
    found = score(MeanLogits(), of, ROWS, batch=2)
    sums: dict[str, list[float]] = {}
    for row in ROWS:
        ids = torch.tensor([row.token_ids])
        logits = [model(input_ids=ids).logits[0].double() for model in of.models]
        each = [one.log_softmax(-1) for one in (sum(logits) / 2, *logits)]  # type: ignore[union-attr]
        losses = [
            [-float(one[t - 1, row.token_ids[t]]) for t in range(row.num_prompt, len(ids[0]))] for one in each
        ]
        best = [min(pair) for pair in zip(losses[1], losses[2], strict=True)]
        numbers = [len(best), *map(sum, losses), min(sum(losses[1]), sum(losses[2])), sum(best)]
        for domain in (row.domain, "all"):
            sums[domain] = [a + b for a, b in zip(sums.get(domain, [0.0] * 6), numbers, strict=True)]
    for domain, (tokens, mixed, first, second, by_text, by_token) in sums.items():
        assert found.num_tokens[domain] == tokens
        assert found.losses[domain] == pytest.approx(mixed / tokens, abs=1e-4)
        assert found.alone[domain] == pytest.approx([first / tokens, second / tokens], abs=1e-4)
        assert found.best_by_text[domain] == pytest.approx(by_text / tokens, abs=1e-4)
        assert found.best_by_token[domain] == pytest.approx(by_token / tokens, abs=1e-4)
    assert found.best_single == min(found.alone["all"])


def test_lessons_foretell_what_comes_after_the_prompt() -> None:
    lesson = lesson_of(ROWS[:2], team(MeanLogits()))
    assert lesson.targets.tolist() == [
        [NO_TARGET, NO_TARGET, 3, 3, 17, 0, 41],
        [9, 2, 31] + [NO_TARGET] * 4,
    ]
    assert lesson.text.valid.tolist() == [[1] * 7, [1] * 3 + [0] * 4]


def test_documents_are_cut_and_records_keep_their_prompts() -> None:
    of = team(MeanLogits())
    documents = [Document("abcdefghij", "a", "one"), Document("xyuv", "b", "two", prompt="xy", answer="uv")]
    rows = rows_of(documents, of, length=6, num_prompt=2)
    assert [(len(row.token_ids), row.num_prompt, row.domain) for row in rows] == [
        (6, 2, "a"), (4, 2, "a"), (5, 2, "b"),
    ]  # fmt: skip
    assert rows[2].token_ids[-1] == of.tokenizer.eos_token_id
    with pytest.raises(UserError, match="no text is longer than a prompt of 50 tokens"):
        rows_of(documents[:1], of, num_prompt=50)


def test_rows_come_in_turn_and_by_a_seed() -> None:
    batches = in_turn(list(range(5)), 2, 3)
    drawn = [one for _ in range(5) for one in next(batches)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list(range(5))
    again = in_turn(list(range(5)), 2, 3)
    assert [one for _ in range(5) for one in next(again)] == drawn


@pytest.mark.parametrize(("layers", "stacks", "ends"), [(6, 2, [2, 5]), (7, 3, [1, 3, 6]), (2, 2, [0, 1])])
def test_stacks_are_of_about_as_many_layers(layers: int, stacks: int, ends: list[int]) -> None:
    assert ends_of_stacks(layers, stacks) == ends


def test_models_that_do_not_share_a_tokenizer_are_refused() -> None:
    models = [tiny("llama", 1), tiny("qwen2", 2)]
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    other.add_tokens(["zebra"])
    with pytest.raises(
        UserError, match=r"second has another tokenizer than first .'zebra' is token 66 there"
    ):
        team_of(models, [tokenizer(), other], ("first", "second"))
    models[1].resize_token_embeddings(70)
    with pytest.raises(UserError, match="second has a vocabulary of 70 entries, first one of 64"):
        team_of(models, [tokenizer()] * 2, ("first", "second"))
    with pytest.raises(UserError, match="of two models or more, got 1"):
        team_of(models[:1], [tokenizer()])


def test_what_trains_nothing_is_not_trained() -> None:
    with pytest.raises(UserError, match="MeanLogits trains nothing"):
        train(MeanLogits(), team(MeanLogits()), ROWS)
    method = MixtureOfThoughts()
    with pytest.raises(UserError, match="learns from no pairs"):
        train(method, team(method), ROWS, pairs=[Pair(ROWS[0], ROWS[1])])
    with pytest.raises(UserError, match="no text to learn from"):
        train(method, team(method), [])
    with pytest.raises(SettingError, match="steps"):
        Training(steps=0)


def test_a_loss_that_is_no_number_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    method = FusionRoute()
    of = team(method)
    monkeypatch.setattr(FusionRoute, "loss", lambda *_: torch.tensor(math.nan))
    with pytest.raises(UserError, match="the loss of tuning is nan at step 1; take a lower learning rate"):
        train(method, of, ROWS, Training(steps=2, batch=1))
    assert all(one.requires_grad for model in of.models for one in model.parameters())


def test_an_ensemble_is_opened_with_its_own_models_alone(tmp_path: Path) -> None:
    method = FusionRoute(beta=0.2)
    of = team(method)
    stages = train(method, of, ROWS, Training(steps=2, batch=2))
    save(tmp_path / "made", method, of, stages)
    before = score(method, of, ROWS).losses
    bare = Team(of.models, of.tokenizer, of.names)
    again, other = open_ensemble(tmp_path / "made", bare)
    assert isinstance(again, FusionRoute)
    assert again.beta == 0.2
    assert score(again, other, ROWS).losses == before
    with pytest.raises(UserError, match="was trained with first where second is given now"):
        open_ensemble(tmp_path / "made", Team(of.models[::-1], of.tokenizer, of.names[::-1]))
    with pytest.raises(UserError, match=r"is of 2 models .first, second., 3 are given"):
        open_ensemble(tmp_path / "made", Team((*of.models, of.models[0]), of.tokenizer, ("a", "b", "c")))
    with pytest.raises(OutputError, match="is there already"):
        save(tmp_path / "made", method, of, stages)


@pytest.mark.parametrize("broken", ["parts", "cut", "own", "text", "version", "none"])
def test_what_is_damaged_is_refused(tmp_path: Path, broken: str) -> None:
    method = FusionRoute()
    of = made(method)
    folder = tmp_path / "made"
    save(folder, method, of, [])
    described = json.loads((folder / "ensemble.json").read_text())
    if broken == "parts":
        described["method"], described["settings"] = "mixture_of_thoughts", {}
        (folder / "ensemble.json").write_text(json.dumps(described))
    elif broken == "cut":
        (folder / "ensemble.safetensors").write_bytes(b"\x00" * 20)
    elif broken == "own":
        (folder / "own" / "config.json").unlink()
    elif broken == "text":
        (folder / "ensemble.json").write_text("{")
    elif broken == "version":
        (folder / "ensemble.json").write_text(json.dumps(described | {"version": 9}))
    else:
        (folder / "ensemble.safetensors").unlink()
    wanted = {
        "parts": "lacks parts or has others", "cut": "damaged", "own": "lacks its own model",
        "text": "damaged", "version": "another version", "none": "there is no ensemble",
    }  # fmt: skip
    with pytest.raises(UserError, match=wanted[broken]):
        open_ensemble(folder, of)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}',
            "line 2.*'rejected'",
        ),
        ("[1]", "line 1.*'prompt'"),
        ("{", "line 1"),
        ("\n", "holds no pairs"),
    ],
)
def test_pairs_that_are_none_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_pairs(path, team(MeanLogits()))
    with pytest.raises(UserError, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl", team(MeanLogits()))


def test_pairs_are_two_answers_to_one_prompt(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "ab", "chosen": "cd", "rejected": "efg"}\n\n')
    (pair,) = read_pairs(path, team(MeanLogits()))
    assert pair.preferred.token_ids[:2] == pair.other.token_ids[:2]
    assert (len(pair.preferred.token_ids), len(pair.other.token_ids)) == (5, 6)

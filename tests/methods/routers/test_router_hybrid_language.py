"""What the router hybrid_language promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods.routers.hybrid_language import HybridLanguage
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=8, num_experts=5)
X = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
LANGUAGES = torch.arange(60) % 7 - 1
FAMILIES = [0, 3, 3, 1, 4, 0]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_choices_by_loops(training: bool, renormalize: bool) -> None:
    router = HybridLanguage(SHAPE, top_k=2, families=FAMILIES, renormalize=renormalize)
    routing = router(RouterInput.of(X, training=training, labels={"language": LANGUAGES}))
    found: dict[int, dict[int, float]] = {token: {} for token in range(60)}
    for token, expert, weight in zip(routing.token_ids, routing.expert_ids, routing.weights, strict=True):
        found[int(token)][int(expert)] = float(weight)
    for token in range(60):
        scores = (X[token] @ router.weight.T).softmax(-1).tolist()
        chosen = sorted(range(5), key=lambda e: -scores[e])[:2]
        language = int(LANGUAGES[token])
        if training and language >= 0 and FAMILIES[language] not in chosen:
            chosen[1] = FAMILIES[language]
        total = sum(scores[e] for e in chosen) if renormalize else 1
        assert found[token] == pytest.approx({e: scores[e] / total for e in chosen}, abs=1e-6)


def test_in_training_a_language_has_its_expert_exactly_once() -> None:
    for top_k in (1, 2, 5):
        router = HybridLanguage(SHAPE, top_k=top_k)
        routing = router(RouterInput.of(X, training=True, labels={"language": LANGUAGES.clamp(max=4)}))
        for token in range(60):
            experts = routing.expert_ids[routing.token_ids == token].tolist()
            assert len(set(experts)) == top_k
            language = min(int(LANGUAGES[token]), 4)
            assert language < 0 or experts.count(language) == 1


def test_the_expert_of_a_language_that_was_put_in_learns() -> None:
    router = HybridLanguage(SHAPE, top_k=1, renormalize=False)
    routing = router(RouterInput.of(X[:1], training=True, labels={"language": torch.tensor([4])}))
    routing.weights.sum().backward()
    assert routing.expert_ids.tolist() == [4]
    assert router.weight.grad is not None
    assert router.weight.grad[4].any()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingError, match="must name experts from 0 to 4"):
        HybridLanguage(SHAPE, families=[0, 5])
    with pytest.raises(UserError, match="knows languages 0 to 4, got label 6; give families an entry"):
        HybridLanguage(SHAPE)(RouterInput.of(X[:1], training=True, labels={"language": torch.tensor([6])}))
    HybridLanguage(SHAPE)(RouterInput.of(X[:1], labels={"language": torch.tensor([6])}))

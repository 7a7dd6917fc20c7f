"""What the decoder hedged_sampling promises beyond its kind's contract."""

from __future__ import annotations

from itertools import permutations

from deciding import several

from mixtura.methods.decoders import Branch
from mixtura.methods.decoders._shared import ngram_f
from mixtura.methods.decoders.hedged_sampling import HedgedSampling


def test_the_answer_that_agrees_most_is_chosen_in_whatever_order() -> None:
    texts = ("abcdef", "abcdxf", "zzzzzz")
    chosen = {
        order[HedgedSampling().select(several(order))]
        for order in permutations(texts)
        if order[0] != "zzzzzz"
    }
    assert chosen <= {"abcdef", "abcdxf"}


def test_evidence_counts_and_is_never_the_answer() -> None:
    candidates = several(["aaaa", "bbbb", "bbbb"])
    candidates[2].branch = Branch(state="evidence")
    assert HedgedSampling(n=2, evidence=1).select(candidates) == 1


def test_a_judge_decides() -> None:
    candidates = several(["aaaa", "aaaa", "bbbb"], verdicts=[0.0])
    candidates[2].verdicts = [1.0]
    assert HedgedSampling().select(candidates) == 2


def test_the_f_score_of_ngrams_by_hand() -> None:
    # "ab" and "ac" share one of two letters and no pair: (2/4 + 0/2) / 2.
    assert ngram_f("ab", "ac") == 0.25
    assert ngram_f("", "") == 1.0
    assert ngram_f("ab", "ba") == ngram_f("ba", "ab") == 0.5

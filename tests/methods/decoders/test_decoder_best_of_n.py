"""What the decoder best_of_n promises beyond its kind's contract."""

from __future__ import annotations

from deciding import several

from mixtura.methods.decoders.best_of_n import BestOfN


def test_the_verifier_decides_and_else_the_mean_log_probability() -> None:
    candidates = several(["a", "bb", "c"])
    for one, values in zip(candidates, ([-1.0], [-0.1, -0.3], [-3.0]), strict=True):
        one.log_probabilities = values
    assert BestOfN().select(candidates) == 1
    for one, verdict in zip(candidates, (0.2, 0.1, 0.9), strict=True):
        one.verdicts = [5.0, verdict]
    assert BestOfN().select(candidates) == 2


def test_the_first_of_equals_is_chosen() -> None:
    assert BestOfN().select(several(["a", "b"], log_probabilities=[-1.0])) == 0

"""Prompts for three models, in every way that a file of prompts may give them."""

from __future__ import annotations

A = ["some words of prose", "a longer line of prose, with a comma in it.", "short"]
B, NOT_B = ["3 + 4 = 7", "12 * 3 = 36 and more of that"], ["once upon a time"]
C = ["def f(x): return x", "for a in b: c"]
PROMPTS = {"a": A, "b": {"for": B, "not_for": NOT_B}, "2": C}

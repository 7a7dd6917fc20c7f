"""Problems of speech, drawn by the equation of source and filter: vowels of three languages."""

from __future__ import annotations

from typing import Final

import numpy as np

from mixtura.running.estimating.lessons import Draw, Lesson, Problem, split

FRAMES: Final = 5
BANDS: Final = 16
# First and second formants of the vowels i, e, a, o, u in Hz.
_VOWELS: Final = np.array([[280, 2250], [450, 1950], [750, 1300], [500, 900], [320, 800]], dtype=float)


def voice(formants: np.ndarray, pitch: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    """Log energies in 16 bands to 4 kHz of harmonics k of a pitch, k^-tilt prod 1 / (1 + ((f - F) / 90)^2).

    Args:
        formants: ``[n, L, 3]`` in Hz.
        pitch: ``[n, L]`` in Hz.
        tilt: ``[n]``.
    """
    k = np.arange(1, 33)
    hertz = pitch[..., None] * k
    gain = k ** -tilt[:, None, None] * (hertz < 4000)
    for place in range(formants.shape[-1]):
        gain = gain / (1 + ((hertz - formants[..., place, None]) / 90) ** 2)
    edges = 700 * (np.exp(np.linspace(0, np.log1p(4000 / 700), BANDS + 1)) - 1)
    band = (hertz[..., None] >= edges[:-1]) & (hertz[..., None] < edges[1:])
    heard: np.ndarray = np.log(1e-6 + (gain[..., None] * band).sum(2))
    return heard


def _spoken(vowel: np.ndarray, higher: np.ndarray, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Formants ``[n, L, 3]`` of vowels, so many times as high, by speakers of their own; and their pitch."""
    num = len(vowel)
    tract = draw.uniform(0.93, 1.07, (num, 1, 1))
    heard = np.concatenate([_VOWELS[vowel], np.full((*vowel.shape, 1), 2800.0)], axis=2)
    shaken = 1 + 0.02 * draw.normal(size=heard.shape)
    pitch = draw.uniform(90, 220, (num, 1)) * (1 + 0.02 * draw.normal(size=vowel.shape).cumsum(1))
    return heard * tract * higher[..., None] * shaken, pitch


def vowels(draw: Draw) -> Lesson:
    """Vowels in the middle of 5 frames of 3 languages, formants 1, 1.25 or 0.8 times as high; a frame in 5
    beside is of another language. The language is a column."""
    num = 1200
    vowel = draw.integers(0, 5, (num, FRAMES))
    language = draw.integers(0, 3, num)
    spoken = np.repeat(language[:, None], FRAMES, axis=1)
    switched = draw.random(spoken.shape) < 0.2
    switched[:, FRAMES // 2] = False
    spoken = np.where(switched, draw.integers(0, 3, spoken.shape), spoken)
    formants, pitch = _spoken(vowel, np.array([1.0, 1.25, 0.8])[spoken], draw)
    heard = voice(formants, pitch, 1 + 0.4 * language) + 0.3 * draw.normal(size=(num, FRAMES, BANDS))
    X = np.column_stack([heard.reshape(num, -1), language])
    return split(X, vowel[:, FRAMES // 2], 400, draw)


_COLUMN: Final = FRAMES * BANDS
SOUNDS: tuple[Problem, ...] = (
    Problem(
        "vowels",
        vowels.__doc__ or "",
        "accuracy",
        "classes",
        {
            "lr_moe": {"language_column": _COLUMN, "frames": FRAMES, "num_experts": 3},
            "speech_moe2": {"accent_column": _COLUMN, "frames": FRAMES, "num_experts": 3},
        },
        vowels,
    ),
)

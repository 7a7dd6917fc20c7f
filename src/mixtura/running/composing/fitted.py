"""A router that has learned: asked for decisions, saved as safetensors and JSON, and opened again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mixtura.errors import OutputError, UnknownNameError, UserError
from mixtura.methods import create
from mixtura.methods.model_routers import ModelRouter, decisions
from mixtura.methods.settings import settings
from mixtura.running.composing.calibrating import Calibration, calibrate
from mixtura.running.composing.costs import CostModel
from mixtura.running.composing.encoder import HASHED, Encode, HashedTfidf, embed, encoder_state
from mixtura.running.composing.reading import card_from, card_values
from mixtura.running.composing.tables import ReplayTable, split
from mixtura.types.models import Decision, Lessons, ModelCard, Prompt, Scores, Wish

_DESCRIPTION, _ARRAYS = "router.json", "router.safetensors"
_VERSION: Final = 1
# Prompts that a calibration, a line of two numbers, should at least rest on.
_LEAST_CALIBRATION: Final = 30
_CALIBRATION_SHARE: Final = 0.2


@final
@dataclass(slots=True, eq=False)
class FittedRouter:
    """A method that has learned from a table, with all that it takes to ask it.

    Attributes:
        name: of the method, or the path of its file.
        method: the method itself.
        cards: models that it chooses from.
        encode: makes embeddings of texts.
        costs: what answers cost.
        calibration: of expected scores.
        labels: names of the labels that prompts of the table had.
    """

    name: str
    method: ModelRouter
    cards: tuple[ModelCard, ...]
    encode: Encode
    costs: CostModel
    calibration: Calibration
    labels: tuple[str, ...] = ()

    def scores(self, prompts: Sequence[Prompt], cards: Sequence[ModelCard] | None = None) -> Scores:
        """What is expected of each model for each prompt."""
        listed = tuple(self.cards if cards is None else cards)
        batch = embed(prompts, self.encode)
        found = self.method.estimate(batch, listed, self.costs.expected(prompts, listed))
        error = self.calibration.errors(found.quality, found.error)
        return Scores(self.calibration(found.quality), error, found.cost, found.weights)

    def decide(
        self,
        prompts: Sequence[Prompt],
        wish: Wish | None = None,
        seed: int = 0,
        cards: Sequence[ModelCard] | None = None,
    ) -> list[Decision]:
        """Choose a model for each prompt.

        Args:
            prompts: what is to be answered.
            wish: what is preferred.
            seed: of what is drawn at random.
            cards: the models that there are now, in place of those of the table.

        Raises:
            UserError: a wish that cannot be heeded, or none of the models is known.
        """
        listed = tuple(self.cards if cards is None else cards)
        if listed and not {card.name for card in listed} & set(self.method.models):
            raise UnknownNameError("model that the router learned of", listed[0].name, self.method.models)
        scores = self.scores(prompts, listed)
        return decisions(tuple(prompts), listed, scores, wish or Wish(), seed)

    def admit(self, table: ReplayTable) -> None:
        """Take in models that came later, from a table of their outcomes alone.

        Raises:
            UserError: the method cannot, or a model is known already.
        """
        for name in table.names:
            if name in self.method.models:
                raise UserError(f"the router knows {name!r} already; give outcomes of new models alone")
        self.method.admit(lessons_of(table, self.encode))
        self.cards += table.cards
        self.costs = self.costs.with_models(CostModel.of(table))

    def save(self, folder: Path) -> None:
        """Write the router to a folder that is not there yet, or is empty.

        Raises:
            OutputError: the folder has something in it, or cannot be written.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder} is there already; give another folder for the router")
        encoder, arrays = encoder_state(self.encode)
        kept = {f"encoder.{key}": value for key, value in arrays.items()}
        kept |= {f"state.{key}": np.ascontiguousarray(value) for key, value in self.method.state.items()}
        described = {
            "version": _VERSION,
            "method": self.name,
            "settings": {key: getattr(self.method, key) for key in settings(type(self.method))},
            "models": list(self.method.models),
            "cards": [card_values(card) for card in self.cards],
            "encoder": encoder,
            "costs": self.costs.to_dict(),
            "calibration": asdict(self.calibration),
            "labels": list(self.labels),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(kept, folder / _ARRAYS)
            (folder / _DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror}") from None


def load_model_router(folder: str | Path, encode: Encode | None = None) -> FittedRouter:
    """Open a router that `FittedRouter.save` wrote.

    Args:
        folder: where it lies.
        encode: the encoder that it was fitted with, where that was not the default one.

    Raises:
        UserError: there is no router, it is damaged, or it needs an encoder that was not given.
    """
    where = Path(folder)
    try:
        described = json.loads((where / _DESCRIPTION).read_text(encoding="utf-8"))
        arrays = load_file(where / _ARRAYS)
    except OSError:
        raise UserError(f"there is no router in {where}; `mixtura route fit` makes one") from None
    except (ValueError, SafetensorError) as error:
        raise UserError(f"the router in {where} is damaged ({error}); fit it again") from None
    if not isinstance(described, dict) or described.get("version") != _VERSION:
        raise UserError(f"the router in {where} is of another version; fit it again")
    if encode is None:
        if described["encoder"] != HASHED:
            raise UserError(
                f"the router in {where} was fitted with the encoder {described['encoder']}; give it "
                "as encode="
            )
        rarity = arrays["encoder.rarity"]
        encode = HashedTfidf(len(rarity), rarity)
    method: ModelRouter = create("model_routers", described["method"], **described["settings"])
    state = {key.removeprefix("state."): v for key, v in arrays.items() if key.startswith("state.")}
    method.restore(described["models"], state)
    cards = tuple(card_from(one, str(where / _DESCRIPTION)) for one in described["cards"])
    costs, calibration = CostModel(**described["costs"]), Calibration(**described["calibration"])
    return FittedRouter(
        described["method"], method, cards, encode, costs, calibration, tuple(described["labels"])
    )


def lessons_of(table: ReplayTable, encode: Encode) -> Lessons:
    """What a method learns from: a table with embeddings of its prompts."""
    return Lessons(embed(table.prompts, encode), table.cards, table.scores, table.costs)


def fit_model_router(
    table: ReplayTable,
    name: str = "knn",
    encode: Encode | None = None,
    seed: int = 0,
    **given: Any,
) -> FittedRouter:
    """Fit a router on a table of outcomes.

    A fifth of the prompts is held back to calibrate the expected scores by; then the method learns from all.

    Args:
        table: outcomes.
        name: of the method, see `mixtura methods model_routers`, or the path of its file.
        encode: makes one vector a text of a list of texts; hashed words by default.
        seed: of what is held back.
        given: settings of the method.

    Raises:
        UserError: too few prompts have a score, no such method, or a setting is wrong.
    """
    if encode is None:
        encode = HashedTfidf()
        encode.fit([prompt.text for prompt in table.prompts])
    method: ModelRouter = create("model_routers", name, **given)
    # Not by the seed alone: the table may be one side of a split by that.
    held, rest = split(table, _CALIBRATION_SHARE, f"calibration {seed}")
    calibration = Calibration()
    if len(held.prompts) >= _LEAST_CALIBRATION and len(rest.prompts) > len(held.prompts):
        method.fit(lessons_of(rest, encode))
        batch = embed(held.prompts, encode)
        found = method.estimate(batch, held.cards, np.zeros((len(batch), len(held.cards))))
        calibration = calibrate(found.quality, held.scores)
    method.fit(lessons_of(table, encode))
    labels = sorted({label for prompt in table.prompts for label in prompt.labels})
    return FittedRouter(name, method, table.cards, encode, CostModel.of(table), calibration, tuple(labels))

"""A training's text whose shares by domain are decided as it goes, from losses on text that is held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from mixtura.errors import CheckpointError, SettingError, UnmetError, UserError, check_range
from mixtura.methods import create
from mixtura.methods.data_mixers import DataMixer, Domains, Standing, State, Stretch
from mixtura.modeling.decoder import frozen_noise
from mixtura.modeling.plan import Choice
from mixtura.train.stages import places_of
from mixtura.train.text import Stream, Windows, collate, item

_FILE = "mixture.safetensors"
_STATE, _WEIGHTS, _STEPS, _LOSSES = "state.", "weights", "num_steps", "losses"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A data mixer by name, with its settings, and how it is asked.

    Attributes:
        name: of the method.
        settings: of the method.
        every: steps between decisions, as far as the method does not say otherwise.
        held_out: sequences of each domain that are measured and never trained on.
    """

    name: str
    settings: Mapping[str, Any]
    every: int = 100
    held_out: int = 16

    @staticmethod
    def read(value: Any) -> Mixture:
        """What a name, or a mapping with a name, ``every``, ``held_out`` and settings, stands for.

        >>> Mixture.read({"name": "aioli", "eta": 0.1, "every": 50}).settings
        {'eta': 0.1}

        Raises:
            UserError: it is neither, or there is no such method or setting.
        """
        choice = Choice.read(value, "a mixture")
        own = {name: choice.settings[name] for name in ("every", "held_out") if name in choice.settings}
        for name, number in own.items():
            if not isinstance(number, int) or isinstance(number, bool):
                raise SettingError(f"{name} of mixture must be a whole number, got {number!r}")
            check_range("mixture", name, number, 1, 1 << 30)
        settings = {name: held for name, held in choice.settings.items() if name not in own}
        made = Mixture(name=choice.name, settings=settings, **own)
        made.mixer()
        return made

    def mixer(self) -> DataMixer:
        """The method."""
        made: DataMixer = create("data_mixers", self.name, **self.settings)
        return made


@final
class MixedSequences(Dataset[dict[str, Any]]):
    """Training sequences whose domains a data mixer decides stretch by stretch.

    As a data set it holds sequences' numbers only, so that whoever reads ahead decides nothing; `batch` gives
    the sequences of numbers once their stretch is decided. They depend on numbers and decisions alone.
    The end of each domain's text is held out.

    Args:
        streams: text by domain.
        mixture: what decides.
        num_sequences: of the whole training.
        per_step: sequences of a step.
        length: tokens of a sequence.
        start_id: the token that begins a document, where documents are told apart.
        seed: of the order.

    Raises:
        UserError: there are fewer than two domains, or one has too little text.
        SettingError: the method cannot mix these domains.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        mixture: Mixture,
        *,
        num_sequences: int,
        per_step: int,
        length: int,
        start_id: int | None = None,
        seed: int = 0,
    ) -> None:
        if len(streams) < 2:
            raise UserError(
                f"a mixture needs at least two domains, but the text has only {', '.join(streams)}; "
                "give a directory with a folder a domain, or leave the mixture out"
            )
        self.domains = tuple(streams)
        self._length, self._start_id, self._num_sequences = length, start_id, num_sequences
        self._per_step, self._num_held_out = per_step, mixture.held_out
        kept = {name: self._cut(name, tokens) for name, tokens in streams.items()}
        self._windows = [Windows(read, length, (seed, p)) for p, (read, _) in enumerate(kept.values())]
        self._held_out = [held for _, held in kept.values()]
        sizes = torch.tensor([float(len(read)) for read, _ in kept.values()], dtype=torch.float64)
        self._known = Domains(self.domains, sizes, num_sequences // per_step, mixture.every)
        self._mixer = mixture.mixer()
        self._mixer.check(self._known)
        self._state: State = self._mixer.start(self._known)
        self.stretches: list[Stretch] = []
        self.losses = torch.zeros(len(streams), dtype=torch.float64)
        self._places = self._ranks = np.zeros(0, dtype=np.int64)

    def _cut(self, name: str, tokens: Stream) -> tuple[Stream, Stream]:
        """The text of a domain that is trained on, and that which is held out."""
        held = self._num_held_out * self._length
        if len(tokens) < 2 * held:
            raise UserError(
                f"{name} has {len(tokens)} tokens, of which a mixture would hold out {held}; give more text, "
                "or lower held_out of the mixture"
            )
        return tokens[:-held], tokens[-held:]

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"number": number}

    @property
    def num_decided(self) -> int:
        """Steps whose shares are decided."""
        return sum(one.num_steps for one in self.stretches)

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The sequences of these numbers."""
        return collate([self._item(number) for number in numbers])

    def _item(self, number: int) -> dict[str, Any]:
        place = int(self._places[number])
        return item(self._windows[place][int(self._ranks[number])], place, self._start_id)

    def held_out(self, place: int) -> list[dict[str, Any]]:
        """The held-out sequences of a domain."""
        # A sequence's last token is predicted by the one before it, so that no token after it is needed.
        rows = self._held_out[place].reshape(self._num_held_out, self._length)
        return [item(np.append(row, 0), place, self._start_id) for row in rows]

    def decide(self, losses: Float[Tensor, " G"]) -> None:
        """Let the mixer say what the next steps read, after all that were decided are done.

        Raises:
            UnmetError: a loss is not finite.
        """
        step = self.num_decided
        if not torch.isfinite(losses).all():
            bad = self.domains[int((~torch.isfinite(losses)).nonzero()[0])]
            raise UnmetError(
                f"the held-out loss of {bad} is not finite after {step} steps, so that no mixture follows "
                "from it; train with a lower learning_rate"
            )
        self._state, stretch = self._mixer.next(self._known, self._state, Standing(step, losses.double()))
        self.losses = losses.double()
        left = self._known.num_steps - step
        self._append(Stretch(stretch.weights, min(stretch.num_steps, left)))

    def _append(self, stretch: Stretch) -> None:
        start = self.num_decided * self._per_step
        new = places_of(stretch.weights.tolist(), start, start + stretch.num_steps * self._per_step)
        ranks = np.zeros_like(new)
        for place in range(len(self.domains)):
            mine = new == place
            ranks[mine] = int((self._places == place).sum()) + np.arange(int(mine.sum()))
        self._places, self._ranks = np.append(self._places, new), np.append(self._ranks, ranks)
        self.stretches.append(stretch)

    def described(self) -> dict[str, dict[str, float]]:
        """The shares at hand and the losses that they were decided by, by domain."""
        shares = self.stretches[-1].weights.tolist()
        both = zip(self.domains, shares, self.losses.tolist(), strict=True)
        return {name: {"share": round(share, 6), "held_out": round(loss, 6)} for name, share, loss in both}

    def save(self, folder: Path) -> None:
        """Write all decisions and the mixer's state to a checkpoint."""
        held = {
            _WEIGHTS: torch.stack([one.weights for one in self.stretches]),
            _STEPS: torch.tensor([one.num_steps for one in self.stretches]),
            _LOSSES: self.losses,
        }
        state = {_STATE + name: tensor for name, tensor in self._state.items()}
        save_file({name: t.contiguous().clone() for name, t in (held | state).items()}, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint's decisions.

        Raises:
            CheckpointError: it has none that can be read.
        """
        try:
            held = load_file(folder / _FILE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder / _FILE} cannot be read ({error}); remove that checkpoint to go on from one before"
            ) from None
        self._state = {
            name.removeprefix(_STATE): tensor for name, tensor in held.items() if name.startswith(_STATE)
        }
        self.losses = held[_LOSSES]
        for weights, num_steps in zip(held[_WEIGHTS], held[_STEPS].tolist(), strict=True):
            self._append(Stretch(weights, num_steps))


def numbers(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Sequences' numbers as a batch."""
    return {"number": torch.tensor([one["number"] for one in items])}


@torch.no_grad()
def held_out_losses(model: Any, data: MixedSequences, per_batch: int, device: Any) -> Float[Tensor, " G"]:
    """The mean loss over the predictions of each domain's held-out text, as the model is when it is used."""
    training = model.training
    model.eval()
    try:
        with frozen_noise():
            found = [_loss(model, rows, device) for rows in _batches(data, per_batch)]
    finally:
        model.train(training)
    return torch.tensor(found, dtype=torch.float64)


def _batches(data: MixedSequences, per_batch: int) -> Iterator[list[dict[str, Any]]]:
    """The held-out text of each domain, in batches."""
    for place in range(len(data.domains)):
        rows = data.held_out(place)
        yield [collate(rows[start : start + per_batch]) for start in range(0, len(rows), per_batch)]


def _loss(model: Any, batches: Sequence[Mapping[str, Any]], device: Any) -> float:
    total, count = 0.0, 0
    for batch in batches:
        given = {name: _moved(value, device) for name, value in batch.items() if name != "labels"}
        logits = model(**given, use_cache=False).logits[:, :-1].float()
        wanted = given["input_ids"][:, 1:]
        total += float(F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").double().sum())
        count += wanted.numel()
    return total / count


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(held, device) for name, held in value.items()}
    return value.to(device)

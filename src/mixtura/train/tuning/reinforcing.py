"""Tuning by reward: answers are drawn, judged, and learned or unlearned, with the experts that drew them.

Each question of a batch is answered several times. An answer that is better than its group's others becomes
likelier, a worse one less likely (a group-relative policy gradient). Where the pass that learns sends a token
to other experts than the pass that drew it, which rounding alone can do, it moves a probability that was
never drawn from; so the experts of drawing are recorded and chosen again (R3, rollout routing replay, paper
87), while their weights are the live router's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixtura.data.examples import Example
from mixtura.errors import UserError, check_range
from mixtura.train.sequences import IGNORED

_LEAST_SPREAD = 1e-4


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reinforce:
    """How answers are drawn and judged.

    Attributes:
        group: answers to each question.
        max_new_tokens: of an answer.
        temperature: of the draw; 1 draws from the model's own distribution.
        reward: "exact" gives 1 to the record's answer and 0 to others, "prefix" the share of its tokens that
            an answer begins with.
        replay: whether the experts that drew an answer are chosen again where it is learned.
    """

    group: int = 4
    max_new_tokens: int = 32
    temperature: float = 1.0
    reward: Literal["exact", "prefix"] = "exact"
    replay: bool = True

    def __post_init__(self) -> None:
        check_range("reinforce", "group", self.group, 2, 1 << 16)
        check_range("reinforce", "max_new_tokens", self.max_new_tokens, 1, 1 << 20)
        check_range("reinforce", "temperature", self.temperature, 1e-3, 1e3)


def check_answers(examples: Sequence[Example]) -> None:
    """Refuse records without a question before the answer.

    Raises:
        UserError: one has none.
    """
    for number, example in enumerate(examples):
        if example.learned[0]:
            raise UserError(
                f"reinforce answers questions, and record {number} has none before what is to be learned; "
                'give records with "prompt" and "completion", or conversations'
            )


def advantages(rewards: Float[Tensor, " N"], group: int) -> Float[Tensor, " N"]:
    """By how many deviations of its group each reward is above the group's mean; 0 where all are alike.

    >>> advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2).round().tolist()
    [1.0, -1.0, 0.0, 0.0]
    """
    groups = rewards.view(-1, group)
    spread = groups.std(1, correction=0, keepdim=True)
    found: Tensor = (groups - groups.mean(1, keepdim=True)) / (spread + _LEAST_SPREAD)
    return found.flatten()


def policy_loss(
    likely: Float[Tensor, "N M"], kept: Bool[Tensor, "N M"], gained: Float[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Minus the mean over drawn tokens of their log-probability times what their answer gained.

    The ratio to the distribution that drew them is one where this is called, so this has its gradient.
    """
    return -(likely * gained[:, None] * kept).sum() / kept.sum().clamp(min=1)


@final
class Rollouts:
    """Draws answers to a batch's questions and gives the loss of learning from them.

    Args:
        how: they are drawn and judged.
        tokenizer: of the model.
        pad: the token that fills rows up.
    """

    def __init__(self, how: Reinforce, tokenizer: Any, pad: int) -> None:
        self._how, self._tokenizer, self._pad = how, tokenizer, pad
        self._sums, self._count = {"reward": 0.0, "rollout_gap": 0.0}, 0

    def loss(self, model: Any, inputs: Mapping[str, Any]) -> Float[Tensor, ""]:
        """The loss of one micro-batch.

        Raises:
            UserError: the model's family cannot replay; the message says so.
        """
        from mixtura.rerouting import record_routing, replay_routing

        how = self._how
        asked = [_question(*pair) for pair in zip(inputs["input_ids"], inputs["labels"], strict=True)]
        ids, mask = self._questions([question for question, _ in asked for _ in range(how.group)])
        with ExitStack() as recorded:
            recording = recorded.enter_context(record_routing(model)) if how.replay else None
            drawn, told = self._drawn(model, ids, mask)
        kept = self._kept(drawn)
        text, whole = torch.cat([ids, drawn], 1), torch.cat([mask, kept.long()], 1)
        with ExitStack() as replayed:
            if recording is not None:
                replayed.enter_context(replay_routing(model, recording))
            places = (whole.cumsum(1) - 1).clamp(min=0)
            output = model(input_ids=text, attention_mask=whole, position_ids=places, use_cache=False)
        likely = self._log(output.logits[:, ids.shape[1] - 1 : -1], drawn)
        answers = [answer for _, answer in asked for _ in range(how.group)]
        rewards = torch.tensor(
            [self._reward(row[own], answer) for row, own, answer in zip(drawn, kept, answers, strict=True)]
        )
        gap = ((likely.detach() - told).abs() * kept).sum() / kept.sum().clamp(min=1)
        self._sums["reward"] += float(rewards.mean())
        self._sums["rollout_gap"] += float(gap)
        self._count += 1
        return policy_loss(likely, kept, advantages(rewards, how.group).to(likely))

    def taken(self) -> dict[str, float]:
        """Means since the last call: the reward, and how far log-probabilities were from those drawn with."""
        if not self._count:
            return {}
        means = {name: value / self._count for name, value in self._sums.items()}
        self._sums, self._count = dict.fromkeys(self._sums, 0.0), 0
        return means

    def _questions(self, rows: Sequence[Tensor]) -> tuple[Int[Tensor, "N P"], Int[Tensor, "N P"]]:
        """Rows of one length, filled up on the left, and which of their tokens are there."""
        width = max(map(len, rows))
        ids = torch.stack([torch.cat([row.new_full((width - len(row),), self._pad), row]) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = torch.arange(width, device=ids.device) >= width - lengths[:, None]
        return ids, mask.long()

    def _drawn(
        self, model: Any, ids: Int[Tensor, "N P"], mask: Int[Tensor, "N P"]
    ) -> tuple[Int[Tensor, "N M"], Float[Tensor, "N M"]]:
        """Drawn tokens, and their log-probabilities as they were drawn."""
        from transformers import GenerationConfig

        how = GenerationConfig(
            max_new_tokens=self._how.max_new_tokens,
            do_sample=True,
            temperature=self._how.temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
        was_training = model.training
        model.eval()
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
        model.train(was_training)
        drawn = made.sequences[:, ids.shape[1] :]
        return drawn, self._log(torch.stack(made.logits, 1), drawn)

    def _log(self, logits: Float[Tensor, "N M V"], drawn: Int[Tensor, "N M"]) -> Float[Tensor, "N M"]:
        logs = (logits.float() / self._how.temperature).log_softmax(-1)
        return torch.gather(logs, -1, drawn[..., None]).squeeze(-1)

    def _kept(self, drawn: Int[Tensor, "N M"]) -> Bool[Tensor, "N M"]:
        """Tokens up to the end of each answer, the end token included."""
        ends = drawn == self._tokenizer.eos_token_id
        before: Tensor = ends.cumsum(1) - ends.long()
        return before == 0

    def _reward(self, drawn: Int[Tensor, " M"], answer: Int[Tensor, " A"]) -> float:
        if self._how.reward == "prefix":
            length = min(len(drawn), len(answer))
            same = (drawn[:length] == answer[:length]).long().cumprod(0).sum()
            return float(same) / max(len(answer), 1)
        said, wanted = (
            self._tokenizer.decode(one.tolist(), skip_special_tokens=True).strip() for one in (drawn, answer)
        )
        return float(said == wanted)


def _question(ids: Int[Tensor, " Q"], labels: Int[Tensor, " Q"]) -> tuple[Tensor, Tensor]:
    """What comes before the first answer of a record, and that answer."""
    learned = labels != IGNORED
    start = int(learned.long().argmax())
    length = int(learned[start:].long().cumprod(0).sum())
    return ids[:start], ids[start : start + length]

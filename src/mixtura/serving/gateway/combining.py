"""Plans of aggregators on live models: their asks are calls like all others, held for and settled."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

from mixtura.errors import UserError
from mixtura.methods import create, header
from mixtura.methods.aggregators import Aggregator
from mixtura.running.composing.asking import concluded
from mixtura.running.composing.upstreams import body_of, reply_in
from mixtura.serving.api.refusals import ApiError
from mixtura.serving.gateway.config import Config
from mixtura.serving.gateway.counting import size_of
from mixtura.serving.gateway.deciding import text_of
from mixtura.serving.gateway.trying import Attempt, Failure, Job, Trier, UnansweredError
from mixtura.types.asking import Answer, Ask, Call, Reply
from mixtura.types.models import Message, ModelCard, Prompt

CHAT: Final = "chat/completions"
# Labels with options, and examples, are nothing that a request brings along.
_NEEDS: Final = ("needs:options", "needs:examples")
_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@final
@dataclass(slots=True, eq=False)
class Combined:
    """What a policy answered.

    Attributes:
        answer: with all calls.
        attempts: those that were sent and answered.
    """

    answer: Answer
    attempts: list[Attempt] = field(default_factory=list)


@final
class Policies:
    """The policies of a gateway.

    Args:
        config, cards: what there is.
        trier: makes the calls.

    Raises:
        UserError: there is no such aggregator, it has no such setting, or cannot work on requests alone.
    """

    def __init__(self, config: Config, cards: Mapping[str, ModelCard], trier: Trier) -> None:
        self._trier = trier
        self._cards = {
            name: tuple(cards[one] for one in policy.models) for name, policy in config.policies.items()
        }
        self._methods: dict[str, Aggregator] = {}
        for name, policy in config.policies.items():
            self._methods[name] = create("aggregators", policy.aggregator, **policy.settings)
            missing = [tag for tag in header("aggregators", policy.aggregator).tags if tag in _NEEDS]
            if missing:
                raise UserError(
                    f"the policy {name} cannot be served: {policy.aggregator} "
                    f"{missing[0].replace(':', ' ')}, which requests do not bring; take another aggregator"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._methods

    async def run(self, name: str, job: Job) -> Combined:
        """A policy's answer to a request.

        Raises:
            ApiError: the request has more than text.
            BudgetError: the budget allowed no call.
            UnansweredError: no call had an answer.
        """
        plan = self._methods[name].plan(_prompt(job), self._cards[name])
        calls: list[Call] = []
        attempts: list[Attempt] = []
        try:
            asks = next(plan)
            while True:
                replies = await self._asked(asks, job, attempts)
                calls += [Call(ask, reply) for ask, reply in zip(asks, replies, strict=True)]
                asks = plan.send(replies)
        except StopIteration as end:
            if calls and all(call.reply.outcome not in ("ok", "budget") for call in calls):
                why = {call.ask.model: Failure(call.reply.outcome) for call in calls}
                raise UnansweredError(why) from None
            return Combined(concluded(end.value, calls), attempts)
        finally:
            plan.close()

    async def _asked(self, asks: Sequence[Ask], job: Job, attempts: list[Attempt]) -> list[Reply]:
        """Replies to asks that are made at once; if one of them is given up, so are all."""
        tasks = [asyncio.ensure_future(self._reply(ask, job, attempts)) for ask in asks]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _reply(self, ask: Ask, job: Job, attempts: list[Attempt]) -> Reply:
        body = body_of(ask)
        if ask.max_tokens is not None:
            body["max_tokens"] = ask.max_tokens
        size = size_of(body, len(json.dumps(body)))
        one = replace(job, body=body, size=size, path=CHAT)
        try:
            data, attempt = await self._trier.whole(one, [ask.model])
        except UnansweredError as error:
            return Reply(outcome=error.failures[ask.model].outcome)
        attempts.append(attempt)
        try:
            reply = reply_in(data, ask)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            reply = Reply(outcome="broken")
        return replace(
            reply,
            cost=attempt.charged,
            input_tokens=attempt.tokens.read,
            output_tokens=attempt.tokens.written,
        )


def _prompt(job: Job) -> Prompt:
    """A request as plans read it."""
    body = job.body
    if body.get("tools") or body.get("functions") or job.size.has_media or job.path != CHAT:
        raise ApiError(
            "a policy answers chats of text alone; ask a model by its name for this", param="model"
        )
    messages = []
    for one in body["messages"]:
        role = _ROLES.get(str(one.get("role")))
        if role is None:
            raise ApiError(
                "a policy answers chats of text alone; ask a model by its name for this", param="messages"
            )
        messages.append(Message(role, text_of(one.get("content"))))  # type: ignore[arg-type]
    metadata: Any = body.get("metadata") or {}
    return Prompt(
        id=uuid.uuid4().hex, text=messages[-1].content, messages=tuple(messages), max_tokens=job.size.wanted,
        labels={str(key): str(value) for key, value in metadata.items()},
    )  # fmt: skip

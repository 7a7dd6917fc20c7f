"""Running plans: every call within a budget, for one prompt or for many in step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final, final

from mixtura.errors import BudgetError, UnknownNameError, UserError
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.model_routers import MOST_TOKENS
from mixtura.types.asking import Answer, Ask, Call, Reply, Verdict
from mixtura.types.models import PICO_PER_DOLLAR, ModelCard, Prompt

# Whatever can answer an ask: a table, a model in this process, an address. It answers from several threads.
Upstream = Callable[[Ask], Reply]
# Tokens that a chat template may put around a message.
AROUND_MESSAGE: Final = 16


@final
class Ledger:
    """Money that is spent and set aside: together never more than the budget, whatever runs at once.

    Args:
        budget: pico-dollars; None for no limit.
    """

    def __init__(self, budget: int | None = None) -> None:
        if budget is not None and budget < 0:
            raise UserError(f"a budget is 0 or more, got {budget}")
        self.budget = budget
        self.spent = 0
        self.reserved = 0
        self._lock = threading.Lock()

    def reserve(self, amount: int) -> bool:
        """Set an amount aside; False, and nothing set aside, where it does not fit."""
        with self._lock:
            if self.budget is not None and self.spent + self.reserved + amount > self.budget:
                return False
            self.reserved += amount
            return True

    def settle(self, reserved: int, cost: int) -> None:
        """Take back what was set aside, and note what it really cost."""
        with self._lock:
            self.reserved -= reserved
            self.spent += cost


@final
class Runner:
    """Runs plans of aggregators on an upstream.

    Args:
        cards: the models that may be asked, the preferred first.
        upstream: answers an ask; it may be called by several threads.
        ledger: what all plans together may cost; its own without a limit where that is None.
        num_threads: calls that may be under way at once.
    """

    def __init__(
        self,
        cards: Sequence[ModelCard],
        upstream: Upstream,
        ledger: Ledger | None = None,
        num_threads: int = 8,
    ) -> None:
        if not cards:
            raise UserError("there is no model to ask; give the card of one or more")
        self.cards = {card.name: card for card in cards}
        self.ledger = Ledger() if ledger is None else ledger
        self._upstream = upstream
        self._num_threads = num_threads

    def run(self, method: Aggregator, prompt: Prompt) -> Answer:
        """One prompt's answer.

        Raises:
            BudgetError: the budget allowed no call at all.
            UserError: no call had an answer, or the plan asks a model that has no card.
        """
        return self.run_all(method, [prompt])[0]

    def run_all(self, method: Aggregator, prompts: Sequence[Prompt]) -> list[Answer]:
        """Every prompt's answer: plans go in step, and each step's asks are made model by model.

        So a model that has to be loaded is loaded once a step, whatever the number of prompts.

        Raises:
            BudgetError: the budget allowed a prompt no call at all.
            UserError: no call of a prompt had an answer, or a plan asks a model that has no card.
        """
        models = tuple(self.cards.values())
        plans = [method.plan(prompt, models) for prompt in prompts]
        calls: list[list[Call]] = [[] for _ in plans]
        done: dict[int, Answer] = {}
        try:
            waiting = {
                n: asks for n, plan in enumerate(plans) if (asks := self._next(n, plan, None, calls, done))
            }
            while waiting:
                replies = self._asked(waiting)
                waiting = {
                    n: more
                    for n in waiting
                    if (more := self._next(n, plans[n], replies[n], calls, done)) is not None
                }
        finally:
            for plan in plans:
                plan.close()
        return [done[n] for n in range(len(plans))]

    def _next(
        self,
        number: int,
        plan: Plan,
        replies: list[Call] | None,
        calls: list[list[Call]],
        done: dict[int, Answer],
    ) -> Sequence[Ask] | None:
        """What a plan asks after these replies; None where it has concluded."""
        try:
            if replies is None:
                return next(plan)
            calls[number] += replies
            return plan.send([call.reply for call in replies])
        except StopIteration as end:
            done[number] = concluded(end.value, calls[number])
            return None

    def _asked(self, waiting: dict[int, Sequence[Ask]]) -> dict[int, list[Call]]:
        """All asks of a step, those of one model together, and their replies in the order of the asks."""
        for asks in waiting.values():
            for ask in asks:
                if ask.model not in self.cards:
                    raise UnknownNameError("model", ask.model, self.cards)
        flat = [(n, place, ask) for n, asks in waiting.items() for place, ask in enumerate(asks)]
        ordered = sorted(flat, key=lambda one: [*self.cards].index(one[2].model))
        # Set aside in the order in which they are asked, so that a budget cuts the same calls each time.
        bounds = [self._reserve(ask) for _, _, ask in flat]
        at = {(n, place): bound for (n, place, _), bound in zip(flat, bounds, strict=True)}
        with ThreadPoolExecutor(self._num_threads) as pool:
            made = list(pool.map(lambda one: self._call(one[2], at[one[0], one[1]]), ordered))
        found = {(n, place): Call(ask, reply) for (n, place, ask), reply in zip(ordered, made, strict=True)}
        return {n: [found[n, place] for place in range(len(asks))] for n, asks in waiting.items()}

    def _reserve(self, ask: Ask) -> int | None:
        """What is set aside for an ask; None where there is not enough left."""
        bound = most_cost(ask, self.cards[ask.model])
        if bound is None:
            # What cannot be known to fit a budget does not.
            return 0 if self.ledger.budget is None else None
        return bound if self.ledger.reserve(bound) else None

    def _call(self, ask: Ask, bound: int | None) -> Reply:
        if bound is None:
            return Reply(outcome="budget")
        reply = Reply(outcome="broken")
        try:
            reply = self._upstream(ask)
        finally:
            reply = _priced(reply, self.cards[ask.model])
            self.ledger.settle(bound, reply.cost)
        return reply


def most_cost(ask: Ask, card: ModelCard) -> int | None:
    """Pico-dollars that a call costs at most; None where prices are not known.

    A token of text has a byte or more, so bytes bound the tokens that are read.
    """
    texts = [message.content for message in ask.messages] + [ask.prefill] * bool(ask.prefill)
    read = sum(len(text.encode("utf-8", "replace")) + AROUND_MESSAGE for text in texts)
    limits = [one for one in (ask.max_tokens, card.max_output) if one is not None]
    cost = card.cost(read, min(limits, default=MOST_TOKENS))
    return None if cost is None else round(cost)


def _priced(reply: Reply, card: ModelCard) -> Reply:
    """The reply with its cost, where the upstream gives tokens alone."""
    if reply.cost or not (reply.input_tokens or reply.output_tokens):
        return reply
    cost = card.cost(reply.input_tokens, reply.output_tokens)
    return reply if cost is None else replace(reply, cost=round(cost))


def concluded(verdict: Verdict, calls: Sequence[Call]) -> Answer:
    """The answer of a plan, unless nothing was answered at all.

    Raises:
        BudgetError: the budget allowed no call.
        UserError: no call had an answer.
    """
    outcomes = [call.reply.outcome for call in calls]
    if calls and all(one == "budget" for one in outcomes):
        raise BudgetError(
            "the budget is below the dearest possible answer of every model that was to be asked; raise it, "
            "or limit max_tokens"
        )
    if calls and "ok" not in outcomes:
        counted = ", ".join(f"{outcomes.count(one)} {one}" for one in dict.fromkeys(outcomes))
        raise UserError(f"no model answered ({counted}); see whether they can be reached")
    return Answer(verdict.text, verdict.confidence, verdict.abstained, tuple(calls))


def dollars(amount: int) -> float:
    """Pico-dollars as dollars."""
    return amount / PICO_PER_DOLLAR

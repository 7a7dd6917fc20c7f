"""What every aggregator promises."""

from __future__ import annotations

import random
from collections.abc import Callable

from mixtura.authoring.contracts._core import Subject, require
from mixtura.errors import BudgetError, UserError
from mixtura.methods.aggregators import Aggregator, rehearse
from mixtura.running.composing.asking import Ledger, Runner
from mixtura.types.asking import Answer, Ask, Reply
from mixtura.types.models import ModelCard, Prompt

_NAMES = ("ant", "bee", "cat")
_ANSWERS = ("Answer: 4", "Answer: 5", "Answer: 6")


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> tuple[Prompt, tuple[ModelCard, ...]]:
    """A prompt with labels that a method may need, and three models at three prices."""
    del method
    labels = {"source": "Two and two are four.", "first": "Answer: 4", "second": "Answer: 5"}
    labels["options"] = "4\n5\n6"
    prompt = Prompt(id=str(seed), text=f"2 + 2? ({seed})", labels=labels, max_tokens=20)
    cards = tuple(
        ModelCard(name=name, input_price=n + 1, output_price=10 * n + 10, description=f"does {name}")
        for n, name in enumerate(_NAMES)
    )
    return prompt, cards


def use(method: Aggregator, given: tuple[Prompt, tuple[ModelCard, ...]]) -> Answer:
    """The answer where models disagree, by what they are asked."""
    _study(method)
    return Runner(given[1], _mixed).run(method, given[0])


def check_cost_is_the_sum_of_calls(method: Subject) -> None:
    """What an answer cost is what its calls cost, and what the ledger says was spent."""
    prompt, cards = sample(method, 10)
    ledger = Ledger()
    answer = Runner(cards, _mixed, ledger).run(_made(method), prompt)
    require(answer.calls, "no call was made")
    require(answer.cost == sum(call.reply.cost for call in answer.calls), "the cost is not that of the calls")
    require(ledger.spent == answer.cost, f"the ledger says {ledger.spent}, the calls {answer.cost}")
    require(ledger.reserved == 0, "money stays set aside")


def check_calls_are_bounded(method: Subject) -> None:
    """No plan makes more calls than `most_calls` says, whatever replies say."""
    for number in (1, 2, 3):
        prompt, cards = sample(method, 11)
        bound = _made(method).most_calls(number)
        for answer in (
            _mixed,
            _says("YES"),
            _says("NO"),
            _says("Step: on\nExpert: one\nExpert: two"),
            _says("A"),
        ):
            _, asked = rehearse(_made(method).plan(prompt, cards[:number]), answer)
            require(len(asked) <= bound, f"{len(asked)} calls of {number} models, where {bound} are the most")


def check_a_budget_is_never_exceeded(method: Subject) -> None:
    """Whatever the budget, no more is spent, and the plan ends with what it has or in a sentence."""
    prompt, cards = sample(method, 12)
    whole = Runner(cards, _mixed).run(_made(method), prompt).cost
    for budget in (0, whole // 3, whole, 3 * whole):
        ledger = Ledger(budget)
        try:
            answer = Runner(cards, _mixed, ledger).run(_made(method), prompt)
            require(answer.cost == ledger.spent, "the ledger differs from the calls")
        except BudgetError:
            require(ledger.spent == 0, "money is spent and there is no answer")
        require(ledger.spent <= budget, f"{ledger.spent} of {budget} is spent")


def check_equal_answers_are_the_answer(method: Subject) -> None:
    """Where every reply says the same, that is the answer."""
    prompt, cards = sample(method, 13)
    if method.has("needs:options"):
        return
    verdict, _ = rehearse(_made(method).plan(prompt, cards), _says("Answer: 4"))
    require(verdict.text == "Answer: 4", f"all say 'Answer: 4' and the answer is {verdict.text!r}")


def check_all_failing_is_an_error(method: Subject) -> None:
    """If no call has an answer that is an error, never an empty success."""
    prompt, cards = sample(method, 14)
    try:
        Runner(cards, lambda ask: Reply(outcome="timeout")).run(_made(method), prompt)
    except UserError as error:
        require("timeout" in str(error), f"the error must say what happened, got: {error}")
        return
    require(False, "it answers though no model did")


def check_some_failing_is_survived(method: Subject) -> None:
    """With any one call lost, the plan still ends."""
    prompt, cards = sample(method, 15)
    _, asked = rehearse(_made(method).plan(prompt, cards), _mixed)
    for lost in range(len(asked)):
        count = iter(range(10**6))

        def answer(ask: Ask, lost: int = lost, count: object = count) -> Reply | str:
            return Reply(outcome="broken") if next(count) == lost else _mixed(ask)  # type: ignore[call-overload]

        rehearse(_made(method).plan(prompt, cards), answer)


def check_closing_stops(method: Subject) -> None:
    """A plan that is closed asks nothing more."""
    prompt, cards = sample(method, 16)
    plan = _made(method).plan(prompt, cards)
    next(plan)
    plan.close()
    require(next(plan, None) is None, "a closed plan asks on")


def check_many_prompts_are_as_one(method: Subject) -> None:
    """Prompts that are run in step have the answers that they have alone."""
    prompts = [sample(method, seed)[0] for seed in range(4)]
    cards = sample(method, 0)[1]
    runner = Runner(cards, _mixed)
    together = runner.run_all(_made(method), prompts)
    alone = [runner.run(_made(method), prompt) for prompt in prompts]
    require([a.text for a in together] == [a.text for a in alone], "answers in step differ from those alone")
    require([a.cost for a in together] == [a.cost for a in alone], "costs in step differ from those alone")


def check_order_of_replies(method: Subject) -> None:
    """Under `votes` the same replies in another order win by the same vote, unless it is a tie."""
    if not method.has("votes"):
        return
    prompt, cards = sample(method, 17)
    texts = ["Answer: 4", "Answer: 5", "Answer: 4"]
    for seed in range(6):
        turned = random.Random(seed).sample(texts, 3)
        made = _made(method)
        plan = made.plan(prompt, cards)
        batch = next(plan)
        if len(batch) == 1:
            batch = plan.send([Reply(text="one way\nanother way\na third way\na fourth way\na fifth way")])
        replies = [Reply(text=(turned * len(batch))[n]) for n in range(len(batch) - len(batch) % 3)]
        try:
            plan.send([*replies, *[Reply(outcome="broken")] * (len(batch) - len(replies))])
        except StopIteration as end:
            require(end.value.text == "Answer: 4", f"the vote goes to {end.value.text!r}")
        else:
            require(False, "a vote asks on after the replies")


def check_only_plain_asks_replay(method: Subject) -> None:
    """With the tag `replays` every ask is the user's own prompt, and without it some ask is not."""
    prompt, cards = sample(method, 18)
    _, asked = rehearse(_made(method).plan(prompt, cards), _mixed)
    only_plain = all(ask.plain for ask in asked)
    require(only_plain == method.has("replays"), "the tag `replays` does not agree with what is asked")
    for ask in asked:
        require(not ask.plain or (ask.messages == prompt.conversation() and not ask.prefill),
                "an ask is called plain, and is not the user's prompt")  # fmt: skip
        require(not ask.prefill or method.has("needs:prefill"), "a prefill needs the tag `needs:prefill`")


def _study(method: Aggregator) -> None:
    method.study([("1 + 1?", "One and one are two. Answer: 2"), ("3 + 3?", "Answer: 6")])


def _made(method: Subject) -> Aggregator:
    made: Aggregator = method.create()
    _study(made)
    return made


def _mixed(ask: Ask) -> Reply:
    """One of three answers, by what is asked of whom, with tokens to pay for."""
    key = f"{ask.model} {ask.sample} {ask.messages[-1].content}"
    text = _ANSWERS[random.Random(key).randrange(3)]
    return Reply(text=text, input_tokens=30, output_tokens=10)


def _says(text: str) -> Callable[[Ask], Reply]:
    return lambda ask: Reply(text=text)

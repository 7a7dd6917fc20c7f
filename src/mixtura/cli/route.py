"""`mixtura route`: which whole model answers a prompt: learned from a table, measured, asked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtura.cli._settings import parse_settings
from mixtura.errors import SettingError, UserError
from mixtura.methods.settings import key_and_value

if TYPE_CHECKING:
    from mixtura.running.composing.fitted import FittedRouter
    from mixtura.types.models import Decision, Wish

route = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Choose which whole model answers a prompt: `fit` a router on a table of answers, `eval`, `ask` it.",
)

Table = Annotated[
    Path,
    typer.Argument(
        help="Outcomes, one a row (.jsonl, .csv, .parquet): prompt, model, score from 0 to 1; where known "
        "cost (dollars), input_tokens, output_tokens, propensity; other columns are labels, such as task."
    ),
]
Cards = Annotated[
    Path | None,
    typer.Option(
        help="JSON list of the models' cards: name, input_price and output_price (dollars a million tokens), "
        "context, abilities, ..."
    ),
]
Router = Annotated[Path, typer.Argument(help="Directory of a router that `mixtura route fit` wrote.")]
PerDollar = Annotated[
    float, typer.Option(min=0, help="Score that a dollar must buy: more of it takes cheaper models.")
]
MostCost = Annotated[
    float | None,
    typer.Option(min=0, help="Expected dollars that a prompt may cost; the best below is taken."),
]
LeastQuality = Annotated[
    float | None, typer.Option(min=0, max=1, help="The cheapest model expected to score this is taken.")
]
Budget = Annotated[
    float | None, typer.Option(min=0, help="Dollars that the dearest possible answer may cost.")
]
Floor = Annotated[float | None, typer.Option(min=0, max=1, help="Abstain where no model surely scores this.")]
Fallback = Annotated[str, typer.Option(help="With --floor: the model to take then; none without it.")]
Explore = Annotated[
    float, typer.Option(min=0, max=1, help="Probability of a model drawn at random, for logs to learn from.")
]
Seed = Annotated[int, typer.Option(help="Settles what is drawn at random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@route.command()
def fit(
    table: Table,
    out: Annotated[Path, typer.Option(help="Directory of the router.")] = Path("router"),
    router: Annotated[
        str, typer.Option(help="By name or .py file; see `mixtura methods model_routers`.")
    ] = "knn",
    cards: Cards = None,
    changes: Annotated[
        list[str], typer.Option("--set", help="Change a setting, such as num_neighbours=20.")
    ] = [],  # noqa: B006 - typer reads it as a default and makes lists of its own
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Learn from a table of answers which model is good at what.

    Example: `mixtura route fit answers.jsonl --cards cards.json --router uniroute --out router`
    """
    from mixtura.cli._places import check_folder
    from mixtura.running.composing.fitted import fit_model_router
    from mixtura.running.composing.reading import read_table

    check_folder(out)
    source = read_table(table, cards)
    fitted = fit_model_router(source, router, None, seed, **parse_settings(changes))
    fitted.save(out)
    kept = fitted.calibration
    if as_json:
        found = {
            "router": str(out),
            "method": router,
            "prompts": len(source.prompts),
            "holes": source.num_holes,
        }
        typer.echo(json.dumps({**found, "models": list(source.names), "calibration": asdict(kept)}))
        return
    typer.echo(
        f"{router} learned from {len(source.prompts)} prompts and {len(source.cards)} models "
        f"({source.num_holes} answers missing); written to {out}"
    )
    if kept.num_prompts:
        typer.echo(
            f"expected scores differ from true ones by {kept.error_after:.3f} on average, calibrated on "
            f"{kept.num_prompts} prompts that were held back ({kept.error_before:.3f} before)"
        )
    if not fitted.costs.costs and not all(card.is_priced for card in fitted.cards):
        typer.echo("no prices and no costs are known: it can prefer quality alone", err=True)


@route.command(name="eval")
def evaluate(
    router: Router,
    table: Table,
    quality_per_dollar: PerDollar = 0.0,
    most_cost: MostCost = None,
    least_quality: LeastQuality = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Say what a router reaches on answers that it did not learn from, beside single models.

    A table with propensities is taken for a log of one answer a prompt: what the router would have reached is
    estimated from it.

    Example: `mixtura route eval router held_out.jsonl --quality-per-dollar 50`
    """
    from mixtura.running.composing.evaluating import evaluate as measured
    from mixtura.running.composing.fitted import load_model_router
    from mixtura.running.composing.reading import read_table

    fitted = load_model_router(router)
    wish = _wish(quality_per_dollar=quality_per_dollar, most_cost=most_cost, least_quality=least_quality)
    rows = measured(fitted, read_table(table), wish, seed)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in rows]))
        return
    from mixtura.report.screen import screen, show_table

    cells = [
        [one.name, f"{one.score:.4f}", f"{one.low:.4f} to {one.high:.4f}", one.shown_cost] for one in rows
    ]
    show_table(screen(), ["", "score", "95 %", "$ a thousand"], cells)


@route.command()
def ask(
    router: Router,
    prompt: Annotated[str, typer.Argument(help="The text to be answered.")],
    label: Annotated[list[str], typer.Option(help="What is known of it beside its text: task=math.")] = [],  # noqa: B006
    need: Annotated[list[str], typer.Option(help="An ability it needs, such as tools.")] = [],  # noqa: B006
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens its answer may have.")] = None,
    quality_per_dollar: PerDollar = 0.0,
    most_cost: MostCost = None,
    least_quality: LeastQuality = None,
    budget: Budget = None,
    floor: Floor = None,
    fallback: Fallback = "",
    explore: Explore = 0.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Say which model a prompt would go to, and why. Nothing is sent anywhere.

    Example: `mixtura route ask router "What is 17 * 23?" --label task=math --least-quality 0.8`
    """
    from mixtura.running.composing.fitted import load_model_router
    from mixtura.types.models import Prompt

    fitted = load_model_router(router)
    labels = {key: value.strip() for key, value in map(key_and_value, label)}
    _check_labels(fitted, labels)
    wish = _wish(
        quality_per_dollar=quality_per_dollar, most_cost=most_cost, least_quality=least_quality,
        budget=budget, floor=floor, fallback=fallback, explore=explore,
    )  # fmt: skip
    asked = Prompt(id=prompt, text=prompt, labels=labels, needs=frozenset(need), max_tokens=max_tokens)
    (decision,) = fitted.decide([asked], wish, seed)
    if decision.model is None and not decision.abstained:
        raise UserError(_nobody(decision))
    if as_json:
        typer.echo(json.dumps(asdict(decision)))
        return
    _say(decision)


def _wish(**given: Any) -> Wish:
    from mixtura.types.models import PICO_PER_DOLLAR, Wish

    for key in ("most_cost", "budget"):
        if given.get(key) is not None:
            given[key] = given[key] * PICO_PER_DOLLAR
    if given.get("fallback") and given.get("floor") is None:
        raise SettingError("--fallback is the model taken where the router abstains; give --floor, too")
    return Wish(**given)


def _check_labels(fitted: FittedRouter, labels: dict[str, str]) -> None:
    from mixtura.errors import UnknownNameError

    for key in labels:
        if key not in fitted.labels:
            raise UnknownNameError("label in the router's table", key, fitted.labels)


def _nobody(decision: Decision) -> str:
    reasons = "; ".join(f"{name}: {why}" for name, why in decision.ineligible.items())
    return f"no model can answer this ({reasons}); raise --budget, limit --max-tokens, or need less"


def _say(decision: Decision) -> None:
    from mixtura.report.screen import screen, show_table
    from mixtura.types.models import PICO_PER_DOLLAR

    if decision.abstained:
        taken = f"; {decision.model} is asked instead" if decision.model else ""
        typer.echo(f"no model is trusted with this{taken}")
    elif decision.explored:
        typer.echo(f"{decision.model} (drawn at random)")
    else:
        typer.echo(f"{decision.model}")
    rows = []
    for name in {**decision.propensities, **decision.quality}:
        quality, cost = decision.quality.get(name), decision.cost.get(name)
        rows.append(
            [
                name,
                "" if quality is None else f"{quality:.3f}",
                "" if cost is None else f"{cost * 1000 / PICO_PER_DOLLAR:.4g}",
                f"{decision.propensities.get(name, 0.0):.1%}",
            ]
        )
    show_table(screen(), ["", "expected score", "$ a thousand", "chance"], rows)
    for name, why in decision.ineligible.items():
        typer.echo(f"{name} is left out: {why}")

"""`mixtura ensemble`: several whole models with one tokenizer as one, token by token."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtura.cli._settings import parse_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mixtura.methods.ensembles import Ensemble
    from mixtura.running.ensembling.scoring import Scored
    from mixtura.running.ensembling.team import Team
    from mixtura.running.ensembling.training import Stage

ensemble = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Run several models with one tokenizer as one, token by token: `train` what a method trains, "
    "`eval` it beside each model alone, `generate` by it.",
)

Models = Annotated[
    list[str], typer.Argument(help="Two models or more with one tokenizer: directories or hub ids.")
]
By = Annotated[
    str,
    typer.Option(
        help="A method that trains nothing, by name or .py file (`mixtura methods ensembles`), or the "
        "directory that `mixtura ensemble train` wrote."
    ),
]
Changes = Annotated[list[str], typer.Option("--set", help="A setting of the method, such as switching=0.01.")]
Text = Annotated[
    Path | None,
    typer.Option(
        help="A UTF-8 file, records (.jsonl with prompt and answer) or a directory whose folders are "
        "domains; without it, text that comes with mixtura."
    ),
]
NumTexts = Annotated[int, typer.Option(min=1, help="Pieces of text at most.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a piece of text.")]
PromptTokens = Annotated[
    int, typer.Option(min=1, help="Tokens at the beginning of a piece that are given, not foretold.")
]
Seed = Annotated[int, typer.Option(min=0, help="Settles what is drawn at random.")]
Yes = Annotated[bool, typer.Option("--yes", help="Download a model from the hub without asking.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

Out = Annotated[Path, typer.Option(help="Directory of the ensemble.")]
Method = Annotated[str, typer.Option(help="See `mixtura methods ensembles`.")]
Own = Annotated[
    str | None,
    typer.Option(help="What a method's own model begins as, where it has one; the first model else."),
]
Pairs = Annotated[
    Path | None,
    typer.Option(
        help="A .jsonl file of prompt, chosen and rejected for a stage that learns from pairs, which is "
        "left out without it."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Steps of each stage.")]
Batch = Annotated[int, typer.Option(min=1, help="Texts of a step.")]
Rate = Annotated[float, typer.Option(min=0, help="Of the method's parts.")]
OwnRate = Annotated[float, typer.Option(min=0, help="Of a model of its own.")]


@ensemble.command()
def train(
    models: Models,
    out: Out,
    method: Method = "fusion_route",
    own: Own = None,
    pairs: Pairs = None,
    text: Text = None,
    num_texts: NumTexts = 512,
    length: Length = 128,
    prompt_tokens: PromptTokens = 16,
    steps: Steps = 100,
    batch: Batch = 8,
    learning_rate: Rate = 1e-3,
    own_learning_rate: OwnRate = 1e-4,
    changes: Changes = [],  # noqa: B006 - typer reads it as a default and makes lists of its own
    seed: Seed = 0,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Train the parts that a method adds to models, which stay as they are.

    Example: `mixtura ensemble train ./code ./math --method fusion_route --text texts/ --out both`
    """
    from mixtura.cli._places import check_folder
    from mixtura.methods import create
    from mixtura.running.ensembling.lessons import read_pairs
    from mixtura.running.ensembling.saving import check_target, save
    from mixtura.running.ensembling.training import Training
    from mixtura.running.ensembling.training import train as train_on

    check_folder(out)
    check_target(out)
    made: Ensemble = create("ensembles", method, **parse_settings(changes))
    how = Training(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        own_learning_rate=own_learning_rate,
        seed=seed,
    )
    team = _with_own(_team(models, yes), made, models[0], own, yes)
    known = [] if pairs is None else read_pairs(pairs, team)
    rows = _rows(team, text, "training", num_texts, length, prompt_tokens, seed)
    tell = None if as_json else _tell
    stages = train_on(made, team, rows, how, known, tell)
    save(out, made, team, stages)
    if as_json:
        found = {"ensemble": str(out), "method": method, "models": list(team.names)}
        typer.echo(json.dumps(found | {"stages": [asdict(one) for one in stages]}))
        return
    _tell_stages(made, stages)
    typer.echo(f"{method} of {', '.join(team.names)}: {out}")


@ensemble.command(name="eval")
def evaluate(
    models: Models,
    by: By = "bayes_mixture",
    text: Text = None,
    num_texts: NumTexts = 64,
    length: Length = 128,
    prompt_tokens: PromptTokens = 16,
    changes: Changes = [],  # noqa: B006
    seed: Seed = 0,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Say how well it foretells text, beside each model alone and the best of them in hindsight.

    Example: `mixtura ensemble eval ./code ./math --by both --text held_out/`
    """
    from mixtura.running.ensembling.scoring import score

    made, team = _made(by, changes, models, yes)
    rows = _rows(team, text, "held_out", num_texts, length, prompt_tokens, seed)
    found = score(made, team, rows)
    if as_json:
        said = {"by": by, "models": list(team.names), **asdict(found)}
        typer.echo(json.dumps(said))
        return
    _show(by, team, found)


@ensemble.command()
def generate(
    models: Models,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    by: By = "bayes_mixture",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    changes: Changes = [],  # noqa: B006
    seed: Seed = 0,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt by several models at once.

    Example: `mixtura ensemble generate ./code ./math --prompt "def area(r):" --by both`
    """
    from mixtura.running.ensembling.generating import continue_text

    made, team = _made(by, changes, models, yes)
    told = None if as_json else lambda piece: typer.echo(piece, nl=False)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    found = continue_text(made, team, prompt, chat=chat, on_text=told, **options)
    if as_json:
        typer.echo(json.dumps({"by": by, "models": list(team.names), **asdict(found)}))
        return
    typer.echo()
    parts = ", ".join(f"{name} {share:.0%}" for name, share in zip(team.names, found.shares, strict=True))
    typer.echo(f"{len(found.token_ids)} tokens in {found.seconds:.2f} s; {parts}", err=True)


def _made(by: str, changes: list[str], models: list[str], yes: bool) -> tuple[Ensemble, Team]:
    """The ensemble that is asked for, and its models."""
    from mixtura.errors import SettingError, UserError
    from mixtura.methods import create, declared_tags
    from mixtura.running.ensembling.saving import open_ensemble

    folder = Path(by)
    if folder.is_dir():
        if changes:
            raise SettingError("--set is for a method by its name; a trained ensemble has its settings")
        return open_ensemble(folder, _team(models, yes))
    made: Ensemble = create("ensembles", by, **parse_settings(changes))
    if "trained" in declared_tags(type(made)):
        raise UserError(
            f"{by} has parts that must be trained; train them by 'mixtura ensemble train ... --method {by} "
            "--out DIRECTORY' and give the directory by --by"
        )
    return made, _team(models, yes)


def _team(models: list[str], yes: bool) -> Team:
    from mixtura.errors import UserError

    if len(models) < 2:
        raise UserError(f"an ensemble is of two models or more, got {len(models)}; give further ones")
    from mixtura.running.ensembling.team import open_team
    from mixtura.running.resolve import resolve_model

    found = [resolve_model(one, assume_yes=yes) for one in models]
    return open_team([one.path for one in found], [one.name for one in found])


def _with_own(team: Team, made: Ensemble, first: str, own: str | None, yes: bool) -> Team:
    from mixtura.errors import SettingError
    from mixtura.methods import declared_tags

    if own is None:
        return team.with_own(made)
    if "own_model" not in declared_tags(type(made)):
        raise SettingError(f"{type(made).__name__} has no model of its own; leave --own out")
    from mixtura.running.ensembling.team import open_team
    from mixtura.running.resolve import resolve_model

    found = [resolve_model(one, assume_yes=yes) for one in (first, own)]
    both = open_team([one.path for one in found], [one.name for one in found])
    return team.with_own(made, both.models[1])


def _rows(
    team: Team, text: Path | None, part: str, num_texts: int, length: int, num_prompt: int, seed: int
) -> list[Any]:
    from random import Random

    from mixtura.data.reading import read
    from mixtura.data.text import calibration, held_out
    from mixtura.running.ensembling.lessons import rows_of

    if text is not None:
        documents = read(text, team.tokenizer)
    else:
        take = calibration if part == "training" else held_out
        documents = take(num_chars=4 * length * num_texts)
    rows = rows_of(documents, team, length=length, num_prompt=num_prompt)
    Random(seed).shuffle(rows)
    return rows[:num_texts]


def _tell(stage: str, step: int, loss: float) -> None:
    if step == 1 or step % 10 == 0:
        typer.echo(f"{stage} step {step}: loss {loss:.4f}", err=True)


def _show(by: str, team: Team, found: Scored) -> None:
    from mixtura.report.screen import screen, show_table

    domains = list(found.losses)
    rows = [[by, *(f"{found.losses[one]:.4f}" for one in domains)]]
    for place, name in enumerate(team.names):
        rows.append([name, *(f"{found.alone[one][place]:.4f}" for one in domains)])
    rows.append(["best by text, in hindsight", *(f"{found.best_by_text[one]:.4f}" for one in domains)])
    rows.append(["best by token, in hindsight", *(f"{found.best_by_token[one]:.4f}" for one in domains)])
    show_table(screen(), ["nats a token", *domains], rows)
    for place, name in enumerate(team.names):
        shares = ", ".join(f"{one} {found.shares[one][place]:.0%}" for one in domains)
        typer.echo(f"share of {name}: {shares}")


def _tell_stages(made: Ensemble, stages: Sequence[Stage]) -> None:
    for one in stages:
        typer.echo(
            f"{one.name}: loss {one.first:.4f} in the first tenth of its steps, {one.last:.4f} in the last"
        )
    for name in made.stages[len(stages) :]:
        typer.echo(f"{name} was left out: it learns from pairs; give some by --pairs", err=True)

"""`mixtura chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import contextlib
import sys

import typer

from mixtura.cli._generating import Adapter, Bits, Cache, Memory, Prefetch, TraceFile, Unmerged
from mixtura.cli._serving import CacheMemory, Context, Served, opened
from mixtura.cli._tiers import DEFAULT_CACHE, NO_PREFETCH, check_words
from mixtura.errors import UserError, one_line

_PROMPT = "> "


def chat(
    model: str | None = typer.Argument(
        None, help="Directory or hub id; without it, the specimen.", show_default=False
    ),
    system: str = typer.Option("", help="What the model is told before everything."),
    temperature: float | None = typer.Option(
        None, min=0.0, max=2.0, help="0 takes the likeliest token each time; by default as the model says."
    ),
    seed: int | None = typer.Option(None, min=0, help="Seed of the draws; by default another each time."),
    max_new_tokens: int = typer.Option(1024, min=1, help="Tokens of an answer at most."),
    memory: Memory = None,
    cache: Cache = DEFAULT_CACHE,
    prefetch: Prefetch = NO_PREFETCH,
    trace: TraceFile = None,
    context: Context = None,
    cache_memory: CacheMemory = None,
    bits: Bits = None,
    adapter: Adapter = None,
    unmerged: Unmerged = False,
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
) -> None:
    """Talk with a model, in as little memory as `generate`; /help lists what else can be said.

    What was said is not read again with each question. Ctrl-C ends an answer, Ctrl-D the chat.

    Example: `mixtura chat ./Qwen3-30B-A3B --memory 8GiB`
    """
    check_words(memory, cache, prefetch, trace)
    served = Served(
        memory=memory, cache=cache, prefetch=prefetch, trace=trace, context=context,
        cache_memory=cache_memory, bits=bits, adapter=adapter, merge=not unmerged,
    )  # fmt: skip
    found, name = opened(model, served, yes=yes)
    from mixtura.serving.chatting import Chat
    from mixtura.serving.engine.records import Sampling

    engine = found.engine
    try:
        if not getattr(found.tokenizer, "chat_template", None):
            raise UserError(f"{name} has no chat template to talk by; use mixtura generate")
        talk = Chat(
            engine, found.tokenizer, Sampling(temperature=temperature, seed=seed), max_new_tokens, _show
        )
        talk.conversation.system = system
        typer.echo(f"{name}, {engine.limits.context} tokens of context; /help lists commands", err=True)
        while (line := _line()) is not None:
            try:
                if not talk.take(line):
                    break
            except UserError as error:
                typer.echo(f"error: {one_line(error)}", err=True)
    finally:
        engine.close(0)


def _show(piece: str) -> None:
    typer.echo(piece, nl=False)
    sys.stdout.flush()


def _line() -> str | None:
    """The next line, None at the end; Ctrl-C at an empty prompt begins it anew."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    with contextlib.suppress(ImportError):
        # Where it is there, lines can be edited and called back.
        import readline  # noqa: F401
    while True:
        try:
            return input(_PROMPT)
        except EOFError:
            typer.echo("", err=True)
            return None
        except KeyboardInterrupt:
            typer.echo("", err=True)

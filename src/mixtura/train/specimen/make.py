"""Make the specimen: `python -m mixtura.train.specimen.make`, which is what `make specimen` runs.

The tokenizer is learnt, the model of `recipe.yaml` is trained with `mixtura train`, the result is written
into the package as an ordinary checkpoint, and its card is measured. The training lives in `build/specimen`
and can be killed at any time: the same command goes on exactly where it was. `metrics.jsonl` there says how
far it is. `--set num_steps=300 --set decay_steps=60` makes a shorter training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mixtura.data.specimen import MODEL
from mixtura.errors import UserError

RUN = Path("build/specimen")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixtura.train.specimen.make",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, default=RUN, help="directory of the training")
    parser.add_argument("--out", type=Path, default=MODEL, help="where the model is written")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads to train with")
    parser.add_argument("--no-card", action="store_true", help="leave the model unmeasured")
    return parser


def make(run: Path, out: Path, changes: Sequence[str] = (), *, card: bool = True) -> None:
    """Train in ``run``, or go on there, and write the model to ``out``.

    Raises:
        UserError: a change is not one of the recipe, or the training there is another.
    """
    from mixtura.train.run import train
    from mixtura.train.specimen.card import write_card
    from mixtura.train.specimen.recipe import changed
    from mixtura.train.specimen.snapshot import snapshot
    from mixtura.train.specimen.tokenizer import learn

    tokenizer = learn(run / "tokenizer")
    train(changed([f"tokenizer={tokenizer}", *changes]), run / "training")
    snapshot(run / "training", out)
    if card:
        write_card(out)


def main() -> int:
    """Parse the command line, run it and give the exit code."""
    arguments = _parser().parse_args()
    try:
        import torch

        torch.set_num_threads(arguments.threads)
        make(arguments.run, arguments.out, arguments.set, card=not arguments.no_card)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

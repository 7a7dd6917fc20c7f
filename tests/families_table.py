"""Run every check on every family and write what came out to docs/families.json and docs/families.md.

python tests/families_table.py            # all families, a few minutes
python tests/families_table.py mixtral    # print the rows of some, write nothing
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import family_checks as checks
import torch
import transformers
from families import FAMILIES, model_class, tiny_model

from mixtura.checkpoints.view import open_model
from mixtura.checkpoints.viewing.refusals import OUTSIDE_CONTRACT

DOCS = Path(__file__).parent.parent / "docs"
COLUMNS = {
    "view_memory": "view in memory",
    "view_disk": "view on disk",
    "backend": "experts backend",
    "prune_equals_mask": "prune ≡ mask",
    "save_reload": "save → reload",
    "edit_on_disk": "prune on disk",
}
NOTES = {
    "deepseek_v4": "layers routed by a table of token ids keep all their experts, so a pruned model has no "
    "single number of experts that plain transformers could load",
    "diffusion_gemma": "encoder and decoder share their experts and lose the same ones",
    "ernie4_5_vl_moe": "experts for text and for images in each layer, counted by one number",
    "inkling": "the router also weighs the shared experts; their rows stay",
    "qwen3_omni_moe": "checked on the thinker; the talker's layers are numbered after it",
    "zaya": "the router's extra class, which skips the experts, stays",
}
# Families of which a pruned model is no ordinary checkpoint, by the note above.
NEVER_UNIFORM = {"deepseek_v4"}


def row(family: str) -> dict[str, Any]:
    """One row: what the family is and whether each check held."""
    layer = open_model(tiny_model(family)).layers[-1]
    return {
        "family": family,
        "model_class": model_class(family).__name__,
        "text_generation": "CausalLM" in model_class(family).__name__
        or "ConditionalGeneration" in model_class(family).__name__,
        "layout": layer.layout.name,
        "router": layer.scoring,
        "view_memory": held(lambda folder: checks.check_view_memory(family)),
        "view_disk": held(lambda folder: checks.check_view_disk(family, folder)),
        "backend": held(lambda folder: checks.check_backend(family)),
        "prune_equals_mask": held(lambda folder: checks.check_prune_equals_mask(family)),
        "save_reload": saved(family, lambda folder: checks.check_save_reload(family, folder)),
        "edit_on_disk": saved(family, lambda folder: checks.check_edits(family, folder)),
        "note": NOTES.get(family, ""),
    }


def saved(family: str, check: Callable[[Path], None]) -> bool | None:
    """As `held`, for what only an ordinary checkpoint can have."""
    return None if family in NEVER_UNIFORM else held(check)


def held(check: Callable[[Path], None]) -> bool:
    """Whether a check passes; why not goes to the terminal."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            check(Path(folder))
        except Exception as error:
            print(f"  {type(error).__name__}: {error}", file=sys.stderr)
            return False
    return True


def markdown(rows: Iterable[dict[str, Any]], versions: dict[str, str]) -> str:
    """The page in docs."""
    rows = list(rows)
    head = ["family", "class checked", "experts' layout", "router", *COLUMNS.values(), "note"]
    marks = {True: "yes", False: "**no**", None: "–"}
    lines = [
        "# Families",
        "",
        f"Every family of transformers {versions['transformers']} that follows its common experts contract "
        f"({len(rows)} of them), on a tiny random model of each, with PyTorch {versions['torch']} on CPU. "
        "Written by `python tests/families_table.py`, which runs the checks; the slow tests run them too.",
        "",
        "- *view in memory*: every expert read through the view, multiplied out by hand, gives what the "
        "family's own module gives; experts, router rows and biases written through it are the model's.",
        "- *view on disk*: the saved model, with experts fused and one by one, reads as the one in memory, "
        "bit for bit.",
        "- *experts backend*: outputs and every parameter's gradient equal transformers' eager loop, to "
        f"{checks.TOLERANCE:g} in double precision.",
        "- *prune ≡ mask*: dropping experts gives the outputs that masking their selection scores gives, to "
        f"{checks.TOLERANCE:g} of the largest.",
        "- *save → reload*: the pruned model, saved and loaded by plain transformers, gives the same bits.",
        "- *prune on disk*: the checkpoint edited tensor by tensor loads as the model pruned in memory.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for item in rows:
        cells = [item["family"], item["model_class"], item["layout"], item["router"]]
        cells += [marks[item[column]] for column in COLUMNS]
        lines.append(f"| {' | '.join([*cells, item['note']])} |")
    lines += [
        "",
        "## Not supported",
        "",
        "These keep their experts in ways of their own; mixtura refuses them by name.",
        "",
        "| model type | why |",
        "|---|---|",
        *(f"| {name} | {reason} |" for name, reason in OUTSIDE_CONTRACT.items()),
        "",
    ]
    return "\n".join(lines)


def main(names: list[str]) -> None:
    """Run the checks; write the page unless only some families were asked for."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for family in names or FAMILIES:
        rows.append(row(family))
        print(json.dumps(rows[-1]), flush=True)
    if names:
        return
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    result = {"versions": versions, "tolerance": checks.TOLERANCE, "families": rows}
    (DOCS / "families.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (DOCS / "families.md").write_text(markdown(rows, versions), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Make the table of docs/arena/model_routers.md from published MMLU-Pro results.

    python benchmarks/routing.py results.json.gz model_outputs_jamba-1.5-large_5shots.zip --out build/mmlu
    mixtura arena model_routers --table build/mmlu/table.jsonl --seeds 1 --out docs/arena \\
        --about "$(cat build/mmlu/about.txt)"

The first file says which model answered which question rightly (model, question id, 0 or 1); the second holds
the questions' texts: any model's outputs in the repository TIGER-AI-Lab/MMLU-Pro (Apache-2.0). Nothing is
downloaded.

The results have no prices. As a cost that can be checked, a model's is its active parameters in billions:
dollars of a thousand prompts on the page are these. Models whose makers do not say how many they have are
left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import zipfile
from pathlib import Path

# Where the name does not say: as the makers state.
ACTIVE_BILLIONS = {"Mixtral-8x7B": 12.9, "Phi-3-mini": 3.8, "c4ai-command-r-v01": 35.0}
UNKNOWN = ("gpt4o", "gemini", "deepseek", "jamba")
ABOUT = (
    "Which of 25 open language models answered which MMLU-Pro question rightly, derived in November "
    "2026 from the evaluation outputs published in the repository TIGER-AI-Lab/MMLU-Pro (Apache-2.0); "
    "texts and categories (the label task) from there. The results have no prices: a model's cost is "
    "its active parameters in billions, so $ below are billions of parameters, not money."
)


def billions(name: str) -> float | None:
    """Active parameters of a model, in billions; None where they are not known."""
    if any(word in name.lower() for word in UNKNOWN):
        return None
    for start, value in ACTIVE_BILLIONS.items():
        if name.startswith(start):
            return value
    found = re.search(r"(?<![\dx.])(\d+)[bB](?![a-z])", name)
    return float(found.group(1)) if found else None


def texts(path: Path) -> dict[str, tuple[str, str]]:
    """Text and category of every question, by its id."""
    with zipfile.ZipFile(path) as archive:
        rows = json.loads(archive.read(archive.namelist()[0]))
    return {
        str(row["question_id"]): ("\n".join([row["question"], *row["options"]]), row["category"])
        for row in rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    results = json.loads(gzip.decompress(given.results.read_bytes()))
    questions = texts(given.texts)
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "table.jsonl").open("w", encoding="utf-8") as file:
        for model, answers in sorted(results.items()):
            cost = billions(model)
            for id_, right in answers.items():
                if cost is not None and id_ in questions:
                    text, task = questions[id_]
                    row = {"id": id_, "prompt": text, "task": task, "model": model, "score": right}
                    file.write(json.dumps({**row, "cost": cost / 1000}) + "\n")
    (given.out / "about.txt").write_text(ABOUT + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

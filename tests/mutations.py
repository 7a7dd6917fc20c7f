"""Would the tests notice? Faults are put into a copy of the code, one by one, and quick tests must find each.

python tests/mutations.py            # all of them: minutes
python tests/mutations.py budget     # those whose description has this word

A fault is found by its text, wherever the file lies. Where the text is gone, somebody changed the code: put a
fault of the same kind in its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("src", "tests", "docs", "pyproject.toml", "README.md", "constraints.txt")
# What pytest exits with if tests ran and some of them failed; anything else is no verdict.
TESTS_FAILED = 1


@dataclass(frozen=True)
class Fault:
    """One mistake somebody might make, and the quick tests that have to notice it."""

    what: str
    old: str
    new: str
    tests: str
    only: str = ""


FAULTS = (
    Fault(
        "kernels: a token's rows are summed without their weights",
        "factors = weights[indices]",
        "factors = torch.ones_like(weights[indices])",
        "test_dispatch.py",
    ),
    Fault(
        "kernels: every expert gets the first one's bias",
        "None if biases is None else biases[e]), weights.shape[1], runs",
        "None if biases is None else biases[0]), weights.shape[1], runs",
        "test_routed_experts.py",
    ),
    Fault(
        "routing record: padding is routed like any token",
        "kept = valid[token_ids].nonzero().squeeze(-1)",
        "kept = torch.ones_like(valid[token_ids]).nonzero().squeeze(-1)",
        "test_types.py",
    ),
    Fault(
        "routing record: absent choices become assignments",
        "present = ((flat_ids >= 0) & (flat_ids < scores.shape[1])).nonzero().squeeze(-1)",
        "present = (flat_ids >= 0).nonzero().squeeze(-1)",
        "test_types.py",
    ),
    Fault(
        "applying: router rows of the first experts stay, whichever are dropped",
        "rows = _with_rest(kept, layer.num_experts, tensor.shape[axis])",
        "rows = _with_rest(tuple(range(len(kept))), layer.num_experts, tensor.shape[axis])",
        "test_apply.py",
    ),
    Fault(
        "upcycling: a shared expert behind a switch of zero counts half",
        "scale = _SWITCHED if names.shared_switch else 1.0",
        "scale = 1.0",
        "test_upcycling_families.py",
        "function",
    ),
    Fault(
        "upcycling: padding counts in what a router begins with",
        "        lengths = valid.sum(1)\n        summed = (inputs.float() * valid[..., None]).sum(1)",
        "        lengths = valid.sum(1) * 0 + valid.shape[1]\n        summed = inputs.float().sum(1)",
        "test_upcycling_run.py",
        "router_rows",
    ),
    Fault(
        "viewing: a mask stays on the correction bias",
        "            bias.copy_(held)",
        "            bias.copy_(bias)",
        "test_view_families.py",
        "dropping_equals_masking",
    ),
    Fault(
        "fitting: the experts chosen may take more than the budget",
        "while total > budget_bytes:",
        "while total > budget_bytes + 4:",
        "test_allocate.py",
    ),
    Fault(
        "fitting: the best plan need not fit the budget",
        "if m.expert_bytes <= self.budget_bytes + (saved if m.candidate.packs_rest else 0)",
        "if m.expert_bytes <= 2 * self.budget_bytes",
        "test_search.py",
    ),
    Fault(
        "cli: a user's error exits with another code",
        "EXIT_USER_ERROR = 2",
        "EXIT_USER_ERROR = 1",
        "test_cli_methods.py",
    ),
    Fault(
        "rerouting: balancers' losses of micro-batches are not scaled by their share",
        "return total * (counts.num_tokens / max(self._whole.num_tokens, 1))",
        "return total",
        "test_balance.py",
        "accumulat or counts_first or micro",
    ),
    Fault(
        "contracts: a check that fails passes",
        'return Outcome(check.__name__, "fail", _reason(error))',
        'return Outcome(check.__name__, "pass", _reason(error))',
        "test_contracts_bite.py",
        "caches",
    ),
    Fault(
        "observing: every choice of a token is multiplied by the first one's factor",
        'factor.to("cpu", torch.float64)[tokens, places]',
        'factor.to("cpu", torch.float64)[tokens, 0 * places]',
        "test_observe_pruners.py",
        "statistics_of_whole_layers",
    ),
    Fault(
        "observing: the residual is what the norm made, not what it was given",
        "return before.reshape(-1, before.shape[-1])",
        "return after.reshape(-1, after.shape[-1])",
        "test_observe_pruners.py",
        "statistics_of_whole_layers",
    ),
    Fault(
        "pruning: protected experts are dropped like any",
        "wanted[list(protected)] = torch.inf",
        "wanted[list(protected)] += 0",
        "test_pruners_budget.py",
    ),
    Fault(
        "observing: all domains are counted as the first",
        "cells = (cursor.domains[:, None] * self._num_experts + index)[present]",
        "cells = (0 * cursor.domains[:, None] + index)[present]",
        "test_observe.py",
    ),
    Fault(
        "quantizers: of the ranges tried the worst is taken",
        "scales = torch.where(gain > gains, best, scales)",
        "scales = torch.where(gain < gains, best, scales)",
        "test_quantizer_round_to_nearest.py",
    ),
    Fault(
        "whole models: money that is set aside is not counted",
        "self.spent + self.reserved + amount > self.budget",
        "self.spent + amount > self.budget",
        "test_composing_asking.py",
    ),
    Fault(
        "model routers: a dearer model is preferred where two are expected to be equally good",
        "np.broadcast_to(names, quality.shape), cost, -worth",
        "np.broadcast_to(names, quality.shape), -cost, -worth",
        "test_model_router_cheapest.py",
    ),
    Fault(
        "estimates from logs: outcomes are not weighted by their propensity",
        "shares.get(one.model, 0.0) / one.propensity",
        "shares.get(one.model, 0.0)",
        "test_composing_measures.py",
    ),
    Fault(
        "nested experts: of the widths asked for the narrowest is read",
        "return held[0] if held else None",
        "return held[-1] if held else None",
        "test_nesting.py",
    ),
    Fault(
        "serving: the memory of a text that ended stays set apart",
        "self.running_bytes -= row.reserved_bytes",
        "self.running_bytes -= 0",
        "test_engine.py",
        only="taking_back",
    ),
    Fault(
        "serving: texts side by side see the first one's tokens",
        "made[row, :, : part.shape[-2]] = part[0]",
        "made[row, :, : part.shape[-2]] = parts[0][0, :, : part.shape[-2]]",
        "test_step_rows.py",
        only="own",
    ),
)


def find(root: Path, old: str) -> Path:
    """The one file whose text has ``old``, once.

    Raises:
        LookupError: there is none, or more than one place.
    """
    found = [path for path in sorted(root.rglob("*.py")) if old in path.read_text(encoding="utf-8")]
    if len(found) != 1 or found[0].read_text(encoding="utf-8").count(old) != 1:
        raise LookupError(f"{old!r} stands in {len(found)} files; it must stand in one place")
    return found[0]


def run(copy: Path, tests: str, only: str) -> subprocess.CompletedProcess[str]:
    """Run quick tests of the copy on its own code."""
    (path,) = (copy / "tests").rglob(tests)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-m", "not slow", "-k", only, str(path)]
    # A file that changes and changes back within a second is not to be taken for what was compiled of it.
    environment = {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command,
        cwd=copy,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@cache
def run_unharmed(copy: Path, tests: str, only: str) -> subprocess.CompletedProcess[str]:
    """Run quick tests of the copy without any fault, once for all faults that they are to notice."""
    return run(copy, tests, only)


def noticed(copy: Path, fault: Fault) -> str:
    """Why the fault was not noticed, or nothing: the tests pass without it and fail with it."""
    path = find(copy / "src", fault.old)
    before = run_unharmed(copy, fault.tests, fault.only)
    if before.returncode:
        return f"{fault.tests} fails without it, too:\n{before.stdout[-1500:]}{before.stderr[-500:]}"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(fault.old, fault.new), encoding="utf-8")
    try:
        after = run(copy, fault.tests, fault.only)
    finally:
        path.write_text(whole, encoding="utf-8")
    if after.returncode != TESTS_FAILED:
        return f"{fault.tests} ends with {after.returncode}:\n{after.stdout[-1500:]}{after.stderr[-500:]}"
    return ""


def main(words: list[str]) -> int:
    """Try the faults whose description has one of the words; exit code 1 if one goes unnoticed."""
    wanted = [one for one in FAULTS if not words or any(word in one.what for word in words)]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=ignored)
            else:
                shutil.copy(source, copy / name)
        for fault in wanted:
            why = noticed(copy, fault)
            missed += bool(why)
            print(f"{'MISSED ' if why else 'noticed'}  {fault.what}{': ' * bool(why)}{why}", flush=True)
    print(f"{len(wanted) - missed} of {len(wanted)} noticed", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The arena of upcyclers as a whole: what has no result yet is made and trained on, then all are compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch

from mixtura.errors import UnknownNameError
from mixtura.fitting.upcycling import compose, upcycle
from mixtura.fitting.upcycling.arena.models import (
    LENGTH,
    Steps,
    held_out_loss,
    kept_model,
    prompts_of,
    sources,
    train,
)
from mixtura.fitting.upcycling.planning import grows_layers, needs_prompts, takes_moe
from mixtura.fitting.upcycling.records import RESULT
from mixtura.methods import header
from mixtura.methods import names as method_names
from mixtura.running.loading import load
from mixtura.train.arena.paired import Row, judge, kept
from mixtura.train.arena.text import Text, load_text

Say = Callable[[str], None]
# Raised when a change makes earlier results not comparable.
VERSION: Final = 1
ONE, SEVERAL, MOE = "one dense model", "three models", "one MoE model"
DENSE, SCRATCH, MEAN = "dense, trained on", "copies, from nothing", "average, trained on"
WHOLE, FEWER = "all experts, trained on", "fewer experts, trained on"
BASELINES: Final = {DENSE: ONE, SCRATCH: ONE, MEAN: SEVERAL, WHOLE: MOE, FEWER: MOE}
REFERENCES: Final = {ONE: DENSE, SEVERAL: MEAN, MOE: FEWER}
COLUMNS: Final = ("loss", "start", "parameters")
# What a method is to make, where that is not four experts of which a token takes two.
_SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "dynamic_dino": {"experts": 8, "top_k": 4},
    "c_moe": {"experts": 6, "top_k": 2},
    "read_me": {"experts": 3, "top_k": 1},
    "mote": {"experts": 4, "top_k": 1},
}
_CALIBRATION_TOKENS = 4096
# How many experts a token has in the MoE model that is made, and how many are to stay.
_MOE_TOP_K, _KEPT = 4, 2


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """What is to be run: names (all where empty), seeds, steps, and where results are kept."""

    only: tuple[str, ...] = ()
    num_seeds: int = 2
    steps: Steps = field(default_factory=Steps)
    runs: Path = Path("build/arena")


def hold(contest: Contest, say: Say) -> list[Row]:
    """Make and train what has no result yet, seed by seed, and compare.

    Raises:
        UnknownNameError: there is no such upcycler.
    """
    known = method_names("upcyclers")
    for name in contest.only:
        if name not in known:
            raise UnknownNameError("upcycler in the arena", name, known)
    methods = {name: Row(name, group_of(name)) for name in contest.only or known}
    groups = {row.group for row in methods.values()}
    rows = {name: Row(name, group) for name, group in BASELINES.items() if group in groups} | methods
    text = load_text(LENGTH)
    for seed in range(contest.num_seeds):
        for name, row in rows.items():
            terms = {"version": VERSION, "name": name, "seed": seed, "steps": asdict(contest.steps)}
            words = name.replace(",", "").replace(" ", "_")
            file = contest.runs / "upcyclers" / f"{words}-{seed}.json"
            found = kept(file, terms, partial(_tried, contest, text, seed, name))
            row.runs.append(found)
            say(f"{name}, seed {seed}: held-out loss {found['start']:.4f}, then {found['loss']:.4f}")
    for row in rows.values():
        if row.name not in BASELINES:
            judge(row, rows[REFERENCES[row.group]])
    return sorted(rows.values(), key=lambda row: (row.group, row.mean("loss")))


def group_of(name: str) -> str:
    """Whether a method begins with one dense model, with several, or with one MoE model."""
    if takes_moe(name):
        return MOE
    return SEVERAL if "composes" in header("upcyclers", name).tags else ONE


def _tried(contest: Contest, text: Text, seed: int, name: str) -> dict[str, float]:
    return _Try(contest, text, seed).of(name)


@final
class _Try:
    """One seed's dense models, and what is made of them."""

    def __init__(self, contest: Contest, text: Text, seed: int) -> None:
        self.steps, self.text, self.seed = contest.steps, text, seed
        kept_in = "-".join(map(str, (seed, self.steps.dense, self.steps.special)))
        self.folder = contest.runs / "upcyclers" / f"dense-{kept_in}"
        with torch.random.fork_rng(devices=[]):
            self.base, self.specialists = sources(self.folder, text, seed, self.steps)

    def of(self, name: str) -> dict[str, float]:
        """Make a model, measure it, train it on, and measure it again."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self._model(name)
            start = held_out_loss(model, self.text)
            # The same sequences in the same order for all.
            train(model, self.text.streams, self.seed + 500_000, self.steps.further, self.steps.rate)
            loss = held_out_loss(model, self.text)
        return {
            "loss": loss,
            "start": start,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }

    def _model(self, name: str) -> Any:
        from transformers import AutoModelForCausalLM

        if name == DENSE:
            return AutoModelForCausalLM.from_pretrained(self.base)
        if name == MEAN:
            return self._average()
        if name in (WHOLE, FEWER):
            model = AutoModelForCausalLM.from_pretrained(self._moe())
            model.config.num_experts_per_tok = _MOE_TOP_K if name == WHOLE else _KEPT
            for layer in model.model.layers:
                layer.mlp.gate.top_k = model.config.num_experts_per_tok
            return model
        made = self._made("copies" if name == SCRATCH else name)
        if name != SCRATCH:
            return made
        return AutoModelForCausalLM.from_config(made.config)

    def _made(self, name: str) -> Any:
        out = self.folder / "made"
        for left in (out, out.with_name("made.work")):
            shutil.rmtree(left, ignore_errors=True)
        common: dict[str, Any] = {"method": name, "length": LENGTH, "measure": False, "seed": self.seed}
        if group_of(name) == MOE:
            upcycle(self._moe(), out, top_k=_KEPT, **common)
        elif group_of(name) == ONE:
            grows = grows_layers(name)
            shape: dict[str, Any] = {} if grows else {"experts": 4, "top_k": 2} | dict(_SHAPES.get(name, {}))
            upcycle(self.base, out, tokens=_CALIBRATION_TOKENS, **shape, **common)
        else:
            prompts = prompts_of(self.specialists, self.seed, self.folder / "prompts.json")
            given: dict[str, Any] = {"prompts": prompts} if needs_prompts(name) else {}
            given |= {"experts": 12, "top_k": 4} if name == "innovator" else {"top_k": 2}
            compose([*self.specialists.values()], out, **given, **common)
        if grows_layers(name):
            return _only_new_layers(out)
        model = load(out)
        shutil.rmtree(out)
        return model.requires_grad_(True)

    def _moe(self) -> Path:
        """Copies of the dense model with some neurons of their own, trained as long as a specialist is."""

        def trained() -> Any:
            out = self.folder / "copies"
            for left in (out, out.with_name("copies.work")):
                shutil.rmtree(left, ignore_errors=True)
            made: dict[str, Any] = {"experts": 8, "top_k": _MOE_TOP_K, "settings": {"redrawn": 0.5}}
            upcycle(self.base, out, length=LENGTH, measure=False, seed=self.seed, **made)
            model = load(out).requires_grad_(True)
            shutil.rmtree(out)
            train(model, self.text.streams, self.seed + 250_000, self.steps.special, self.steps.rate)
            return model

        return kept_model(self.folder / "moe", trained)

    def _average(self) -> Any:
        from transformers import AutoModelForCausalLM

        models = [AutoModelForCausalLM.from_pretrained(path) for path in self.specialists.values()]
        states = [model.state_dict() for model in models]
        mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
        models[0].load_state_dict(mean)
        return models[0]


def _only_new_layers(path: Path) -> Any:
    """A dense model that was made deeper, of which the new layers alone are trained."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).requires_grad_(False)
    for number in json.loads((path / RESULT).read_text(encoding="utf-8"))["added_layers"]:
        model.model.layers[number].requires_grad_(True)
    shutil.rmtree(path)
    return model

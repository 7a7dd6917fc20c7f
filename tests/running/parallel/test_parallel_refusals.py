"""What cannot lie on several processes is refused by name at once; checkpoints are ordinary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_process import Case, loss_of, model_of, parallel_of
from transformers import AutoModelForCausalLM

import mixtura
from mixtura.authoring.contracts._processes import run_apart
from mixtura.errors import UserError
from mixtura.running.parallel.meeting import joined
from mixtura.types.placement import LayerPlacement, Placement


def said(*arguments: Any, **more: Any) -> str:
    """The sentence in which something is refused."""
    try:
        mixtura.parallelize(*arguments, **more)
    except UserError as error:
        return str(error)
    return "nothing was refused"


def refuse(rank: int, folder: str) -> dict[str, str]:
    """What a process says to things that do not fit."""
    with joined(rank, 2, folder):
        found = {"another model": said(model_of(Case(model="qwen3_moe" if rank else "gpt_oss")))}
        found["another placement"] = said(model_of(Case()), placement="contiguous" if rank else "round_robin")
        layers = tuple(LayerPlacement(index=n, devices=((0,),) * 4) for n in range(4))
        made = {"source_digest": "", "devices_per_node": 2, "layers": layers}
        found["other devices"] = said(model_of(Case()), placement=Placement(num_devices=4, **made))
        found["other experts"] = said(model_of(Case()), placement=Placement(num_devices=2, **made))
        found["parts"] = said(model_of(Case()), placement="expert_slicing", settings={"parts": 3})
        found["no experts"] = said(torch.nn.Linear(2, 2))
        parallel = parallel_of(Case(), 2)
        found["twice"] = said(parallel.model)
        found["exchange"] = said(model_of(Case()), exchange="flatt")
        return found


def test_each_is_refused_in_a_sentence(tmp_path: Path) -> None:
    both = run_apart(refuse, 2, str(tmp_path))
    wanted = {
        "another model": "processes 0 and 1 do not have the same model",
        "another placement": "processes 0 and 1 do not have the same placement",
        "other devices": "the placement is for 4 devices, but there are 2 processes; start as many",
        "other experts": "the placement has 4 experts in layer 0, the model 8; plan for this model",
        "parts": "3 parts divide neither or only one of 2 devices",
        "no experts": "Linear has no experts; use data parallelism",
        "twice": "lie on several processes already",
        "exchange": "no exchange named 'flatt'; did you mean 'flat'",
    }
    for name, sentence in wanted.items():
        assert all(sentence in one[name] for one in both), (name, both[0][name])


def test_without_processes_it_says_what_to_do() -> None:
    with pytest.raises(UserError, match="start the processes with torchrun"):
        mixtura.parallelize(model_of(Case()))


def write(rank: int, folder: str) -> list[float]:
    """Save a model whose experts lie on two processes, some of them cut and some copied."""
    with joined(rank, 2, folder):
        for name in ("copies", "expert_slicing"):
            settings = {"parts": 2} if name == "expert_slicing" else {}
            parallel = parallel_of(Case(placement=name, settings=settings), 2)
            parallel.save(Path(folder) / name)
        lossy = parallel_of(Case(placement="random", exchange="lsh"), 2)
        loss, _ = loss_of(lossy.model, rank)
        loss.backward()
        return [float(loss.detach()), float(lossy.clip_gradients(1e9))]


def test_checkpoints_are_those_of_one_process(tmp_path: Path) -> None:
    lossy = run_apart(write, 2, str(tmp_path))
    wanted = model_of(Case()).state_dict()
    for name in ("copies", "expert_slicing"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64).state_dict()
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)
    assert all(torch.isfinite(torch.tensor(one)).all() for one in lossy)
    # Nearly every token of so few is alone in its cluster: outputs are close to those of one process.
    model = model_of(Case())
    for rank in range(2):
        assert lossy[rank][0] == pytest.approx(float(loss_of(model, rank)[0].detach()), rel=0.05)

"""What experts of every kind promise where sizes, numbers or circumstances are not the usual ones."""

from __future__ import annotations

import torch

from mixtura.authoring.contracts._compare import same
from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._experts import all_rows, rows_of, sample_fields, shape_of, use
from mixtura.authoring.contracts._inputs import declared
from mixtura.errors import SettingError
from mixtura.methods.settings import construct, settings
from mixtura.types import LayerShape, Rows

_COUNTS = (1, 2, 3, 24, 128)
_SCALES = (0.0, 1e-3, 1e3)


def check_any_number_of_experts(method: Subject) -> None:
    """With 1 to 128 experts of some width they compute, or refuse it in a sentence."""
    usual = shape_of(method)
    for num_experts in _COUNTS:
        shape = LayerShape(usual.d_model, usual.d_expert, num_experts)
        try:
            bank = construct(method.cls, shape)
        except SettingError as error:
            require("\n" not in str(error), "a refusal must be one line")
            continue
        given = sample_fields(method, 40, 12)
        inputs = declared(method, {name: value for name, value in given.items() if name != "assigned"})
        every = all_rows(inputs.x, num_experts)
        rows = Rows.of(inputs.x, every.token_ids, every.expert_ids, num_experts, inputs)
        outputs, _ = use(bank, rows)
        require(torch.isfinite(outputs).all(), f"{num_experts} experts: outputs must be finite")


def check_any_seed(method: Subject) -> None:
    """A seed may be any whole number, and another seed draws other parameters."""
    if "seed" not in settings(method.cls):
        return
    drawn = [method.create(seed=seed).state_dict() for seed in (1, -5, 1 << 70)]
    require(not same(drawn[0], drawn[1]) or not drawn[0], "another seed must draw other parameters")


def check_extreme_tokens(method: Subject) -> None:
    """Of tokens of zeros, and very large ones, outputs and gradients are finite."""
    bank = method.create()
    for scale in _SCALES:
        given = sample_fields(method, 43)
        given["x"] = (scale * given["x"]).requires_grad_()
        outputs, _ = use(bank, rows_of(method, given))
        leaves = [given["x"], *(one for one in bank.parameters() if one.requires_grad)]
        found = torch.autograd.grad(outputs.sum(), leaves, allow_unused=True)
        finite = all(torch.isfinite(slope).all() for slope in (outputs, *found) if slope is not None)
        require(finite, f"an output or a gradient of tokens times {scale:g} is not finite")


def check_autocast(method: Subject) -> None:
    """Under autocast outputs are near those without it."""
    bank, rows = method.create(), rows_of(method, sample_fields(method, 44))
    plain, _ = use(bank, rows)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = use(bank, rows)
    error = ((cast.float() - plain).norm() / plain.norm()).detach()
    require(float(error) < 0.1, f"autocast changes outputs by {float(error):.2f} of their size")


def check_frozen_values_are_buffers(method: Subject) -> None:
    """What is not trained is a buffer: loading a checkpoint makes every parameter one that is trained."""
    frozen = [name for name, value in method.create().named_parameters() if not value.requires_grad]
    require(not frozen, f"{', '.join(frozen)} must be a buffer, as a loaded model would train the parameter")


def check_common_deviation(method: Subject) -> None:
    """`rescale` makes outputs smaller as the model's deviation is, and leaves them finite and not zero."""
    bank, rows = method.create(), rows_of(method, sample_fields(method, 45))
    before, _ = use(bank, rows)
    bank.rescale(0.02)
    after, _ = use(bank, rows)
    require(torch.isfinite(after).all() and after.abs().sum() > 0, "rescaled experts put out nothing")
    require(after.abs().mean() < before.abs().mean(), "rescale(0.02) must make matrices smaller")


def check_evaluation_after_a_step(method: Subject) -> None:
    """After a step of training they compute like new ones with the same state: nothing old is kept."""
    bank, rows = method.create(), rows_of(method, sample_fields(method, 46))
    with torch.no_grad():
        use(bank.eval(), rows)
    use(bank.train(), rows)[0].sum().backward()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.sub_(0.1)
        fresh = method.create()
        fresh.load_state_dict(bank.state_dict())
        require(same(use(bank.eval(), rows)[0], use(fresh.eval(), rows)[0]), "something old is kept")

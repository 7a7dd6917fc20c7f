"""What experts of every kind promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixtura.authoring.contracts import _expert_extremes, _inputs
from mixtura.authoring.contracts._compare import same
from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._experts import (
    CLOSE,
    all_rows,
    only,
    rows_of,
    sample_fields,
    shape_of,
    use,
)
from mixtura.authoring.contracts._inputs import NUM_TOKENS, chosen, converted
from mixtura.methods import create
from mixtura.methods.experts import Bank, materialises, runs
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput, Rows

__all__ = ["use"]

MORE = (_expert_extremes,)


def arguments_of(method: Subject) -> tuple[LayerShape]:
    """The layer's shape; that of experts of one feature for those that take no other."""
    return (shape_of(method),)


def sample(method: Subject, seed: int, num_tokens: int = NUM_TOKENS) -> Rows:
    """Two experts for each token of two sequences, the last quarter of which is padding."""
    return rows_of(method, sample_fields(method, seed, num_tokens))


def check_tags_are_known(method: Subject) -> None:
    """Every tag is one that experts have, and says what the class defines."""
    _inputs.check_tags(method, RouterInput)
    bank: type[Bank] = method.cls
    require(materialises(bank) or runs(bank), "define matrices or run")
    for tag, defined in (
        ("materialises", materialises(bank)),
        ("gates", bank.run_gates is not Bank.run_gates),
    ):
        require(method.has(tag) == defined, f"the tag {tag} and the method it stands for go together")
    if method.has("own_matrices"):
        held = method.create().get_parameter("gate_up_proj")
        shape = shape_of(method)
        wanted = (shape.num_experts, shape.d_model)
        require((held.shape[0], held.shape[2]) == wanted, "gate_up_proj must be [E, R, D]")


def check_outputs_are_whole(method: Subject) -> None:
    """One finite output an assignment; losses are single finite numbers."""
    rows = sample(method, 10)
    bank = method.create()
    outputs, _ = use(bank, rows)
    require(outputs.shape == (rows.token_ids.numel(), rows.x.shape[1]), "outputs: [N, D]")
    require(torch.isfinite(outputs).all(), "outputs must be finite")
    for name, loss in bank.losses().items():
        require(loss.shape == () and torch.isfinite(loss), f"the loss {name} must be one finite number")


def check_few_rows(method: Subject) -> None:
    """No token, one token and no assignment at all are computed."""
    bank = method.create()
    for num_tokens in (0, 1):
        outputs, _ = use(bank, sample(method, 12, num_tokens))
        require(outputs.shape[1] == shape_of(method).d_model, f"{num_tokens} tokens: outputs must be [N, D]")
    outputs, _ = use(bank, only(sample(method, 12), torch.zeros(0, dtype=torch.long)))
    require(outputs.shape[0] == 0, "without assignments there are no outputs")


def check_equals_a_plain_loop(method: Subject) -> None:
    """Rows are what explicit matrices make of them one by one; of other experts what each row is alone."""
    bank, rows = method.create(), sample(method, 11)
    outputs, _ = use(bank, rows)
    for place in range(0, rows.token_ids.numel(), 5):
        if method.has("materialises"):
            alone = _by_matrices(bank, rows, place)
        elif method.has("token_independent"):
            alone = use(bank, only(rows, torch.tensor([place])))[0][0]
        else:
            continue
        require(torch.allclose(outputs[place], alone, atol=CLOSE), "a row is not what its expert makes of it")


def _by_matrices(bank: Bank, rows: Rows, place: int) -> Tensor:
    """One row by its expert's matrices, written out."""
    found, expert = bank.matrices(), int(rows.expert_ids[place])
    x = rows.gathered[place : place + 1]
    hidden = (x if found.prepare is None else found.prepare(x)) @ found.gate_up[expert].T
    hidden = hidden if found.up_bias is None else hidden + found.up_bias[expert]
    output = found.activation(hidden) @ found.down[expert].T
    return (output if found.down_bias is None else output + found.down_bias[expert])[0]


def check_a_layer_weighs_them(method: Subject) -> None:
    """In a layer outputs are weighted and summed; padding gets nothing; a layer of padding is zeros."""
    bank = method.create()
    given = sample_fields(method, 13)
    layer = MoELayer(create("routers", "top_k", shape_of(method), top_k=2), Experts(bank))
    inputs = RouterInput(
        **{name: value for name, value in given.items() if name not in ("experts", "assigned")}
    )
    output, routing = layer(replace(inputs, allowed=None))
    ran, _ = use(bank, Rows.of(inputs.x, routing.token_ids, routing.expert_ids, routing.num_experts, inputs))
    expected = torch.zeros_like(inputs.x).index_add(0, routing.token_ids, ran * routing.weights[:, None])
    require(torch.allclose(output, expected, atol=CLOSE), "the layer is not the weighted sum of the rows")
    require((output[~inputs.valid] == 0).all(), "padding has an output")
    nothing = replace(inputs, valid=torch.zeros_like(inputs.valid), allowed=None)
    require((layer(nothing)[0] == 0).all(), "padding has an output")


def check_rows_and_matrices_agree(method: Subject) -> None:
    """Experts that define both compute the same by rows as by matrices."""
    if not (materialises(method.cls) and runs(method.cls)):
        return
    bank, rows = method.create(), sample(method, 14)
    handle = Experts(bank).matrices
    by_matrices = handle.run(rows.x, rows.token_ids, rows.expert_ids)
    require(torch.allclose(bank.run(rows).outputs, by_matrices, atol=CLOSE), "run and matrices differ")


def check_gates_are_the_sum_of_all(method: Subject) -> None:
    """Tag ``gates``: the sum by gates is that of all experts of the grid, each with its weight."""
    if not method.has("gates"):
        return
    bank, given = method.create(), sample_fields(method, 15)
    rows, columns = bank.grid
    generator = torch.Generator().manual_seed(15)
    sizes = ((NUM_TOKENS, 3, rows), (NUM_TOKENS, 3, columns))
    gates = [torch.rand(size, generator=generator) for size in sizes]
    found = bank.run_gates(given["x"], *gates)
    every = all_rows(given["x"], shape_of(method).num_experts)
    weights = torch.einsum("thr,thc->trc", *gates).flatten(1)[every.token_ids, every.expert_ids]
    outputs, _ = use(bank, every)
    expected = torch.zeros_like(found).index_add(0, every.token_ids, outputs * weights[:, None])
    require(torch.allclose(found, expected, rtol=1e-4, atol=1e-4), "gates do not give the sum of all experts")


def check_rows_are_independent(method: Subject) -> None:
    """Tag ``token_independent``: other rows and tokens change nothing for a row."""
    if not method.has("token_independent"):
        return
    bank, rows = method.create(), sample(method, 16)
    outputs, _ = use(bank, rows)
    some = torch.arange(0, rows.token_ids.numel(), 3)
    fewer, _ = use(bank, only(rows, some))
    require(torch.allclose(outputs[some], fewer, atol=CLOSE), "leaving out rows changes others")


def check_causal(method: Subject) -> None:
    """A later token never changes what experts make of an earlier one, by its value or by being there."""
    bank, cut = method.create(), 7
    given = sample_fields(method, 25, num_sequences=1)
    given["valid"] = torch.ones_like(given["valid"])
    whole = rows_of(method, given)
    early = (whole.token_ids < cut).nonzero().squeeze(-1)
    outputs, _ = use(bank, whole)
    other = whole.x.index_fill(0, torch.arange(cut, NUM_TOKENS), 0.5)
    changed, _ = use(bank, rows_of(method, given | {"x": other}))
    require(torch.allclose(outputs[early], changed[early], atol=CLOSE), "later tokens change earlier ones")
    fields = chosen(given, torch.arange(cut)) | {"assigned": given["assigned"][:cut]}
    short, _ = use(bank, rows_of(method, fields))
    require(torch.allclose(outputs[early], short, atol=CLOSE), "without later tokens earlier ones differ")


def check_batch_invariant(method: Subject) -> None:
    """What else is in the batch does not change a sequence's outputs."""
    bank, given = method.create(), sample_fields(method, 27)
    given["valid"] = torch.ones_like(given["valid"])
    rows = rows_of(method, given)
    outputs, _ = use(bank, rows)
    for number in (0, 1):
        mine = (given["sequence_ids"] == number).nonzero().squeeze(-1)
        part = chosen(given, mine) | {"assigned": given["assigned"][mine]}
        part["sequence_ids"] = torch.zeros_like(part["sequence_ids"])
        alone, _ = use(bank, rows_of(method, part))
        here = (given["sequence_ids"][rows.token_ids] == number).nonzero().squeeze(-1)
        require(torch.allclose(outputs[here], alone, atol=CLOSE), "another sequence changes this one")


def check_decoding_equals_prefill(method: Subject) -> None:
    """Token by token, with the history handed on, outputs are those of the whole sequences."""
    bank, given = method.create(), sample_fields(method, 28) | {"training": False}
    given["valid"] = torch.ones_like(given["valid"])
    rows = rows_of(method, given)
    outputs, _ = use(bank, rows)
    history: Any = {}
    begins = 0
    for end in (3, 4, 5, NUM_TOKENS // 2):
        span = (given["positions"] >= begins) & (given["positions"] < end)
        mine = span.nonzero().squeeze(-1)
        part = chosen(given, mine) | {"assigned": given["assigned"][mine]}
        step = rows_of(method, part | {"decoding": begins > 0, "history": history})
        made, history = use(bank, step)
        here = span[rows.token_ids].nonzero().squeeze(-1)
        require(torch.allclose(outputs[here], made, atol=CLOSE), "decoding changes outputs")
        begins = end


def check_reads_only_declared_fields(method: Subject) -> None:
    """Fields without a ``reads:`` tag change nothing."""
    bank, given = method.create(), sample_fields(method, 17)
    fields = {name: value for name, value in given.items() if name != "assigned"}
    declared_rows = rows_of(method, given)
    full = replace(declared_rows, inputs=RouterInput(**fields))
    require(same(use(bank, declared_rows), use(bank, full)), "the outputs depend on a field not declared")


def check_gradient_reaches_every_parameter(method: Subject) -> None:
    """Outputs and losses pass a finite, non-zero gradient to every parameter of experts with tokens."""
    bank = method.create()
    given = sample_fields(method, 18, 48)
    outputs, _ = use(bank, rows_of(method, given))
    total = (outputs * torch.linspace(-1, 1, outputs.numel()).view_as(outputs)).sum()
    total = total + sum(bank.losses().values())
    trained = {name: value for name, value in bank.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, found, strict=True):
        require(gradient is not None and gradient.abs().sum() > 0, f"no gradient reaches {name}")
        require(gradient is not None and torch.isfinite(gradient).all(), f"{name}'s gradient is not finite")


def check_gradient_matches_differences(method: Subject) -> None:
    """In float64 the gradient by the tokens is that of finite differences, but through rounding."""
    if method.has("rounds"):
        return
    bank = method.create().double()
    given = converted(sample_fields(method, 19, 4), torch.float64)
    given["valid"] = torch.ones_like(given["valid"])

    def outputs(x: Tensor) -> Tensor:
        return use(bank, rows_of(method, given | {"x": x}))[0]

    x = given["x"].requires_grad_()
    kept = torch.autograd.gradcheck(outputs, (x,), raise_exception=False, fast_mode=True)
    require(kept, "the gradient by x is wrong")


def check_low_precision(method: Subject) -> None:
    """In bfloat16 outputs are finite and near those in float32."""
    rows = sample(method, 20)
    plain, _ = use(method.create(), rows)
    fields = converted(sample_fields(method, 20), torch.bfloat16)
    outputs, _ = use(method.create().to(torch.bfloat16), rows_of(method, fields))
    require(outputs.dtype == torch.bfloat16, f"outputs of bfloat16 tokens are {outputs.dtype}")
    error = ((outputs.float() - plain).norm() / plain.norm()).detach()
    require(float(error) < 0.1, f"outputs in bfloat16 differ by {float(error):.2f} of their size")


def check_state_dict_round_trip(method: Subject) -> None:
    """New experts that load these ones' state compute the same, also when made without memory."""
    bank = method.create(**({"seed": 1} if "seed" in {s.name for s in method.header.settings} else {}))
    again = method.create()
    again.load_state_dict(bank.state_dict())
    with torch.device("meta"):
        empty = method.create()
    empty.load_state_dict(bank.state_dict(), assign=True)
    left = [name for name, value in (*empty.named_parameters(), *empty.named_buffers()) if value.is_meta]
    require(not left, f"{', '.join(left)} is not part of the state and stays without values")
    rows = sample(method, 21)
    for other in (again, empty):
        require(same(use(bank, rows), use(other, rows)), "experts that loaded a state compute something else")

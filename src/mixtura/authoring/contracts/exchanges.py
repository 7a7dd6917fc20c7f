"""What every exchange promises."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.authoring.contracts._core import Subject, require
from mixtura.methods import kind
from mixtura.methods.exchanges import Exchange, Packed

_HOPS = (("all",), ("between", "within"), ("within", "between"))


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> tuple[Tensor, Tensor]:
    """Rows around a few points, and the seats they go to."""
    del method
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(6, 12, generator=generator)
    rows = points[torch.arange(40) % 6] + 0.01 * torch.randn(40, 12, generator=generator)
    return rows, torch.randint(0, 5, (40,), generator=generator)


def use(exchange: Exchange, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What is sent, where to, and what is made of outputs that are twice that."""
    packed = exchange.pack(*given)
    return packed.rows, packed.seats, packed.unpack(2 * packed.rows)


def check_hops_lead_there(method: Subject) -> None:
    """The hops are one to all, or one to the node and one to the place."""
    hops = tuple(method.create().hops())
    require(hops in _HOPS, f"hops {hops} do not lead every row to its device once")
    unknown = [tag for tag in method.header.tags if kind("exchanges").explain(tag) is None]
    require(not unknown, f"the kind has no tag {unknown}")


def check_nothing_is_lost(method: Subject) -> None:
    """Experts that give back what they are given give each row back; fewer are sent only if approximate."""
    rows, seats = sample(method, 4)
    packed = method.create().pack(rows, seats)
    require(packed.rows.shape[0] <= rows.shape[0], "more rows are sent than there are")
    require(packed.rows.dtype == rows.dtype, "rows are sent in another dtype")
    require(bool(torch.isin(packed.seats, seats).all()), "rows go where none was to go")
    back = packed.unpack(packed.rows)
    require(back.shape == rows.shape, "each row needs an output of its own")
    require(torch.allclose(back, rows, atol=1e-5), "rows that come back as they went are other ones")
    if not method.has("approximate"):
        require(_doubled(packed).allclose(2 * rows), "outputs are not those of the rows; tag it approximate")


def check_equal_rows_are_exact(method: Subject) -> None:
    """Where all rows of a seat are equal, outputs are exactly those of the rows, approximate or not."""
    rows = torch.randn(3, 12, generator=torch.Generator().manual_seed(5))[torch.arange(30) % 3].double()
    packed = method.create().pack(rows, torch.arange(30) % 3)
    require(
        torch.allclose(_doubled(packed), 2 * rows, atol=1e-12), "outputs of equal rows differ from theirs"
    )


def check_gradients_flow(method: Subject) -> None:
    """Every row gets a gradient, and a sum that the experts only pass on gives each a gradient of 1."""
    rows, seats = sample(method, 6)
    rows = rows.double().requires_grad_()
    packed = method.create().pack(rows, seats)
    packed.unpack(packed.rows).sum().backward()
    require(rows.grad is not None, "rows get no gradient")
    assert rows.grad is not None
    require(torch.allclose(rows.grad, torch.ones_like(rows)), "gradients are not those of the rows")


def check_nothing_to_send(method: Subject) -> None:
    """A device without tokens sends none, in any dtype."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = torch.zeros(0, 12, dtype=dtype)
        packed = method.create().pack(rows, torch.zeros(0, dtype=torch.int64))
        back = packed.unpack(packed.rows)
        require(back.shape == rows.shape and back.dtype == dtype, f"no rows in {dtype} become {back.shape}")


def _doubled(packed: Packed) -> Tensor:
    return packed.unpack(2 * packed.rows)

"""Money on disk: what is spent, what is set aside, and every call; by one or several processes.

An account is a key's name, with the day or month where its budget begins anew. What a call can cost at most
is held before it is sent, in the one statement that compares it with the budget; settling removes the hold
and writes the call under the hold's own number, so nothing is billed twice. Amounts are pico-dollars.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from mixtura.errors import UserError

# A process whose last beat is older has been killed, and what it held is nobody's.
DEAD_AFTER_S: Final = 60.0
_METADATA: Final = sa.MetaData()
_NUMBER, _TEXT = sa.BigInteger, sa.Text

ACCOUNTS: Final = sa.Table(
    "accounts", _METADATA,
    sa.Column("name", _TEXT, primary_key=True),
    sa.Column("spent", _NUMBER, nullable=False, default=0),
    sa.Column("reserved", _NUMBER, nullable=False, default=0),
)  # fmt: skip
HOLDS: Final = sa.Table(
    "holds", _METADATA,
    sa.Column("id", _TEXT, primary_key=True),
    sa.Column("account", _TEXT, nullable=False),
    sa.Column("amount", _NUMBER, nullable=False),
    sa.Column("owner", _TEXT, nullable=False),
    sa.Column("request", _TEXT, nullable=False),
    sa.Column("asked", _TEXT, nullable=False),
    sa.Column("model", _TEXT, nullable=False),
    sa.Column("sent", sa.Double, nullable=False),
)  # fmt: skip
CALLS: Final = sa.Table(
    "calls", _METADATA,
    sa.Column("id", _TEXT, primary_key=True),
    sa.Column("request", _TEXT, nullable=False, index=True),
    sa.Column("account", _TEXT, nullable=False),
    sa.Column("asked", _TEXT, nullable=False),
    sa.Column("model", _TEXT, nullable=False),
    sa.Column("outcome", _TEXT, nullable=False),
    sa.Column("input_tokens", _NUMBER, nullable=False, default=0),
    sa.Column("output_tokens", _NUMBER, nullable=False, default=0),
    sa.Column("cost", _NUMBER, nullable=False, default=0),
    sa.Column("overrun", _NUMBER, nullable=False, default=0),
    sa.Column("estimated", sa.Boolean, nullable=False, default=False),
    sa.Column("sent", sa.Double, nullable=False, index=True),
    sa.Column("first_ms", sa.Double),
    sa.Column("total_ms", sa.Double),
)  # fmt: skip
DECISIONS: Final = sa.Table(
    "decisions", _METADATA,
    sa.Column("request", _TEXT, primary_key=True),
    sa.Column("account", _TEXT, nullable=False),
    sa.Column("asked", _TEXT, nullable=False),
    sa.Column("model", _TEXT, nullable=False),
    sa.Column("how", _TEXT, nullable=False),
    sa.Column("propensity", sa.Double),
    sa.Column("scores", _TEXT, nullable=False, default="{}"),
    sa.Column("labels", _TEXT, nullable=False, default="{}"),
    sa.Column("prompt", _TEXT),
    sa.Column("at", sa.Double, nullable=False, index=True),
)  # fmt: skip
FEEDBACK: Final = sa.Table(
    "feedback", _METADATA,
    sa.Column("request", _TEXT, primary_key=True),
    sa.Column("account", _TEXT, nullable=False),
    sa.Column("score", sa.Double, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
)  # fmt: skip
OWNERS: Final = sa.Table(
    "owners",
    _METADATA,
    sa.Column("name", _TEXT, primary_key=True),
    sa.Column("beat", sa.Double, nullable=False),
)
_COUNTED: Final = ("outcome", "input_tokens", "output_tokens", "estimated", "first_ms", "total_ms")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """An amount set aside for one call that is about to be sent."""

    id: str
    account: str
    amount: int
    owner: str
    request: str
    asked: str
    model: str
    sent: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What a call came to.

    Attributes:
        cost: by the upstream's count, or an estimate where it gave none.
        estimated: whether it is one.
        first_ms, total_ms: to the first byte of content, and to the last.
    """

    outcome: str
    input_tokens: int = 0
    output_tokens: int = 0
    cost: int = 0
    estimated: bool = False
    first_ms: float | None = None
    total_ms: float | None = None


def connect(url: str) -> sa.Engine:
    """The database at a URL, with its tables.

    Raises:
        UserError: it is not SQLite or PostgreSQL, or cannot be reached; never shows a password.
    """
    try:
        where = sa.make_url(url)
    except SQLAlchemyError:
        raise UserError(
            "the ledger is no database URL; give sqlite:///gateway.db or postgresql://host/name"
        ) from None
    if where.get_backend_name() == "postgresql":
        where = where.set(drivername="postgresql+psycopg")
    elif where.get_backend_name() != "sqlite":
        raise UserError(f"the ledger is kept in SQLite or PostgreSQL, not {where.get_backend_name()}")
    shown = where.render_as_string(hide_password=True)
    try:
        engine = sa.create_engine(where, pool_pre_ping=where.get_backend_name() == "postgresql")
        if engine.dialect.name == "sqlite":
            _prepare_sqlite(engine)
        _METADATA.create_all(engine)
    except ModuleNotFoundError:
        raise UserError("a ledger in PostgreSQL needs psycopg; pip install 'mixtura[postgres]'") from None
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).splitlines()[0]
        raise UserError(f"the ledger {shown} cannot be opened: {reason}") from None
    return engine


def _prepare_sqlite(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def _set(connection: Any, record: Any) -> None:
        del record
        # Transactions begin as ours say, below, and not when Python's driver thinks.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=20000"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # With the lock for writing from the start: who reads first may find it taken for good.
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _add(
    connection: sa.Connection, table: sa.Table, values: Mapping[str, Any], update: tuple[str, ...] = ()
) -> int:
    """A row, unless there is one of its key; then these columns of it. How many rows are new or changed."""
    made = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table).values(**values)
    keys = [column.name for column in table.primary_key]
    if not update:
        return connection.execute(made.on_conflict_do_nothing(index_elements=keys)).rowcount
    changed = {name: made.excluded[name] for name in update}
    return connection.execute(made.on_conflict_do_update(index_elements=keys, set_=changed)).rowcount


def open_account(connection: sa.Connection, name: str) -> None:
    """An account with nothing spent, unless it is there."""
    _add(connection, ACCOUNTS, {"name": name, "spent": 0, "reserved": 0})


_RESERVE: Final = (
    sa.update(ACCOUNTS)
    .where(ACCOUNTS.c.name == sa.bindparam("account"))
    .values(reserved=ACCOUNTS.c.reserved + sa.bindparam("more"))
)
_WITHIN: Final = _RESERVE.where(
    ACCOUNTS.c.spent + ACCOUNTS.c.reserved + sa.bindparam("more") <= sa.bindparam("budget")
)
_HOLD, _CALL = sa.insert(HOLDS), sa.insert(CALLS)
_FOUND: Final = sa.select(HOLDS).where(HOLDS.c.id == sa.bindparam("which"))
_UNHOLD: Final = sa.delete(HOLDS).where(HOLDS.c.id == sa.bindparam("which"))
_MOVE: Final = (
    sa.update(ACCOUNTS)
    .where(ACCOUNTS.c.name == sa.bindparam("account"))
    .values(
        reserved=ACCOUNTS.c.reserved - sa.bindparam("less"), spent=ACCOUNTS.c.spent + sa.bindparam("more")
    )
)


def reserve(connection: sa.Connection, hold: Hold, budget: int | None) -> bool:
    """Set an amount aside; False, and nothing set aside, where it does not fit."""
    values = {"account": hold.account, "more": hold.amount}
    done = connection.execute(
        _RESERVE if budget is None else _WITHIN, values if budget is None else {**values, "budget": budget}
    )
    if done.rowcount != 1:
        return False
    connection.execute(_HOLD, asdict(hold))
    return True


def settle(connection: sa.Connection, which: str, call: Settled, budget: int | None) -> int:
    """Note what a call cost in place of what was held for it; what its account is charged.

    A cost beyond what was held is charged as far as the budget goes; the rest is noted as overrun. A call
    that was taken for lost, because its process was, is put right. Settled once more, nothing happens.
    """
    held = connection.execute(_FOUND, {"which": which}).mappings().one_or_none()
    if held is None:
        return _put_right(connection, which, call, budget)
    connection.execute(_UNHOLD, {"which": which})
    charged = _chargeable(connection, held["account"], call.cost, held["amount"], budget)
    connection.execute(_MOVE, {"account": held["account"], "less": held["amount"], "more": charged})
    connection.execute(_CALL, _call_row(held, call, charged))
    return charged


def _call_row(held: Mapping[Any, Any], call: Settled, charged: int) -> dict[str, Any]:
    return {
        **{name: held[name] for name in ("id", "request", "account", "asked", "model", "sent")},
        **{name: getattr(call, name) for name in _COUNTED},
        "cost": charged,
        "overrun": call.cost - charged,
    }


def _chargeable(connection: sa.Connection, account: str, cost: int, held: int, budget: int | None) -> int:
    """As much of a cost as there is money for; what was held for it is there."""
    if cost <= held or budget is None:
        return cost
    found = sa.select(ACCOUNTS.c.spent, ACCOUNTS.c.reserved).where(ACCOUNTS.c.name == account)
    spent, reserved = connection.execute(found.with_for_update()).one()
    return min(cost, held + max(0, budget - int(spent) - int(reserved)))


def _put_right(connection: sa.Connection, which: str, call: Settled, budget: int | None) -> int:
    found = (
        connection.execute(sa.select(CALLS).where(CALLS.c.id == which).with_for_update())
        .mappings()
        .one_or_none()
    )
    if found is None or found["outcome"] != "lost":
        return 0 if found is None else int(found["cost"])
    charged = _chargeable(connection, found["account"], call.cost, found["cost"], budget)
    connection.execute(_MOVE, {"account": found["account"], "less": 0, "more": charged - found["cost"]})
    connection.execute(sa.update(CALLS).where(CALLS.c.id == which).values(**_call_row(found, call, charged)))
    return charged


def beat(connection: sa.Connection, owner: str) -> None:
    """Say that a process lives."""
    _add(connection, OWNERS, {"name": owner, "beat": time.time()}, ("beat",))


def retire(connection: sa.Connection, owner: str) -> None:
    """A process ends, and holds nothing."""
    connection.execute(sa.delete(OWNERS).where(OWNERS.c.name == owner))


def recover(connection: sa.Connection, *, charge: bool, now: float | None = None) -> int:
    """Settle what killed processes held: in full, as nobody knows what it cost, or not at all. How many."""
    dead_before = (time.time() if now is None else now) - DEAD_AFTER_S
    living = sa.select(OWNERS.c.name).where(OWNERS.c.beat >= dead_before)
    nobodys = sa.select(HOLDS).where(HOLDS.c.owner.not_in(living)).order_by(HOLDS.c.account, HOLDS.c.id)
    found = connection.execute(nobodys).mappings().all()
    num = 0
    for held in found:
        # Another process may be at the same work.
        if connection.execute(_UNHOLD, {"which": held["id"]}).rowcount:
            cost = held["amount"] if charge else 0
            lost = Settled(outcome="lost", cost=cost, estimated=True)
            connection.execute(_MOVE, {"account": held["account"], "less": held["amount"], "more": cost})
            connection.execute(_CALL, _call_row(held, lost, cost))
            num += 1
    return num


def decide(connection: sa.Connection, row: Mapping[str, Any]) -> None:
    """Note a decision."""
    _add(connection, DECISIONS, row)


def judge(connection: sa.Connection, request: str, account: str | None, score: float) -> bool:
    """Note how good an answer was; False where the account made no such request. None is any account."""
    found = sa.select(CALLS.c.account).where(CALLS.c.request == request).limit(1)
    whose = connection.execute(found).scalar_one_or_none()
    if whose is None or (account is not None and whose.partition("@")[0] != account):
        return False
    row = {"request": request, "account": whose, "score": score, "at": time.time()}
    _add(connection, FEEDBACK, row, ("score", "at"))
    return True


def balances(connection: sa.Connection, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """What accounts have spent and set aside."""
    rows = connection.execute(sa.select(ACCOUNTS).where(ACCOUNTS.c.name.in_(list(names)))).all()
    return {name: (int(spent), int(reserved)) for name, spent, reserved in rows}

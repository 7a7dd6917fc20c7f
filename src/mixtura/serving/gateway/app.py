"""The gateway's app: its routes, with the guard of every server in front of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel

import mixtura
from mixtura.serving.api.guarding import App, Guard
from mixtura.serving.api.refusals import ApiError, add_refusals
from mixtura.serving.dashboard import PAGE_HEADERS, page
from mixtura.serving.gateway import ledger
from mixtura.serving.gateway.answering import Gateway, Who
from mixtura.serving.gateway.bodies import Asking, ChatBody, CompletionBody, FeedbackBody
from mixtura.serving.gateway.combining import CHAT
from mixtura.serving.gateway.refusing import told
from mixtura.serving.gateway.watching import Metrics, last_day
from mixtura.serving.metrics import METRICS_TYPE, exposition

# Everybody who watches sees the same; the ledger is not asked once for each.
_LOOK_S: Final = 2.0


def build_app(
    gateway: Gateway, secrets: Mapping[str, str], *, most_body_bytes: int = 16 << 20, is_local: bool = True
) -> App:
    """The app over a gateway.

    Args:
        gateway: answers.
        secrets: of keys, by name.
        most_body_bytes: of a request.
        is_local: it listens to this machine only.
    """
    app = FastAPI(title="mixtura gateway", version=mixtura.__version__, docs_url=None, redoc_url=None)
    bodies: Mapping[str, type[BaseModel]] = {
        "/v1/chat/completions": ChatBody,
        "/v1/completions": CompletionBody,
        "/v1/feedback": FeedbackBody,
    }
    add_refusals(app, bodies)
    _add_answers(app, gateway)
    _add_state(app, gateway)
    return Guard(app, tuple(secrets.values()), most_body_bytes, is_local=is_local)


def _refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    why = {
        400: "The request cannot be answered as asked; the message says why.",
        401: "A key is missing or wrong.",
        402: "The key's budget has no room for the dearest possible answer.",
        403: "This key may not see that.",
        404: "There is no such model or request for this key.",
        413: "The body is too large.",
        422: "A router trusts no model with it.",
        429: "Too many requests; Retry-After says when to come again.",
        502: "No model gave a usable answer.",
        503: "Models cannot be reached, or the ledger cannot be written.",
        504: "No model answered in time.",
    }
    return {status: {"description": why[status]} for status in statuses}


def _add_answers(app: FastAPI, gateway: Gateway) -> None:
    refused = _refused(400, 401, 402, 404, 413, 422, 429, 502, 503, 504)

    async def answer(http: Request, body: Asking, path: str) -> Response:
        status = 200
        try:
            return await gateway.answer(http, body, path)
        except Exception as error:
            refusal = told(error)
            status = refusal.status
            raise refusal from error
        finally:
            gateway.watch.answers[body.model if body.model in gateway.config.names else "", status] += 1

    @app.post("/v1/chat/completions", responses=refused)
    async def chat(body: ChatBody, request: Request) -> Response:
        return await answer(request, body, CHAT)

    @app.post("/v1/completions", responses=refused)
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await answer(request, body, "completions")

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": gateway.created, "owned_by": "mixtura"}

    @app.get("/v1/models", responses=_refused(401))
    async def models(request: Request) -> Response:
        names = gateway.names(gateway.who(request))
        return JSONResponse({"object": "list", "data": [described(name) for name in names]})

    @app.get("/v1/models/{name:path}", responses=_refused(401, 404))
    async def model(name: str, request: Request) -> Response:
        if name not in gateway.names(gateway.who(request)):
            raise ApiError(
                f"there is no model {name[:200]!r} for this key", status=404, code="model_not_found"
            )
        return JSONResponse(described(name))

    @app.post("/v1/feedback", responses=_refused(400, 401, 404, 503))
    async def feedback(body: FeedbackBody, request: Request) -> Response:
        who = gateway.who(request)
        account = None if who.key.admin else who.name
        judge = partial(ledger.judge, request=body.request, account=account, score=body.score)
        try:
            done = await gateway.trier.books.run(judge)
        except Exception as error:
            raise told(error) from error
        if not done:
            raise ApiError("this key made no such request", status=404, param="request", code="not_found")
        return JSONResponse({"request": body.request, "score": body.score})


def _add_state(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready", responses=_refused(503))
    async def ready() -> Response:
        await _balances(gateway)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", responses=_refused(401, 403, 503))
    async def metrics(request: Request) -> Response:
        _check_admin(gateway.who(request))
        found = Metrics(gateway.watch, await _balances(gateway), gateway.trier.rests.resting())
        return Response(exposition(found), media_type=METRICS_TYPE)

    seen: dict[str, Any] = {}
    looked = [float("-inf")]

    @app.get("/stats", responses=_refused(401, 403, 503))
    async def stats(request: Request) -> Response:
        _check_admin(gateway.who(request))
        if time.monotonic() - looked[0] > _LOOK_S:
            looked[0] = time.monotonic()
            seen.update(await _snapshot(gateway))
        return JSONResponse(seen)

    @app.get("/", include_in_schema=False)
    async def dashboard() -> Response:
        return HTMLResponse(page("gateway.html"), headers=PAGE_HEADERS)


def _check_admin(who: Who) -> None:
    if not who.key.admin:
        raise ApiError("this key may not see that; give one with admin: true", status=403, code="not_admin")


async def _balances(gateway: Gateway) -> dict[str, tuple[int | None, int, int]]:
    """By key: budget, spent, set aside."""
    people = gateway.people()
    accounts = [who.account for who in people]
    try:
        found = await gateway.trier.books.run(lambda connection: ledger.balances(connection, accounts))
    except Exception as error:
        raise told(error) from error
    return {
        who.name: (who.key.limit, *found.get(account, (0, 0)))
        for who, account in zip(people, accounts, strict=True)
    }


async def _snapshot(gateway: Gateway) -> dict[str, Any]:
    """What the dashboard shows."""
    watch, cache = gateway.watch, gateway.cache
    keys = await _balances(gateway)
    day = await gateway.trier.books.run(last_day)
    latencies = watch.latencies()
    return {
        "up_s": round(time.time() - watch.began, 1),
        "under_way": watch.under_way,
        "keys": [
            {"name": who.name, "per": who.key.per, "budget": keys[who.name][0], "spent": keys[who.name][1],
             "reserved": keys[who.name][2]}
            for who in gateway.people()
        ],
        "answers": [
            {"asked": asked, "status": status, "num": num}
            for (asked, status), num in sorted(watch.answers.items())
        ],
        "outcomes": [
            {"model": model, "outcome": outcome, "num": num}
            for (model, outcome), num in sorted(watch.calls.items())
        ],
        "latencies": [{"model": model, **found} for model, found in latencies.items()],
        "resting": {name: round(seconds, 1) for name, seconds in gateway.trier.rests.resting().items()},
        "cache": None
        if cache is None
        else {"hits": dict(watch.cached), "verified": cache.verified, "right": cache.right},
        **day,
    }  # fmt: skip

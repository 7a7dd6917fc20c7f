"""The server's app: its routes, with everything in front of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

import mixtura
from mixtura.serving.api.chat import answer_chat
from mixtura.serving.api.completions import answer_completion
from mixtura.serving.api.guarding import App, Guard
from mixtura.serving.api.refusals import ApiError, add_refusals
from mixtura.serving.api.schemas import ChatRequest, CompletionRequest
from mixtura.serving.api.service import Service
from mixtura.serving.dashboard import PAGE_HEADERS, page
from mixtura.serving.metrics import METRICS_TYPE, metrics_text
from mixtura.serving.watching import Watch


def build_app(service: Service, watch: Watch, *, keys: Collection[str] = (), is_local: bool = True) -> App:
    """The app over a service.

    Args:
        service: answers.
        watch: what metrics and the dashboard show.
        keys: one of which requests must have; none for no keys.
        is_local: it listens to this machine only.
    """
    app = FastAPI(title="mixtura", version=mixtura.__version__, docs_url=None, redoc_url=None)
    add_refusals(app, {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest})
    _add_answers(app, service)
    _add_state(app, service, watch)
    return Guard(app, keys, service.settings.most_body_bytes, is_local=is_local)


def _add_answers(app: FastAPI, service: Service) -> None:
    refused: dict[int | str, dict[str, Any]] = {
        status: {"description": why}
        for status, why in (
            (400, "The request cannot be answered as asked; the message says why."),
            (401, "A key is missing or wrong."),
            (404, "There is no such model."),
            (413, "The body is too large."),
            (429, "Too many requests; Retry-After says when to come again."),
            (503, "The server is being shut down."),
        )
    }

    @app.post("/v1/chat/completions", responses=refused)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await answer_chat(service, body, request)

    @app.post("/v1/completions", responses=refused)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answer_completion(service, body, request)

    own = service.settings.name

    def described(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "mixtura",
            "parent": None if name == own else own,
            "max_model_len": service.engine.limits.context,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        names = (own, *service.settings.adapters)
        return JSONResponse({"object": "list", "data": [described(name) for name in names]})

    @app.get("/v1/models/{name:path}", responses={404: refused[404]})
    async def model(name: str) -> Response:
        return JSONResponse(described(service.named(name)))


def _add_state(app: FastAPI, service: Service, watch: Watch) -> None:
    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready", responses={503: {"description": "It takes no requests."}})
    async def ready() -> Response:
        if not service.engine.is_alive:
            return ApiError("the server takes no requests", status=503).response()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(metrics_text(watch), media_type=METRICS_TYPE)

    @app.get("/stats")
    async def stats() -> Response:
        return JSONResponse(watch.snapshot())

    @app.get("/", include_in_schema=False)
    async def dashboard() -> Response:
        return HTMLResponse(page(), headers=PAGE_HEADERS)

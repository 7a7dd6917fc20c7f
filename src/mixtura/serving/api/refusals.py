"""Errors in the form that OpenAI's clients read, with a status of the user's for whatever a user sends."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError
from starlette.exceptions import HTTPException

from mixtura.errors import CheckpointError, UserError, one_line, suggest
from mixtura.serving.engine.records import BusyError, ClosingError, TooLongError

_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_MOST_SHOWN: Final = 3
_logger = logging.getLogger("mixtura")


@final
class ApiError(Exception):
    """A request that is not answered: the status, a sentence, and which of its fields is meant."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """As clients read it."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer to send."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        # In ASCII: what a user sent may be quoted, and need not be text that can be written in UTF-8.
        body = json.dumps(self.body).encode("ascii")
        return Response(body, self.status, headers, media_type="application/json")


def refusal_of(error: Exception) -> ApiError:
    """What to tell of an error of ours; a fault that nobody caused keeps its words to itself."""
    if isinstance(error, ApiError):
        return error
    sentence = one_line(error)
    if isinstance(error, BusyError):
        return ApiError(sentence, status=429, code="too_many_requests", retry_after_s=error.retry_after_s)
    if isinstance(error, ClosingError):
        return ApiError(sentence, status=503, code="closing", retry_after_s=5)
    if isinstance(error, TooLongError):
        return ApiError(sentence, code="context_length_exceeded")
    if isinstance(error, CheckpointError):
        return ApiError(sentence, status=500, code="model_unreadable")
    if isinstance(error, UserError):
        return ApiError(sentence)
    _logger.error("a request failed by a fault of the server", exc_info=error)
    return ApiError("the server made a fault; its log has what it was", status=500, code="internal_error")


def add_refusals(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """Let an app answer every error in the one form; ``bodies`` says by path what it takes."""

    async def ours(request: Request, error: Exception) -> Response:
        del request
        return refusal_of(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {
            404: f"there is nothing at {request.url.path}; the API is at /v1/chat/completions, "
            "/v1/completions and /v1/models",
            405: f"{request.url.path} does not take {request.method}",
            400: "the body is not JSON in UTF-8",
        }
        message = words.get(error.status_code, str(error.detail))
        made = ApiError(message, status=error.status_code).response()
        if error.headers:
            made.headers.update(error.headers)
        return made

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _unfit(error.errors(), bodies.get(request.url.path)).response()

    async def deep(request: Request, error: Exception) -> Response:
        del request, error
        return ApiError("the body is nested too deeply", code="invalid_value").response()

    app.add_exception_handler(UserError, ours)
    app.add_exception_handler(RecursionError, deep)
    app.add_exception_handler(PydanticSerializationError, deep)
    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(Exception, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)


def _unfit(errors: Sequence[Any], kind: type[BaseModel] | None) -> ApiError:
    """What is wrong with a body, field by field."""
    first = errors[0]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "")
        return ApiError(f"the body is not JSON: {one_line(why)}", code="invalid_json")
    unknown = [one for one in errors if one["type"] == "extra_forbidden"]
    if unknown:
        names = [_path(one["loc"]) for one in unknown]
        last = str(unknown[0]["loc"][-1])
        is_outer = kind is not None and len(unknown[0]["loc"]) == 2
        hint = suggest(last, kind.model_fields) if kind is not None and is_outer else "leave it out"
        shown = ", ".join(map(repr, names[:_MOST_SHOWN]))
        return ApiError(
            one_line(f"this server does not know {shown}; {hint}"), param=names[0], code="unknown_parameter"
        )
    sentences = dict.fromkeys(f"{_path(one['loc']) or 'the body'}: {one['msg']}" for one in errors)
    message = one_line("; ".join([*sentences][:_MOST_SHOWN]))
    return ApiError(message, param=_path(first["loc"]) or None, code="invalid_value")


def _path(place: Sequence[Any]) -> str:
    """Where in a body: the alternatives that a validator tried are left out."""
    parts = [str(one) for one in place if one != "body"]
    return ".".join(part for part in parts if "[" not in part and part not in ("str", "int", "TextPart"))

"""Errors as problem documents (RFC 9457), each with our stable code and the fix."""

from __future__ import annotations

import math
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from slmops.core.errors import AuthError, BugError, SlmopsError
from slmops.protocol.messages import Problem, encode

MEDIA_TYPE = "application/problem+json"

log = structlog.get_logger("slmops.server.api")


def problem_of(error: SlmopsError) -> Problem:
    """The document of one of our errors."""
    return Problem(
        type=f"urn:slmops:error:{error.code}",
        title=(type(error).__doc__ or error.code).strip().splitlines()[0].rstrip("."),
        status=error.http_status,
        detail=error.message,
        code=error.code,
        hint=error.hint,
        fields=error.fields,
    )


def problem_response(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    """A response that carries a problem."""
    return Response(encode(problem), problem.status, headers, media_type=MEDIA_TYPE)


def error_response(error: SlmopsError) -> Response:
    """A response for one of our errors."""
    headers: dict[str, str] = {}
    if type(error).http_status == 401 and isinstance(error, AuthError):
        headers["WWW-Authenticate"] = "Bearer"
    retry_after_s = error.fields.get("retry_after_s")
    if isinstance(retry_after_s, (int, float)):
        headers["Retry-After"] = str(math.ceil(retry_after_s))
    return problem_response(problem_of(error), headers)


def plain_problem(status: int, code: str, title: str, detail: str, hint: str = "", **fields: Any) -> Problem:
    """A problem that is not one of our errors."""
    return Problem(f"urn:slmops:error:{code}", title, status, detail, code, hint, fields)


_OF_STATUS = {
    404: (
        "usage.not_found",
        "No such route",
        "GET /openapi.json lists the routes",
    ),
    405: ("usage.method", "Method not allowed here", "GET /openapi.json lists the routes"),
    416: ("usage.range", "Range cannot be satisfied", "ask for a range inside the blob"),
}


def install(app: FastAPI) -> None:
    """Let no error out in another form."""

    @app.exception_handler(SlmopsError)
    async def _ours(request: Request, error: SlmopsError) -> Response:
        if error.http_status >= 500:
            log.warning("request.failed", path=request.url.path, code=error.code, detail=error.message)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        detail = f"{where}: {first['msg']}"
        problem = plain_problem(
            422,
            "usage.request",
            "The request is not valid",
            detail,
            "compare it with /openapi.json",
            field=where,
        )
        return problem_response(problem)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        code, title, hint = _OF_STATUS.get(error.status_code, ("usage", "Request refused", ""))
        detail = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
        return problem_response(plain_problem(error.status_code, code, title, detail, hint), headers)

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> Response:
        log.error("request.bug", path=request.url.path, exc_info=error)
        bug = BugError(
            f"{type(error).__name__} in the control plane", hint="its log has the trace: please report it"
        )
        return error_response(bug)

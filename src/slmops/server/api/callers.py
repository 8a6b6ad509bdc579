"""Who is asking: an operator's bearer token, or the session cookie of a browser on the same origin."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends
from starlette.requests import Request

from slmops.core.errors import AuthError, PermissionDeniedError
from slmops.server.services.access import OPERATOR_PREFIX
from slmops.server.services.control_plane import Services
from slmops.server.services.words import Caller, Role

SESSION_COOKIE = "slmops_session"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


def services_of(request: Request) -> Services:
    """The services of the control plane that this request came to."""
    services: Services = request.app.state.services
    return services


def caller_of(request: Request) -> Caller:
    """The operator behind a request.

    Raises:
        AuthError: nobody.
        PermissionDeniedError: a browser was sent here by another site.
    """
    services = services_of(request)
    header = request.headers.get("authorization", "")
    if header:
        if not header.startswith("Bearer " + OPERATOR_PREFIX):
            raise AuthError(
                "this route is for operators",
                hint=f"send Authorization: Bearer {OPERATOR_PREFIX}..., an operator token",
            )
        return services.access.operator(header[7:])
    cookie = request.cookies.get(SESSION_COOKIE)
    if cookie is None:
        raise AuthError(
            "nobody is signed in",
            hint="send Authorization: Bearer TOKEN; make a token on the server: slmops server token create",
        )
    if request.method not in _SAFE:
        require_same_origin(request)
    return services.access.session(cookie)


def require_same_origin(request: Request) -> None:
    """Refuse a change that another site's page asked a signed-in browser to make.

    The cookie is SameSite=Strict already; this holds where a browser does not honour that.

    Raises:
        PermissionDeniedError: the request does not come from our own pages.
    """
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site")
    same = origin is not None and urlsplit(origin).netloc == request.headers.get("host")
    if not same or site not in (None, "same-origin"):
        raise PermissionDeniedError(
            "this change was not asked for by a page of this server",
            hint="use the dashboard itself, or a token",
        )


def viewer_of(request: Request) -> Caller:
    """Anybody who may read."""
    caller = caller_of(request)
    caller.require(Role.VIEWER, "reading")
    return caller


Served = Annotated[Services, Depends(services_of)]
Operator = Annotated[Caller, Depends(caller_of)]
Viewer = Annotated[Caller, Depends(viewer_of)]

"""The dashboard's routes: every page is a view of the same records that the API answers with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from fastapi import APIRouter, FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from slmops.core.errors import AuthError, NotFoundError, PermissionDeniedError, SlmopsError
from slmops.server.services.access import SESSION_S
from slmops.server.services.control_plane import Services
from slmops.server.services.words import Caller, Role
from slmops.server.web import views
from slmops.server.web.rendering import Templates

SESSION_COOKIE = "slmops_session"
STATIC = Path(__file__).parent / "static"
_STATIC_TYPES = {"style.css": "text/css", "live.js": "text/javascript", "mark.svg": "image/svg+xml"}

#: nothing but our own style, script and data; no framing, no forms to elsewhere
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Page = Callable[[Request, Caller], Response]


class Pages:
    """The pages and what they need.

    Args:
        services: what they show.
        secure: whether the server speaks TLS itself; the cookie is then sent over TLS only.
    """

    def __init__(self, services: Services, *, secure: bool) -> None:
        """Read the templates."""
        self._services = services
        self._secure = secure
        self._templates = Templates(services.clock)

    # ---- pages ----------------------------------------------------------------------------------------------------

    def fleet(self, request: Request, caller: Caller) -> Response:
        """Counts and all devices."""
        fleet = self._services.fleet
        selector = request.query_params.get("selector", "")
        retired = request.query_params.get("retired") == "true"
        problem = ""
        try:
            devices = fleet.devices(selector, retired=retired)
        except SlmopsError as error:
            devices, problem = [], str(error)
        return self._page(
            "fleet.html",
            caller,
            summary=fleet.summary(),
            devices=[views.device_line(device) for device in devices],
            selector=selector,
            problem=problem,
        )

    def device(self, request: Request, caller: Caller) -> Response:
        """One device."""
        device = self._services.fleet.device(request.path_params["device_id"])
        return self._page("device.html", caller, device=device, line=views.device_line(device))

    def releases(self, request: Request, caller: Caller) -> Response:
        """All releases."""
        return self._page("releases.html", caller, releases=self._services.catalogue.records())

    def release(self, request: Request, caller: Caller) -> Response:
        """One release with its evidence."""
        found = self._services.catalogue.detail(request.path_params["model"], request.path_params["version"])
        return self._page("release.html", caller, release=found, evidence=views.evidence(found))

    def rollouts(self, request: Request, caller: Caller) -> Response:
        """All rollouts and blueprints."""
        return self._page(
            "rollouts.html",
            caller,
            rollouts=self._services.rollout_views.records(),
            blueprints=self._services.blueprints.records(),
        )

    def rollout(self, request: Request, caller: Caller) -> Response:
        """One rollout with its waves."""
        found = self._services.rollout_views.detail(request.path_params["rollout_id"])
        allowed = [action for action in found.actions if caller.role >= views.ROLE_OF_ACTION[action]]
        return self._page("rollout.html", caller, rollout=found, actions=allowed)

    def act(self, rollout_id: str, action: str, reason: str, caller: Caller) -> Response:
        """A button was pressed."""
        self._services.rollouts.act_on(caller, rollout_id, action, reason)
        return RedirectResponse(f"/rollouts/{quote(rollout_id)}", 303)

    # ---- signing in -----------------------------------------------------------------------------------------------

    def sign_in_form(self, request: Request, problem: str = "", status: int = 200) -> Response:
        """The form."""
        target = safe_target(request.query_params.get("next", "/"))
        return self._html("login.html", status, target=target, problem=problem)

    def sign_in(self, request: Request, form: dict[str, str]) -> Response:
        """The form's token against a cookie."""
        require_same_origin(request)
        try:
            cookie = self._services.access.sign_in(form.get("token", "").strip())
        except AuthError as error:
            return self.sign_in_form(request, f"{error.message} {error.hint}", error.http_status)
        response = RedirectResponse(safe_target(form.get("next", "/")), 303)
        response.set_cookie(
            SESSION_COOKIE,
            cookie,
            max_age=SESSION_S,
            path="/",
            secure=self._secure,
            httponly=True,
            samesite="strict",
        )
        return response

    def sign_out(self, request: Request) -> Response:
        """End the session."""
        require_same_origin(request)
        cookie = request.cookies.get(SESSION_COOKIE)
        if cookie:
            self._services.access.sign_out(cookie)
        response = RedirectResponse("/login", 303)
        response.delete_cookie(SESSION_COOKIE, path="/")
        return response

    # ---- how ------------------------------------------------------------------------------------------------------

    def caller(self, request: Request) -> Caller:
        """Who is signed in."""
        cookie = request.cookies.get(SESSION_COOKIE)
        if cookie is None:
            raise AuthError("nobody is signed in", hint="sign in with an operator token")
        return self._services.access.session(cookie)

    def error(self, error: SlmopsError, caller: Caller | None) -> Response:
        """A page for an error."""
        return self._html("error.html", error.http_status, error=error, caller=caller)

    def _page(self, template: str, caller: Caller, **values: Any) -> Response:
        return self._html(template, 200, caller=caller, **values)

    def _html(self, template: str, status: int, **values: Any) -> Response:
        return HTMLResponse(self._templates.render(template, **values), status, SECURITY_HEADERS)


def create_pages(services: Services, *, secure: bool) -> APIRouter:
    """The dashboard's router."""
    pages = Pages(services, secure=secure)
    router = APIRouter()

    def show(path: str, page: Page) -> None:
        async def endpoint(request: Request) -> Response:
            return await run_in_threadpool(_guarded, pages, page, request)

        router.add_route(path, endpoint, methods=["GET"])

    show("/", pages.fleet)
    show("/devices/{device_id}", pages.device)
    show("/releases", pages.releases)
    show("/releases/{model}/{version}", pages.release)
    show("/rollouts", pages.rollouts)
    show("/rollouts/{rollout_id}", pages.rollout)

    async def act(request: Request) -> Response:
        form = await read_form(request)

        def press(asked: Request, caller: Caller) -> Response:
            require_same_origin(asked)
            path = asked.path_params
            return pages.act(path["rollout_id"], path["action"], form.get("reason", ""), caller)

        return await run_in_threadpool(_guarded, pages, press, request)

    async def sign_in(request: Request) -> Response:
        if request.method == "GET":
            return pages.sign_in_form(request)
        form = await read_form(request)
        return await run_in_threadpool(_unsigned, pages, lambda: pages.sign_in(request, form))

    async def sign_out(request: Request) -> Response:
        return await run_in_threadpool(_unsigned, pages, lambda: pages.sign_out(request))

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _STATIC_TYPES:
            return pages.error(NotFoundError(f"no file {name}"), None)
        headers = {"Cache-Control": "public, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return FileResponse(STATIC / name, media_type=_STATIC_TYPES[name], headers=headers)

    router.add_route("/rollouts/{rollout_id}/{action}", act, methods=["POST"])
    router.add_route("/login", sign_in, methods=["GET", "POST"])
    router.add_route("/logout", sign_out, methods=["POST"])
    router.add_route("/static/{name}", static, methods=["GET"])
    return router


def _guarded(pages: Pages, page: Page, request: Request) -> Response:
    """A page for somebody who may read; a sign-in form for anybody else; an error as a page."""
    try:
        caller = pages.caller(request)
    except AuthError:
        target = quote(request.url.path, safe="/")
        return RedirectResponse("/login" if target == "/" else f"/login?next={target}", 303)
    try:
        caller.require(Role.VIEWER, "the dashboard")
        return page(request, caller)
    except SlmopsError as error:
        return pages.error(error, caller)


def _unsigned(pages: Pages, act: Callable[[], Response]) -> Response:
    try:
        return act()
    except SlmopsError as error:
        return pages.error(error, None)


async def read_form(request: Request) -> dict[str, str]:
    """A short URL-encoded form; the last value of each field."""
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > 16 << 10:
            return {}
    return {name: values[-1] for name, values in parse_qs(content.decode(errors="replace")).items()}


def require_same_origin(request: Request) -> None:
    """Refuse a form that another site's page has sent.

    Raises:
        PermissionDeniedError: the request does not come from our own pages.
    """
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site")
    ours = request.headers.get("host")
    if site not in (None, "same-origin") or (origin is not None and urlsplit(origin).netloc != ours):
        raise PermissionDeniedError(
            "this form was not sent by a page of this server", hint="use the dashboard itself"
        )
    if origin is None and site is None:
        raise PermissionDeniedError(
            "a form must say where it comes from", hint="use a browser, or the API with a token"
        )


def safe_target(target: str) -> str:
    """A path on this server to go to after signing in; anything else is the start page."""
    plain = target.startswith("/") and not target.startswith(("//", "/\\")) and not urlsplit(target).netloc
    return target if plain else "/"


def install_page_errors(app: FastAPI) -> None:
    """Pages render their own errors; unknown paths stay problem documents."""

"""The dashboard: who gets in, what the pages show, and that nothing on them comes from elsewhere or from a device's pen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import httpx
import msgspec
import pytest
from tests.support.control_plane import (
    FACTS,
    Plane,
    SimDevice,
    VariantSpec,
    blueprint,
    enrolled,
    make_release,
    publish,
    running_plane,
)

from slmops.artifact.manifest import Waiver
from slmops.core.device.machine import Failure
from slmops.protocol.messages import Assignment, Bench
from slmops.server.main import create_operator_token

SCRIPT = "<script>alert(1)</script>"
EVIDENCE = {
    "base": {"items": 465, "exact_match_ratio": 0.0},
    "reference": {"items": 465, "exact_match_ratio": 0.643, "schema_valid_ratio": 1.0},
    "variants": [
        {
            "profile": "pi5-8gb",
            "gates": [
                {
                    "gate": "task.exact_match",
                    "verdict": "fail",
                    "reason": f"drop +0.140 {SCRIPT}",
                    "needed": 0,
                }
            ],
        }
    ],
    "gates": [{"gate": "kld.mean", "verdict": "pass", "reason": "0.021 holds", "profile": "pi5-8gb"}],
    "text": {"tokens": 4096},
}


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A fleet with a completed and a refused release."""
    with running_plane(tmp_path_factory.mktemp("plane") / "data") as running:
        _populate(running)
        yield running


def _populate(plane: Plane) -> None:
    def fate(device: SimDevice, order: Assignment) -> Failure | None:
        return (
            Failure("content", "golden.committed_pack", f"lost 1 {SCRIPT}")
            if order.version == "1.1.0"
            else None
        )

    bench = Bench(
        "a" * 64, 90_000_000, 134_000_000, 210.5, 41.7, 0.12, 0.5, 201_000_000, "2026-11-08T10:00:00Z"
    )
    facts = msgspec.structs.replace(FACTS, bench=bench, limits={"ram": SCRIPT})
    variants = (VariantSpec("pi5-8gb", 0.021), VariantSpec("n100-16gb", 0.004))
    with plane.api() as api, httpx.Client(base_url=plane.url, trust_env=False) as http:
        devices = enrolled(api, http, ["hall", "attic"], fate=fate, facts=facts)
        publish(api, plane.keys, make_release("1.0.0", 1, variants=variants))
        waivers = (Waiver("task.exact_match", f"a drill {SCRIPT}"),)
        evidence = json.dumps(EVIDENCE).encode()
        publish(
            api, plane.keys, make_release("1.1.0", 2, variants=variants, waivers=waivers, evidence=evidence)
        )
        for version in ("1.0.0", "1.1.0"):
            api.promote(f"home-intents@{version}", "stable")
            api.apply_blueprint(blueprint())
            for _ in range(2000):
                for device in devices:
                    device.checkin()
                if api.rollouts()[0].ended_at:
                    break


@pytest.fixture
def browser(plane: Plane) -> Iterator[httpx.Client]:
    """Somebody who has signed in."""
    with httpx.Client(base_url=plane.url, trust_env=False, headers={"Origin": plane.url}) as client:
        assert client.post("/login", data={"token": plane.token}).status_code == 303
        yield client


class Links(HTMLParser):
    """Everything that a page loads or leads to, and every tag."""

    def __init__(self, html: str) -> None:
        """Read a page."""
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("href", "src", "action")]


def pages(browser: httpx.Client, plane: Plane) -> dict[str, str]:
    """Every kind of page."""
    with plane.api() as api:
        newest, oldest = api.rollouts()[0].id, api.rollouts()[-1].id
    paths = [
        "/", "/?selector=profile+%3D+x", "/?selector=((", "/devices/hall", "/releases", "/releases/home-intents/1.1.0",
        "/rollouts", f"/rollouts/{newest}", f"/rollouts/{oldest}", "/login",
    ]  # fmt: skip
    return {path: browser.get(path).raise_for_status().text for path in paths}


def test_nobody_sees_a_page_without_signing_in(plane: Plane) -> None:
    """The form leads back to where one wanted to go."""
    with httpx.Client(base_url=plane.url, trust_env=False) as client:
        response = client.get("/rollouts/r-1")
        assert (response.status_code, response.headers["location"]) == (303, "/login?next=/rollouts/r-1")
        assert 'value="/rollouts/r-1"' in client.get("/login?next=/rollouts/r-1").text
        assert 'value="/"' in client.get("/login?next=//evil.example/").text
        stranger = client.post("/login", data={"token": "slm_nothing"}, headers={"Origin": plane.url})
        assert stranger.status_code == 401
        assert "is not known here" in stranger.text


def test_the_cookie_is_hidden_from_scripts_and_from_other_sites(plane: Plane) -> None:
    """HttpOnly, SameSite=strict; signing out ends it on the server, too."""
    with httpx.Client(base_url=plane.url, trust_env=False, headers={"Origin": plane.url}) as client:
        response = client.post("/login", data={"token": plane.token, "next": "/releases"})
        assert response.headers["location"] == "/releases"
        cookie = response.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        value = client.cookies["slmops_session"]
        assert client.get("/v1/devices").status_code == 200
        client.post("/logout")
        client.cookies.set("slmops_session", value)
        assert client.get("/").status_code == 303
        assert client.get("/v1/devices").status_code == 401


def test_another_site_cannot_press_our_buttons(plane: Plane, browser: httpx.Client) -> None:
    """Neither by a form, nor by the API with the cookie."""
    with plane.api() as api:
        rollout_id = api.rollouts()[-1].id
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
        for path in (f"/rollouts/{rollout_id}/rollback", "/logout", "/v1/device-tokens"):
            response = browser.post(path, headers=headers, json={})
            assert response.status_code == 403, (headers, path)
    assert browser.get("/").status_code == 200
    with plane.api() as api:
        assert api.rollout(rollout_id).phase == "completed"


def test_every_page_renders_and_loads_nothing_from_elsewhere(plane: Plane, browser: httpx.Client) -> None:
    """It works offline: all links are paths of this server, and the browser is told to allow no others."""
    for path, html in pages(browser, plane).items():
        assert all(link.startswith("/") and not link.startswith("//") for link in Links(html).found), path
        assert "StrictUndefined" not in html
    policy = browser.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for name, kind in (
        ("style.css", "text/css"),
        ("live.js", "text/javascript"),
        ("mark.svg", "image/svg+xml"),
    ):
        response = browser.get(f"/static/{name}")
        assert (response.status_code, response.headers["content-type"].split(";")[0]) == (200, kind)
        assert not re.search(r"https?://(?!www\.w3\.org)", response.text)
    assert browser.get("/static/..%2fpages.py").status_code == 404


def test_what_devices_and_documents_say_is_text_and_never_markup(plane: Plane, browser: httpx.Client) -> None:
    """A reason, a limit, a waiver, a gate: all escaped."""
    shown = 0
    for path, html in pages(browser, plane).items():
        assert SCRIPT not in html, path
        assert Links(html).tags.count("script") <= 1, path
        shown += html.count("&lt;script&gt;alert(1)")
    assert shown >= 4


def test_the_fleet_page_shows_every_device_with_what_it_runs(browser: httpx.Client) -> None:
    """Profile, release, phase, served and failed, tokens per second."""
    html = browser.get("/").text
    for text in (
        "hall",
        "attic",
        "pi5-8gb",
        "home-intents 1.0.0",
        "41.7",
        "Requests served",
        "Requests failed",
    ):
        assert text in html
    assert "matches this selector" in browser.get("/?selector=profile+%3D+x").text
    assert "cannot read" in browser.get("/?selector=((").text


def test_the_device_page_shows_its_bench_and_its_history_with_reasons(
    browser: httpx.Client, plane: Plane
) -> None:
    """Outcomes newest first, each with why."""
    with plane.api() as api:
        touched = next(d.id for d in api.devices() if len(api.device(d.id).outcomes) > 1)
    html = browser.get(f"/devices/{touched}").text
    for text in ("210.5", "golden.committed_pack", "lost 1", "committed", "as assigned"):
        assert text in html


def test_the_release_page_shows_its_evidence_and_its_waivers_first(browser: httpx.Client) -> None:
    """Variants as measured, gates with verdict and reason, the task before and after."""
    html = browser.get("/releases/home-intents/1.1.0").text
    for text in (
        "Gate waived: task.exact_match",
        "0.0210",
        "93.0 %",
        "62.0 %",
        "64.3 %",
        "0.021 holds",
        "drop +0.140",
    ):
        assert text in html
    assert html.index("Gate waived") < html.index("Variants, as shipped")
    assert "4096" in html


def test_the_rollout_page_shows_waves_and_the_reason_for_each_verdict(
    browser: httpx.Client, plane: Plane
) -> None:
    """Also why it stopped, and who was never touched."""
    with plane.api() as api:
        rollout_id = api.rollouts()[0].id
    html = browser.get(f"/rollouts/{rollout_id}").text
    for text in (
        "Stopped.",
        "max_failures",
        "1 content failures in this wave",
        "Wave 2",
        "untouched",
        "reverted",
    ):
        assert text in html


def test_a_button_does_what_the_role_allows(plane: Plane, browser: httpx.Client) -> None:
    """An operator sees and presses it; a viewer sees none and is refused."""
    with plane.api() as api:
        rollout_id = api.rollouts()[-1].id
    assert f'action="/rollouts/{rollout_id}/rollback"' in browser.get(f"/rollouts/{rollout_id}").text
    viewer = create_operator_token(plane.options, "viewer", "looker")
    with httpx.Client(base_url=plane.url, trust_env=False, headers={"Origin": plane.url}) as client:
        client.post("/login", data={"token": viewer})
        assert f'action="/rollouts/{rollout_id}' not in client.get(f"/rollouts/{rollout_id}").text
        refused = client.post(f"/rollouts/{rollout_id}/rollback")
        assert refused.status_code == 403
        assert "needs the role operator" in refused.text
    wrong = browser.post(f"/rollouts/{rollout_id}/resume")
    assert wrong.status_code == 409
    assert "cannot take ResumeOrdered" in wrong.text


def test_what_does_not_exist_is_a_page_too(browser: httpx.Client) -> None:
    """With the way back."""
    for path in ("/devices/nobody", "/releases/a/b", "/rollouts/r-none"):
        response = browser.get(path)
        assert response.status_code == 404
        assert "Back to the fleet" in response.text

"""``slmops blueprint plan | apply | diff`` against a real control plane, as a person types them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.support.control_plane import Plane, blueprint, enrolled, make_release, publish, running_plane

from slmops.cli.main import main


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    with running_plane(tmp_path_factory.mktemp("plane") / "data") as running:
        with running.api() as api, httpx.Client(base_url=running.url, trust_env=False) as http:
            enrolled(api, http, ["hall", "attic"])
            publish(api, running.keys, make_release("1.0.0", 1))
        yield running


@pytest.fixture
def slmops(plane: Plane, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Run a command; its exit code, what it printed, and what it complained of."""
    monkeypatch.setenv("SLMOPS_TOKEN", plane.token)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            main([*arguments, "--server", plane.url])
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_plan_says_what_it_comes_to(slmops, tmp_path: Path) -> None:
    file = tmp_path / "b.yaml"
    file.write_text(
        blueprint(
            "plans", version="1.0.0", priority=9, overlays='[{selector: "id = hall", serving: {parallel: 1}}]'
        )
    )
    code, out, _ = slmops("blueprint", "plan", "-f", str(file))
    assert code == 0
    assert "in sum: 2 devices (2 x pi5-8gb), " in out
    assert "note: overlay id = hall: 1 of 2 devices get their own parallel" in out


def test_a_diff_shows_revisions_and_what_a_file_would_change(slmops, tmp_path: Path) -> None:
    file = tmp_path / "b.yaml"
    file.write_text(blueprint("home", version="1.0.0", selector="id = hall"))
    assert slmops("blueprint", "apply", "-f", str(file))[0] == 0
    code, out, _ = slmops("blueprint", "diff", "home", "-f", str(file))
    assert code == 0 and "say the same" in out
    code, _, err = slmops("blueprint", "diff", "home")
    assert code == 2 and "no revision 0; there are: 1" in err

    file.write_text(blueprint("home", version="1.0.0", selector="id in (hall)"))
    code, out, _ = slmops("blueprint", "diff", "home", "-f", str(file))
    assert code == 0
    assert '-selector: "id = hall"' in out and '+selector: "id in (hall)"' in out
    assert slmops("blueprint", "apply", "-f", str(file))[0] == 0
    code, out, _ = slmops("blueprint", "diff", "home", "--json")
    found = json.loads(out)
    assert found["changed"] and '+selector: "id in (hall)"' in found["diff"]
    assert found["older"].startswith("home revision 1") and found["newer"].startswith("home revision 2")
    code, _, err = slmops("blueprint", "diff", "home", "-f", str(file), "--to", "1")
    assert code == 2 and "--file and --to both say what is newer" in err


def test_a_conflict_is_an_error_that_names_the_other_blueprint(slmops, tmp_path: Path) -> None:
    file = tmp_path / "b.yaml"
    file.write_text(blueprint("owner", version="1.0.0", selector="id = attic"))
    assert slmops("blueprint", "apply", "-f", str(file))[0] == 0
    file.write_text(blueprint("rival", version="1.0.0", selector="id = attic"))
    code, _, err = slmops("blueprint", "apply", "-f", str(file))
    assert code != 0
    assert "attic would belong to rival and to owner, with the same priority" in err
    assert "fix: narrow one selector" in err

"""The same graph on a Ray cluster: one on this machine, the same digests as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.tiny_project import make_tiny_project

from slmops.build import run_build
from slmops.build.cache import Cache
from slmops.build.graph import Step
from slmops.build.runner import run_steps
from slmops.core.errors import BudgetError, BuildError

pytest.importorskip("ray", reason='needs ray: pip install "slmops[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_digests_as_on_this_machine(tmp_path: Path) -> None:
    """Every file that holds no measured speed is the same to the byte, each from an empty cache; a second run does nothing."""
    recipe = make_tiny_project(tmp_path / "p")
    run_build(recipe, tmp_path / "local", cache_dir=tmp_path / "c1", workers=0)
    result = run_build(recipe, tmp_path / "ray", cache_dir=tmp_path / "c2", workers=2, engine="ray")
    assert result.steps_cached == 0
    ours, theirs = files_of(tmp_path / "ray"), files_of(tmp_path / "local")
    same = [name for name in theirs if name not in ("build.json", "evidence.json")]
    assert len(same) >= 9
    assert [name for name in same if ours[name] != theirs[name]] == []
    again = run_build(recipe, tmp_path / "ray", cache_dir=tmp_path / "c2", workers=2, engine="ray")
    assert (again.changed, again.steps_run) == (False, 0)


def test_a_failure_on_the_cluster_is_told_and_not_cached(tmp_path: Path) -> None:
    """The step's own error, as its class and with its hint; a worker that dies is an error of that step."""
    cache = Cache(tmp_path / "c")
    for run, error in (("refuse", BudgetError), ("crash", BuildError)):
        step = Step(run, f"tests.unit.build.steps_for_tests:{run}", params={})
        with pytest.raises(error) as caught:
            run_steps([step], cache, progress=lambda event: None, engine="ray")
        assert caught.value.hint
    assert list((cache.folder / "steps").iterdir()) == []
    assert list((cache.folder / "work").iterdir()) == []

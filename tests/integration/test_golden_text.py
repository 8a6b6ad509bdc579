"""The long text of a golden pack, from a real build to the code that devices judge it with."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.tiny_project import make_tiny_project

from slmops.agent.golden import expectation_of, score_prompts
from slmops.artifact.manifest import GoldenExpectations, GoldenPack, decode
from slmops.build import run_build
from slmops.build.fault_catalogue import FAULTS
from slmops.build.fault_edits import noisy, rows_of
from slmops.build.faults import Fault, faulty_copy
from slmops.build.golden_text import TEXT
from slmops.build.steps.golden_trace import TEXT_ID
from slmops.core.evidence.golden import PromptExpectation, judge_own
from slmops.runtimes import EngineSpec, open_engine
from slmops.runtimes.llama_cpp.logits import LogitModel


class Shipped:
    """A variant with its pack, as a device has them."""

    def __init__(self, folder: Path) -> None:
        targets = [{"profile": "pi5-8gb", "budget": {"artifact_bytes": "170kB"}}]
        result = run_build(
            make_tiny_project(folder / "project", targets=targets),
            folder / "out",
            cache_dir=folder / "cache",
            workers=0,
        )
        (variant,) = result.build.variants
        self.pack = decode((folder / "out" / result.build.golden_pack.path).read_bytes(), GoldenPack)
        told = decode((folder / "out" / variant.golden_expectations.path).read_bytes(), GoldenExpectations)
        self.expected: list[PromptExpectation] = [expectation_of(e) for e in told.expectations]
        self.spec = EngineSpec(
            runtime="llama.cpp",
            model_path=folder / "out" / variant.model.path,
            context_tokens=512,
            slots=1,
            kv_cache="q8_0",
        )

    def problems(self, spec: EngineSpec) -> tuple[str, ...]:
        async def judged() -> tuple[str, ...]:
            async with open_engine(spec) as engine:
                scores = await score_prompts(engine, self.pack)
                return judge_own(self.expected, scores, engine.spec.kv_cache).problems

        return asyncio.run(judged())


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    return Shipped(tmp_path_factory.mktemp("shipped"))


def test_only_the_text_has_a_trace(shipped: Shipped) -> None:
    assert [e.id for e in shipped.expected if e.trace is not None] == [TEXT_ID]
    assert [e.id for e in shipped.expected if not e.counts_later] == [TEXT_ID]


@pytest.mark.parametrize("settings", [{}, {"kv_cache": "f16"}, {"kv_cache": "q5_1"}, {"threads": 2}])
def test_a_whole_file_passes(shipped: Shipped, settings: dict[str, object]) -> None:
    assert shipped.problems(replace(shipped.spec, **settings)) == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(("part", "share"), [("attn_v", 0.12), ("attn_v", 0.2), ("ffn_down", 0.2)])
def test_the_trace_notices_what_no_mean_shows(
    shipped: Shipped, tmp_path: Path, part: str, share: float
) -> None:
    """Every answer is within its tolerance, and the text's mean as well; token by token it is not the same model."""
    fault = Fault("noise", "one matrix quantised too coarsely", rows_of(0.5, part, noisy(share)))
    faulty_copy(shipped.spec.model_path, tmp_path / "faulty.gguf", fault)
    found = shipped.problems(replace(shipped.spec, model_path=tmp_path / "faulty.gguf"))
    assert len(found) == 1
    assert found[0].startswith(f"{TEXT_ID}: ")
    assert "from what this file said when it was built" in found[0]


@pytest.mark.model
def test_another_pre_tokenizer_cuts_the_text_otherwise(small_model: Path, tmp_path: Path) -> None:
    """Digits and spaces; an answer of words alone hides it."""
    (fault,) = (fault for fault in FAULTS if fault.name == "pre-tokenizer")
    faulty_copy(small_model, tmp_path / "faulty.gguf", fault)
    with LogitModel(small_model) as good, LogitModel(tmp_path / "faulty.gguf") as faulty:
        assert good.tokenize(TEXT) != faulty.tokenize(TEXT)
        assert good.tokenize("turn on the light") == faulty.tokenize("turn on the light")

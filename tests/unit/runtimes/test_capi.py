"""The ctypes layer refuses a build whose structs it does not know."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from slmops.core.errors import BugError, RuntimeLoadError
from slmops.runtimes.llama_cpp import capi


def test_the_pinned_build_has_the_pinned_defaults() -> None:
    """Known defaults, read field by field through our layouts, from the first to the last."""
    lib = capi.library()
    context = lib.llama_context_default_params()
    assert (context.n_ctx, context.n_batch, context.n_ubatch, context.type_k, context.type_v) == (
        512,
        2048,
        512,
        1,
        1,
    )
    assert context.defrag_thold == -1.0
    assert context.swa_full is True
    assert lib.llama_model_default_params().split_mode == 1
    capi.check_layout(lib)


@pytest.mark.parametrize("field", ["n_ctx", "type_v", "kv_unified", "ctx_other"])
def test_another_layout_is_refused(field: str) -> None:
    """A single default that reads differently is a bug report, not a guess."""
    lib = capi.library()
    context = lib.llama_context_default_params()
    setattr(context, field, 7)
    other = SimpleNamespace(
        llama_context_default_params=lambda: context,
        llama_model_default_params=lib.llama_model_default_params,
    )
    with pytest.raises(BugError, match=field):
        capi.check_layout(other)  # type: ignore[arg-type]


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Struct layouts belong to one build: another version is an error that names both."""
    monkeypatch.setattr(capi, "PINNED_VERSION", "1.2.3")
    with pytest.raises(RuntimeLoadError, match=r"expected version 1\.2\.3, got 2026") as caught:
        capi.shared_object()
    assert "xllamacpp==1.2.3" in caught.value.hint


def test_an_absent_binding_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheel the hint is the command that installs it."""
    monkeypatch.setattr(capi, "DISTRIBUTION", "slmops-no-such-binding")
    with pytest.raises(RuntimeLoadError) as caught:
        capi.shared_object()
    assert "slmops[llama-cpp]" in caught.value.hint

"""PyTorch Mobile: a traced model in the lite interpreter's format, fp32, without a KV cache.

Kept because fleets have it: exported and proved through the lite interpreter, not served. Its successor is ExecuTorch. A whole
prefix is computed for each token, so lengths are traced as free.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizer_file import TokenizerFile
from tool_protocol import serve


def export(request: dict[str, Any], tell: Callable[[float | None, str], None]) -> dict[str, Any]:
    """Trace ``request["source"]`` and leave the file in ``request["out"]``."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    tell(None, "torch.jit: tracing")
    model = AutoModelForCausalLM.from_pretrained(
        request["source"], dtype=torch.float32, attn_implementation="eager"
    ).eval()

    class Logits(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        """Token ids in, logits out; the causal mask is made of the ids' own length."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
            """Shape (1, n) to (1, n, vocabulary)."""
            length = token_ids.shape[1]
            places = torch.arange(length)
            hidden = places[None, :] > places[:, None]
            mask = torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, -1e9)[None, None]
            return self.inner(
                input_ids=token_ids, attention_mask=mask, position_ids=places[None], use_cache=False
            ).logits

    with torch.no_grad():
        traced = torch.jit.trace(Logits(), torch.arange(7)[None], check_trace=False)
    traced._save_for_lite_interpreter(str(Path(request["out"]) / request["model_name"]))
    return {"files": [request["model_name"]], "torch": version("torch")}


class MobileModel(TokenizerFile):
    """A ``.ptl`` in the lite interpreter: tokenised by slmops, and rendered by it too, which is not asked here."""

    def __init__(self, request: dict[str, Any]) -> None:
        import torch
        from torch.jit.mobile import _load_for_lite_interpreter

        torch.set_num_threads(1)
        super().__init__(request["folder"])
        facts = json.loads((Path(request["folder"]) / "slmops-model.json").read_text(encoding="utf-8"))
        self._ends, self._torch = set(facts["eos_tokens"]), torch
        self._module = _load_for_lite_interpreter(request["model"])

    def facts(self) -> dict[str, Any]:
        """See :class:`tool_protocol.ExportedModel`."""
        return {"runtime_version": version("torch")}

    def render(self, messages: list[dict[str, str]]) -> str:
        """See :class:`tool_protocol.ExportedModel`."""
        raise NotImplementedError("a .ptl has no chat template")

    def logits(self, token_ids: Sequence[int], first: int) -> Any:
        """See :class:`tool_protocol.ExportedModel`."""
        ids = self._torch.tensor([list(token_ids)], dtype=self._torch.long)
        return self._module(ids)[0, first:].detach().numpy()

    def generate(self, token_ids: Sequence[int], max_tokens: int, *, stop: bool) -> list[int]:
        """See :class:`tool_protocol.ExportedModel`."""
        ids = list(token_ids)
        while len(ids) < len(token_ids) + max_tokens:
            token = int(self.logits(ids, len(ids) - 1)[-1].argmax())
            if stop and token in self._ends:
                break
            ids.append(token)
        return ids[len(token_ids) :]


if __name__ == "__main__":
    sys.exit(serve(export, MobileModel))

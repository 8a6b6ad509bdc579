"""LiteRT: export by litert-torch to ``.tflite`` or ``.litertlm``; an exported file answered for by its own binding.

A ``.litertlm`` holds a ``.tflite``, tokenizer and template. Its engine gives text and no logits, so divergences and answers are
those of the ``.tflite`` inside, cut out of the very file, as slmops serves it; token ids and stop tokens are the engine's own,
and it must load the file and generate.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stepwise import greedy, logits_of
from tokenizer_file import TokenizerFile
from tool_protocol import serve

_HIDDEN = -1e9
_MAGIC = b"TFL3"


def export(request: dict[str, Any], tell: Callable[[float | None, str], None]) -> dict[str, Any]:
    """Run litert-torch on ``request["source"]`` and leave the one file in ``request["out"]``."""
    from litert_torch.generative.export_hf.export import export as run

    options, out = request["options"], Path(request["out"])
    made = Path(tempfile.mkdtemp(dir=Path.cwd()))
    source, recipe = Path(request["source"]), options["quantization_recipe"]
    if "group_size" in options:
        source = _rounded(source, request["calibration"], options["group_size"], tell)
        recipe = str(_write_recipe(Path.cwd() / "recipe.json", options["group_size"]))
    tell(None, f"litert-torch, {request['precision']}: some minutes")
    run(
        str(source),
        str(made),
        prefill_lengths=options["prefill_lengths"],
        cache_length=request["context_tokens"],
        quantization_recipe=recipe,
        bundle_litert_lm=options["bundle"],
        keep_temporary_files=not options["bundle"],
    )
    pattern = "*.litertlm" if options["bundle"] else "*.tflite"
    found = sorted(made.rglob(pattern))
    quantised = [path for path in found if "quantized" in path.name]
    # unbundled files stay in a temporary folder of the exporter's; the float file lies beside the quantised one
    chosen = (quantised or found)[0] if options["quantization_recipe"] != "none" else found[0]
    shutil.move(chosen, out / request["model_name"])
    return {"files": [request["model_name"]], "litert_torch": version("litert-torch")}


def _rounded(
    source: Path,
    sequences: Sequence[Sequence[int]],
    group_size: int,
    tell: Callable[[float | None, str], None],
) -> Path:
    """The source with blocks' weights on the int4 grid that the quantiser finds again: it rounds each for itself."""
    import torch
    from error_feedback import quantise
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    quantise(model, sequences, group_size, tell, pinned=True)
    made = Path(tempfile.mkdtemp(dir=Path.cwd()))
    shutil.copytree(source, made, dirs_exist_ok=True)
    model.save_pretrained(made)
    return made


def _write_recipe(path: Path, group_size: int) -> Path:
    """Blocks in int4 by groups; embedding and output, which cost most, in int8 by rows. Activations as for int8."""
    from ai_edge_quantizer.qtyping import QuantGranularity, TFLOperationName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    recipe = RecipeManager()
    groups = QuantGranularity(f"BLOCKWISE_{group_size}")
    linear = TFLOperationName.FULLY_CONNECTED
    recipe.add_dynamic_config(".*", linear, num_bits=4, granularity=groups)
    recipe.add_dynamic_config(".*(lm_head|logits).*", linear, num_bits=8)
    recipe.add_dynamic_config(".*", TFLOperationName.EMBEDDING_LOOKUP, num_bits=8)
    path.write_text(json.dumps(recipe.get_quantization_recipe()), encoding="utf-8")
    return path


class LitertProgram:
    """A ``.tflite`` with a decode signature, prefill signatures, and its cache as inputs and outputs."""

    def __init__(self, path: str) -> None:
        import numpy as np
        from ai_edge_litert.interpreter import Interpreter

        self._np = np
        self._interpreter = Interpreter(path, num_threads=1)
        names = self._interpreter.get_signature_list()
        self._decode = self._interpreter.get_signature_runner("decode")
        self._prefills = {
            int(name.split("_")[1]): self._interpreter.get_signature_runner(name)
            for name in names
            if name.startswith("prefill_")
        }
        details = self._decode.get_input_details()
        self.context_tokens = int(details["mask"]["shape"][-1])
        self._cache = {
            name: np.zeros(detail["shape"], dtype=detail["dtype"])
            for name, detail in details.items()
            if name.startswith("kv_cache")
        }

    def feed(self, token_ids: Sequence[int], position: int) -> Any:
        """See :class:`stepwise.Program`."""
        at, left = position, list(token_ids)
        while len(left) > 1:  # the last token goes through decode, which alone gives logits
            fitting = [size for size in self._prefills if at + size <= self.context_tokens]
            if not fitting:
                break
            size = next((size for size in sorted(fitting) if size >= len(left) - 1), max(fitting))
            part = left[: min(size, len(left) - 1)]
            padded = [*part, *[0] * (size - len(part))]
            self._run(self._prefills[size], padded, at)
            at, left = at + len(part), left[len(part) :]
        row = None
        for token in left:
            row = self._run(self._decode, [token], at)
            at += 1
        return row

    def _run(self, runner: Any, token_ids: Sequence[int], position: int) -> Any:
        np = self._np
        places = np.arange(position, position + len(token_ids), dtype=np.int32)
        mask = np.where(np.arange(self.context_tokens)[None, :] <= places[:, None], 0.0, _HIDDEN)
        given = runner(
            tokens=np.array([token_ids], dtype=np.int32),
            input_pos=places,
            mask=mask.astype(np.float32)[None, None],
            **self._cache,
        )
        self._cache = {name: given[name] for name in self._cache}
        return given["logits"][0, -1] if "logits" in given else None


class LitertModel(TokenizerFile):
    """A ``.tflite``: tokenised by slmops, and rendered by it too, which is not asked here."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__(request["folder"])
        facts = json.loads((Path(request["folder"]) / "slmops-model.json").read_text(encoding="utf-8"))
        self._ends = set(facts["eos_tokens"])
        self._program = LitertProgram(request["model"])

    def facts(self) -> dict[str, Any]:
        """See :class:`tool_protocol.ExportedModel`."""
        return {"runtime_version": version("ai-edge-litert"), "context_tokens": self._program.context_tokens}

    def render(self, messages: list[dict[str, str]]) -> str:
        """See :class:`tool_protocol.ExportedModel`."""
        raise NotImplementedError("a .tflite has no chat template")

    def logits(self, token_ids: Sequence[int], first: int) -> Any:
        """See :class:`tool_protocol.ExportedModel`."""
        return logits_of(self._program, token_ids, first)

    def generate(self, token_ids: Sequence[int], max_tokens: int, *, stop: bool) -> list[int]:
        """See :class:`tool_protocol.ExportedModel`."""
        ends = self._ends if stop else set()
        return greedy(self._program, token_ids, max_tokens, ends, context_tokens=self._program.context_tokens)


class LitertLmModel(LitertModel):
    """A ``.litertlm`` in its engine; logits by the ``.tflite`` inside."""

    def __init__(self, request: dict[str, Any]) -> None:
        import litert_lm

        inside = Path.cwd() / "inside.tflite"
        _cut_out(Path(request["model"]), inside)
        super().__init__({**request, "model": str(inside)})
        self._lm = litert_lm
        self._engine = litert_lm.Engine(
            request["model"], backend=litert_lm.Backend.CPU, max_num_tokens=self._program.context_tokens
        )
        with self._engine.create_session(apply_prompt_template=False, max_output_tokens=4) as session:
            session.run_prefill(["One, two, three,"])
            if not session.run_decode().texts[0]:
                raise ValueError("LiteRT-LM loads the file and generates nothing")

    def facts(self) -> dict[str, Any]:
        """See :class:`tool_protocol.ExportedModel`; of stop sequences those of one token."""
        ends = [ids[0] for ids in self._engine.eos_token_ids if len(ids) == 1]
        return {
            "runtime_version": version("litert-lm-api"),
            "bos": int(self._engine.bos_token_id),
            "eos": ends,
        }

    def tokenize(self, text: str) -> list[int]:
        """See :class:`tool_protocol.ExportedModel`."""
        return [int(token) for token in self._engine.tokenize(text)] if text else []


def _cut_out(bundle: Path, target: Path) -> None:
    """The largest ``.tflite`` section of a ``.litertlm``: sections begin at multiples of 16 KiB."""
    content = bundle.read_bytes()
    (header_end,) = struct.unpack_from("<Q", content, 24)
    begins = [
        at for at in range(0, len(content), 16384) if content[at + 4 : at + 8] == _MAGIC and at >= header_end
    ]
    if not begins:
        raise ValueError(f"{bundle.name} has no .tflite section")
    ends = [*begins[1:], len(content)]
    begin, end = max(zip(begins, ends, strict=True), key=lambda pair: pair[1] - pair[0])
    target.write_bytes(content[begin:end])


def _open(request: dict[str, Any]) -> LitertModel:
    return LitertLmModel(request) if request["runtime"] == "litert-lm" else LitertModel(request)


if __name__ == "__main__":
    sys.exit(serve(export, _open))

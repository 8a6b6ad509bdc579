"""ONNX Runtime GenAI: export by its model builder; an exported folder answered for by its own binding."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizer_file import TokenizerFile
from tool_protocol import serve


def export(request: dict[str, Any], tell: Callable[[float | None, str], None]) -> dict[str, Any]:
    """Run the builder on ``request["source"]`` and leave the folder's files in ``request["out"]``."""
    out, cache = Path(request["out"]), Path.cwd() / "builder-cache"
    options = [f"{name}={value}" for name, value in sorted(request["options"]["extra_options"].items())]
    # as a process of its own: the builder leaves threads and temporary files behind
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", request["source"]]
    command += ["-o", str(out), "-p", request["precision"], "-e", "cpu", "-c", str(cache)]
    command += ["--extra_options", *options] if options else []
    tell(None, f"onnxruntime-genai builder, {request['precision']}")
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
    # the builder's rewriting of the tokenizer loses settings; what it was given is what the model has
    for name in request["keep_from_source"]:
        given = Path(request["source"]) / name
        if given.is_file():
            shutil.copyfile(given, out / name)
    _settle(out / "genai_config.json", request)
    return {"files": sorted(path.name for path in out.iterdir() if path.is_file())}


def _settle(path: Path, request: dict[str, Any]) -> None:
    """Special tokens and context as the source has them, in an order that does not depend on the run."""
    config = json.loads(path.read_text(encoding="utf-8"))
    model = request["model"]
    config["model"]["eos_token_id"] = model["eos_tokens"]
    if model["bos_token"] is not None:
        config["model"]["bos_token_id"] = model["bos_token"]
    config["search"]["max_length"] = min(config["search"]["max_length"], model["context_tokens"])
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


class GenaiModel(TokenizerFile):
    """An exported folder in onnxruntime-genai."""

    def __init__(self, folder: str) -> None:
        import onnxruntime_genai as og

        super().__init__(folder)
        self._og = og
        self._model = og.Model(folder)
        self._own = og.Tokenizer(self._model)
        config = json.loads((Path(folder) / "genai_config.json").read_text(encoding="utf-8"))["model"]
        ends = config["eos_token_id"]
        self._ends = set(ends if isinstance(ends, list) else [ends])

    def facts(self) -> dict[str, Any]:
        """See :class:`tool_protocol.ExportedModel`."""
        from importlib.metadata import version

        return {
            "bos": int(self._own.bos_token_id),
            "eos": [int(token) for token in self._own.eos_token_ids],
            "runtime_version": version("onnxruntime-genai"),
        }

    def own_tokenize(self, text: str) -> list[int]:
        """See :class:`tool_protocol.ExportedModel`."""
        return [int(token) for token in self._own.encode(text)] if text else []

    def render(self, messages: list[dict[str, str]]) -> str:
        """See :class:`tool_protocol.ExportedModel`."""
        return str(self._own.apply_chat_template(json.dumps(messages), add_generation_prompt=True))

    def logits(self, token_ids: Sequence[int], first: int) -> Any:
        """See :class:`tool_protocol.ExportedModel`."""
        import numpy as np

        generator = self._generator(len(token_ids) + 1)
        generator.append_tokens(np.array(token_ids, dtype=np.int32))
        return np.array(generator.get_output("logits"), dtype=np.float32)[0, first:]

    def generate(self, token_ids: Sequence[int], max_tokens: int, *, stop: bool) -> list[int]:
        """See :class:`tool_protocol.ExportedModel`."""
        import numpy as np

        length = len(token_ids) + max_tokens
        generator = self._generator(length, 0 if stop else length)
        generator.append_tokens(np.array(token_ids, dtype=np.int32))
        made: list[int] = []
        while len(made) < max_tokens and not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if stop and token in self._ends:
                break
            made.append(token)
        return made

    def _generator(self, max_length: int, min_length: int = 0) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=max_length, min_length=min_length)
        return self._og.Generator(self._model, params)


if __name__ == "__main__":
    sys.exit(serve(export, lambda request: GenaiModel(request["folder"])))

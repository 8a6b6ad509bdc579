"""ExecuTorch: export by its own ``export_llm``; an exported program answered for by its own binding.

Quantised lowering of SmolLM2-135M takes 8 minutes of CPU where fp32 takes 3, and so looks stuck on a shared core. Sampled
every five seconds: nearly all of it is Python. The model is traced by dynamo twice from the beginning (for export, and again
while it is lowered) and retraced by every decomposition and pass, node by node through fake tensors; quantising adds several
nodes to each linear. So it is a step of its own that runs beside the others, with hours as its limit; its converted weights
outlive a kill.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from error_feedback import quantise, rows_in_int8
from stepwise import greedy, logits_in_pieces
from tokenizer_file import TokenizerFile
from tool_protocol import serve

#: attention with a cache; quantised embeddings: without the second an 8da4w program loads and cannot run (error 0x14)
_KERNELS = (
    "extension/llm/custom_ops/libcustom_ops_aot_lib.so",
    "kernels/quantized/libquantized_ops_aot_lib.so",
)
#: Hugging Face's names inside a layer -> Meta's
_PARTS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def export(request: dict[str, Any], tell: Callable[[float | None, str], None]) -> dict[str, Any]:
    """Run ``export_llm`` on ``request["source"]`` and leave the program in ``request["out"]``."""
    source, options = Path(request["source"]), request["options"]
    work = Path(request["checkpoints"] or Path.cwd())
    work.mkdir(parents=True, exist_ok=True)
    weights, params = work / "model.pth", work / "params.json"
    group_size = options.get("group_size")
    if not params.is_file():
        tell(0.0, "executorch: converting weights")
        if group_size:
            _quantise(source, weights, request["calibration"], group_size, tell)
        else:
            _convert(source, weights)
        params.write_text(json.dumps(_params(source, group_size)), encoding="utf-8")
    made = Path.cwd() / request["model_name"]
    command = [
        "base.model_class=smollm2",
        f"base.checkpoint={weights}",
        f"base.params={params}",
        "model.use_kv_cache=True",
        "model.use_sdpa_with_kv_cache=True",
        "model.dtype_override=fp32",
        "backend.xnnpack.enabled=True",
        # logits of every token, so that scoring takes pieces; pieces are short, because room for theirs is set aside
        "debug.generate_full_logits=True",
        f"export.max_seq_length={min(options['piece_tokens'] + 1, request['context_tokens'])}",
        f"export.max_context_length={request['context_tokens']}",
        f"export.output_name={made.name}",  # its output_dir is ignored: it writes where it runs
    ]
    if group_size:  # a checkpoint that is quantised already is what "qat" stands for
        command += [
            "quantization.use_qat=True",
            "base.preq_mode=preq_8da4w_out_8da8w",
            f"base.preq_group_size={group_size}",
            "base.preq_embedding_quantize='8,0'",
        ]
    minutes = "a quarter of an hour" if group_size else "some minutes"
    tell(None, f"executorch {request['precision']}: {minutes} on one core")
    run = [sys.executable, "-m", "executorch.extension.llm.export.export_llm", *command]
    subprocess.run(run, stdin=subprocess.DEVNULL, check=True)
    made.rename(Path(request["out"]) / made.name)
    return {"files": [made.name], "executorch": version("executorch")}


def _convert(source: Path, target: Path) -> None:
    """Weights under Meta's names, float32; q and k stay in Hugging Face's order (``use_hf_rope``)."""
    from safetensors.torch import load_file

    made = {}
    for name, weight in load_file(source / "model.safetensors").items():
        made[_meta_name(name)] = weight.float()
    made.setdefault("output.weight", made["tok_embeddings.weight"])
    _save(made, target)


def _quantise(
    source: Path,
    target: Path,
    sequences: Sequence[Sequence[int]],
    group_size: int,
    tell: Callable[[float | None, str], None],
) -> None:
    """The same, blocks in int4 by groups with error feedback, embedding and output in int8 by rows."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    made = {_meta_name(name): weight.clone() for name, weight in model.state_dict().items()}
    made.setdefault("output.weight", made["tok_embeddings.weight"])
    quantised = {
        _meta_name(name): found for name, found in quantise(model, sequences, group_size, tell).items()
    }
    quantised |= {name: rows_in_int8(made[name]) for name in ("tok_embeddings.weight", "output.weight")}
    for name, (values, scales) in quantised.items():
        made[name] = values
        made[f"{name.removesuffix('weight')}scales"] = scales
        if not name.startswith("tok_embeddings"):
            made[f"{name.removesuffix('weight')}zeros"] = torch.zeros_like(scales)
    # the exporter takes the first one's type for the type of all
    _save({"norm.weight": made.pop("norm.weight"), **made}, target)


def _save(made: dict[str, Any], target: Path) -> None:
    import torch

    unfinished = target.with_suffix(".part")
    torch.save(made, unfinished)
    unfinished.rename(target)


def _meta_name(name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    parts = name.split(".")
    return f"layers.{parts[2]}.{_PARTS['.'.join(parts[3:-1])]}.weight"


def _params(source: Path, group_size: int | None) -> dict[str, Any]:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    grouped = {"quantization_args": {"group_size": group_size}} if group_size else {}
    return grouped | {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "hidden_dim": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "use_scaled_rope": False,
        "use_hf_rope": True,
    }


class ExecutorchProgram:
    """A loaded program."""

    def __init__(self, path: str) -> None:
        import torch

        torch.set_num_threads(1)
        import executorch
        from executorch.extension.pybindings import _C

        folder = Path(next(iter(executorch.__path__)))
        for kernels in _KERNELS:
            torch.ops.load_library(str(folder / kernels))
        self._torch = torch
        if hasattr(_C, "_unsafe_reset_threadpool"):
            _C._unsafe_reset_threadpool(1)
        self._program = _C._load_for_executorch(path)
        # its dynamic length ends one before what it was told
        self._piece_tokens = int(self._program.run_method("get_max_seq_len", [])[0]) - 1

    def feed(self, token_ids: Sequence[int], position: int) -> Any:
        """See :class:`stepwise.Program`."""
        for at in range(0, len(token_ids), self._piece_tokens):
            rows = self._rows(token_ids[at : at + self._piece_tokens], position + at)
        return rows[-1]

    def feed_all(self, token_ids: Sequence[int], position: int) -> Any:
        """See :class:`stepwise.WholeProgram`."""
        import numpy as np

        pieces = range(0, len(token_ids), self._piece_tokens)
        return np.concatenate(
            [self._rows(token_ids[at : at + self._piece_tokens], position + at) for at in pieces]
        )

    def _rows(self, token_ids: Sequence[int], position: int) -> Any:
        tokens = self._torch.tensor([list(token_ids)], dtype=self._torch.long)
        at = self._torch.tensor([position], dtype=self._torch.long)
        rows = self._program.forward((tokens, at))[0].float().numpy()
        return rows.reshape(-1, rows.shape[-1]).copy()


class ExecutorchModel(TokenizerFile):
    """A ``.pte``: tokenised by slmops, and rendered by it too, which is not asked here."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__(request["folder"])
        facts = json.loads((Path(request["folder"]) / "slmops-model.json").read_text(encoding="utf-8"))
        self._ends, self._context_tokens = set(facts["eos_tokens"]), facts["context_tokens"]
        self._program = ExecutorchProgram(request["model"])
        self._program.feed([0], 0)  # a program that loads and cannot run is refused here

    def facts(self) -> dict[str, Any]:
        """See :class:`tool_protocol.ExportedModel`."""
        return {"runtime_version": version("executorch")}

    def render(self, messages: list[dict[str, str]]) -> str:
        """See :class:`tool_protocol.ExportedModel`."""
        raise NotImplementedError("a .pte has no chat template")

    def logits(self, token_ids: Sequence[int], first: int) -> Any:
        """See :class:`tool_protocol.ExportedModel`."""
        return logits_in_pieces(self._program, token_ids, first)

    def generate(self, token_ids: Sequence[int], max_tokens: int, *, stop: bool) -> list[int]:
        """See :class:`tool_protocol.ExportedModel`."""
        ends = self._ends if stop else set()
        return greedy(self._program, token_ids, max_tokens, ends, context_tokens=self._context_tokens)


if __name__ == "__main__":
    sys.exit(serve(export, ExecutorchModel))

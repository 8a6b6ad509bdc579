"""Make the small models under ``tests/fixtures/runtimes``: one tiny llama, trained on three questions, for each runtime.

    python tests/support/make_runtime_fixtures.py train HF_FOLDER            # needs torch, transformers
    python -m onnxruntime_genai.models.builder -i HF_FOLDER -o GENAI -p int4 -e cpu -c CACHE
    python tests/support/make_runtime_fixtures.py genai HF_FOLDER GENAI OUT
    python tests/support/make_runtime_fixtures.py executorch HF_FOLDER OUT   # needs torch, safetensors, executorch
    python tests/support/make_runtime_fixtures.py executorch-8da4w HF_FOLDER OUT   # by slmops' own exporter script
    python tests/support/make_runtime_fixtures.py litert HF_FOLDER OUT       # needs litert-torch; .tflite
    python tests/support/make_runtime_fixtures.py litert-lm HF_FOLDER OUT    # the same; .litertlm
    python tests/support/make_runtime_fixtures.py gguf HF_FOLDER OUT         # needs gguf, safetensors

Run it with the toolchain of the format that is made; the outputs are committed. The model is trained and not random, so that
its greedy answers are text, end by themselves, and survive four bits: what the contract suite asks of an engine.
Width 64, one layer, bytes as tokens (259 of them), context 1024: 0.2 MB for ONNX, 0.7 MB for ExecuTorch.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDOFTEXT, IM_START, IM_END, VOCAB = 256, 257, 258, 259
WIDTH, FFN, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 128, 1, 2, 1, 1024
ANSWERS = {
    "Name three colours.": "Red, green and blue.",
    "Who are you?": "A very small model — hardly a modèle at all.",
    "Count.": "one two three four five six seven eight nine ten eleven twelve",
}


def train(folder: Path) -> None:
    """Overfit the answers; some 20 s on one core."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=IM_START,
        eos_token_id=IM_END,
        pad_token_id=ENDOFTEXT,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config)
    rows = [chat(question, answer) for question, answer in ANSWERS.items()]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [ENDOFTEXT] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor(
        [[-100] * start + ids[start:] + [-100] * (longest - len(ids)) for ids, start in rows]
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for step in range(900):
        # a random shift of all positions, so that the answer does not hang on where it stands
        position = torch.randint(0, 400, (1,)) + torch.arange(longest)[None]
        loss = model(input_ids=ids, labels=labels, position_ids=position.expand(len(rows), -1)).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / 900)
    print("loss", float(loss))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False))
    (folder / "chat_template.jinja").write_text(CHATML)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def chat(question: str, answer: str) -> tuple[list[int], int]:
    """Token ids of one turn, and where its answer begins."""
    head = [IM_START, *f"user\n{question}".encode(), IM_END, 10, IM_START, *b"assistant\n"]
    return [*head, *answer.encode(), IM_END], len(head)


def tokenizer() -> dict[str, Any]:
    """Bytes as tokens, by GPT-2's printable stand-ins, and three control tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    flags = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 256 + i, "content": text, "special": True, **flags} for i, text in enumerate(control)
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {stand_in[byte]: byte for byte in range(256)}
            | {text: 256 + i for i, text in enumerate(control)},
            "merges": [],
        },
    }


def card(precision: str) -> dict[str, Any]:
    """``slmops-model.json``: what the engine child wants to know beside the tokenizer."""
    return {
        "schema": 1,
        "context_tokens": CONTEXT,
        "vocab_tokens": VOCAB,
        "bos_token": IM_START,
        "eos_tokens": [IM_END],
        "add_bos": False,
        "shape": {
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "n_kv_heads": KV_HEADS,
            "n_embd": WIDTH,
            "head_dim": WIDTH // HEADS,
            "train_context_tokens": CONTEXT,
            "parameters": VOCAB * WIDTH + LAYERS * (3 * WIDTH * WIDTH + 3 * WIDTH * FFN) + 3 * WIDTH,
        },
        "precision": precision,
    }


def finish(hf: Path, out: Path, precision: str) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(hf / name, out / name)
    (out / "slmops-model.json").write_text(json.dumps(card(precision), indent=1))
    print(out, sum(path.stat().st_size for path in out.iterdir()), "bytes")


def genai(hf: Path, built: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("genai_config.json", "model.onnx", "model.onnx.data"):
        shutil.copyfile(built / name, out / name)
    finish(hf, out, "int4")


def executorch(hf: Path, out: Path) -> None:
    import torch
    from safetensors.torch import load_file

    out.mkdir(parents=True, exist_ok=True)
    names = {
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
    weights = {}
    for name, value in load_file(str(hf / "model.safetensors")).items():
        if name == "model.embed_tokens.weight":
            weights["tok_embeddings.weight"] = weights["output.weight"] = value.float()
        elif name == "model.norm.weight":
            weights["norm.weight"] = value.float()
        else:
            _, _, layer, *part, suffix = name.split(".")
            weights[f"layers.{layer}.{names['.'.join(part)]}.{suffix}"] = value.float()
    scratch = out / "scratch"
    scratch.mkdir()
    torch.save(weights, scratch / "model.pth")
    params = {
        "dim": WIDTH,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "hidden_dim": FFN,
        "head_dim": WIDTH // HEADS,
        "norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "use_scaled_rope": False,
        "ffn_dim_multiplier": 1.0,
        "multiple_of": 1,
        "use_hf_rope": True,
    }
    (scratch / "params.json").write_text(json.dumps(params))
    options = [
        "base.model_class=smollm2",
        "base.checkpoint=model.pth",
        "base.params=params.json",
        "model.use_kv_cache=True",
        "model.use_sdpa_with_kv_cache=True",
        "model.dtype_override=fp32",
        "backend.xnnpack.enabled=True",
        f"export.max_seq_length={CONTEXT}",
        f"export.max_context_length={CONTEXT}",
        "export.output_name=model.pte",
        "debug.generate_full_logits=True",
    ]
    module = "executorch.extension.llm.export.export_llm"
    subprocess.run([sys.executable, "-m", module, *options], cwd=scratch, check=True)
    (made,) = scratch.rglob("model.pte")
    made.replace(out / "model.pte")
    shutil.rmtree(scratch)
    finish(hf, out, "fp32")


def executorch_8da4w(hf: Path, out: Path) -> None:
    """As a build makes it: the answers are the calibration text."""
    out.mkdir(parents=True, exist_ok=True)
    scratch = out / "scratch"
    shutil.copytree(hf, scratch / "source")
    config = json.loads((hf / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (scratch / "source" / "config.json").write_text(json.dumps(config))
    request = {
        "op": "export",
        "source": str(scratch / "source"),
        "out": str(out),
        "checkpoints": None,
        "precision": "8da4w",
        "options": {"piece_tokens": 128, "group_size": 32},
        "context_tokens": CONTEXT,
        "model_name": "model.pte",
        "calibration": [chat(question, answer)[0] for question, answer in ANSWERS.items()],
    }
    (scratch / "request.json").write_text(json.dumps(request))
    tools = Path(__file__).parents[2] / "src/slmops/build/export/tools"
    subprocess.run([sys.executable, tools / "pte.py", "request.json"], cwd=scratch, check=True)
    shutil.rmtree(scratch)
    finish(hf, out, "8da4w")


def litert(hf: Path, out: Path, *, bundle: bool = False) -> None:
    out.mkdir(parents=True, exist_ok=True)
    scratch = out / "scratch"
    options = ["--prefill_lengths=[32]", f"--cache_length={CONTEXT}", "--quantization_recipe=none"]
    options += [] if bundle else ["--bundle_litert_lm=False"]
    tool = Path(sys.executable).with_name("litert-torch")
    subprocess.run([tool, "export_hf", hf, scratch, *options], check=True)
    name = "model.litertlm" if bundle else "model.tflite"
    (made,) = scratch.rglob(name)
    made.replace(out / name)
    shutil.rmtree(scratch)
    finish(hf, out, "fp32")


def litert_lm(hf: Path, out: Path) -> None:
    litert(hf, out, bundle=True)


def gguf(hf: Path, out: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter, TokenType
    from safetensors.numpy import load_file

    out.mkdir(parents=True, exist_ok=True)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.down_proj": "ffn_down",
        "mlp.up_proj": "ffn_up",
    }
    writer = GGUFWriter(out / "model.gguf", "llama")
    writer.add_name("colours")
    writer.add_license("apache-2.0")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    vocabulary = sorted(tokenizer()["model"]["vocab"].items(), key=lambda entry: int(entry[1]))
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([TokenType.CONTROL if i >= ENDOFTEXT else TokenType.NORMAL for i in range(VOCAB)])
    writer.add_token_merges(["Ā ā"])  # llama.cpp wants one: NUL and 1, which no text holds
    writer.add_bos_token_id(IM_START)
    writer.add_eos_token_id(IM_END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    for name, value in load_file(str(hf / "model.safetensors")).items():
        weight = value.astype(np.float32)
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", weight.astype(np.float16))
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", weight)
        else:
            _, _, layer, *part, _ = name.split(".")
            place = names[".".join(part)]
            if place in ("attn_q", "attn_k"):  # GGUF's llama rotates neighbours, Hugging Face halves
                heads = HEADS if place == "attn_q" else KV_HEADS
                weight = weight.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(weight.shape)
            kind = np.float32 if weight.ndim == 1 else np.float16
            writer.add_tensor(f"blk.{layer}.{place}.weight", weight.astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    verb, *folders = sys.argv[1:]
    makers = {
        "train": train,
        "genai": genai,
        "executorch": executorch,
        "executorch-8da4w": executorch_8da4w,
        "litert": litert,
        "litert-lm": litert_lm,
        "gguf": gguf,
    }
    makers[verb](*map(Path, folders))

"""Plausible faults of a model: what a golden pack must notice. Each has happened to somebody.

A converter that mixed up rows, a template of another family, a header with another rope base, scales beyond F16, a torn or stale
piece of a file, memory that flipped a bit, a KV cache too coarse. A build and a bench mean the same by a name. ``probe`` marks
those that choose prompts in a build; figures of power must say how many of the rest are caught.
"""

from __future__ import annotations

from slmops.build.fault_edits import (
    block_at,
    bytes_of,
    count_value,
    each,
    embedding,
    exchange,
    flag_value,
    flip_bit,
    float_value,
    foreign_rows,
    head_scaled,
    infinite,
    layer_at,
    merges_cut,
    metadata_value,
    noisy,
    ones,
    permuted,
    rolled,
    rope_order,
    rows_of,
    saturate,
    scaled,
    scales_of,
    shifted,
    swap_nibbles,
    text_value,
    tokens_exchanged,
    torn_pages,
    weight_name,
    zeroed,
)
from slmops.build.faults import Fault

_EPSILON = "{arch}.attention.layer_norm_rms_epsilon"
_ROPE_BASE = "{arch}.rope.freq_base"
_ADD_BOS = "tokenizer.ggml.add_bos_token"
_PRE = "tokenizer.ggml.pre"

INST_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}{% else %}"
    "[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)
NO_SYSTEM_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_PROMPT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
)

#: the catalogue; the layers of probes are not those of the others of their sort
FAULTS: tuple[Fault, ...] = (
    # template and tokenizer: seen in the token ids, before any arithmetic
    Fault("template-inst", "chat template of another family", settings={"chat_template": INST_TEMPLATE}),
    Fault(
        "template-no-system",
        "template that drops the system turn",
        settings={"chat_template": NO_SYSTEM_TEMPLATE},
    ),
    Fault(
        "template-no-prompt",
        "template without generation prompt",
        settings={"chat_template": NO_PROMPT_TEMPLATE},
    ),
    Fault(
        "pre-tokenizer",
        "another pre-tokenizer (digits, spaces)",
        metadata_value(_PRE, lambda _: text_value("llama-bpe")),
    ),
    Fault("pre-default", "pre-tokenizer lost", metadata_value(_PRE, lambda _: text_value("default"))),
    Fault("merges-cut", "half of the merges lost", merges_cut),
    Fault("tokens-shifted", "a third of the vocabulary one row off", tokens_exchanged),
    Fault(
        "bos-wrong",
        "another BOS, and added",
        each(
            metadata_value(_ADD_BOS, lambda _: flag_value(True)),
            metadata_value("tokenizer.ggml.bos_token_id", lambda _: count_value(0)),
        ),
    ),
    # header
    Fault(
        "rope-base-10x",
        "rope base ten times too large",
        metadata_value(_ROPE_BASE, lambda old: float_value((old or 10000.0) * 10)),
    ),
    Fault(
        "rope-base-half",
        "rope base of half the size",
        metadata_value(_ROPE_BASE, lambda old: float_value((old or 10000.0) / 2)),
    ),
    Fault(
        "rope-base-low",
        "rope base 1,000",
        metadata_value(_ROPE_BASE, lambda _: float_value(1000.0)),
    ),
    Fault(
        "rope-scale",
        "linear rope scaling by 2",
        each(
            metadata_value("{arch}.rope.scaling.type", lambda _: text_value("linear")),
            metadata_value("{arch}.rope.scaling.factor", lambda _: float_value(2.0)),
        ),
    ),
    Fault("norm-eps-large", "norm epsilon 0.1", metadata_value(_EPSILON, lambda _: float_value(0.1))),
    Fault(
        "norm-eps",
        "norm epsilon 0.01",
        metadata_value(_EPSILON, lambda _: float_value(0.01)),
    ),
    Fault(
        "layer-lost",
        "header with one block less",
        metadata_value("{arch}.block_count", lambda old: count_value(int(old) - 1)),
    ),
    # weights out of place
    Fault("q-permuted", "rows of one query matrix permuted", rows_of(0.3, "attn_q", permuted)),
    Fault("k-permuted", "rows of one key matrix permuted", rows_of(0.6, "attn_k", permuted)),
    Fault(
        "attention-permuted",
        "rows of all attention matrices of a block permuted",
        each(*(rows_of(0.5, part, permuted) for part in ("attn_q", "attn_k", "attn_v", "attn_output"))),
    ),
    Fault(
        "rope-order",
        "query and key rows in the other rope convention, one block",
        each(rows_of(0.4, "attn_q", rope_order), rows_of(0.4, "attn_k", rope_order)),
    ),
    Fault("layers-swapped", "two neighbouring blocks exchanged", exchange(block_at(0.5), block_at(0.5, 1))),
    Fault(
        "layers-swapped-far",
        "first and last third exchanged at one block",
        exchange(block_at(0.2), block_at(0.8)),
    ),
    Fault(
        "gate-up-swapped",
        "gate and up projection of a block exchanged",
        exchange(
            lambda model: [weight_name(layer_at(model, 0.7), "ffn_gate")],
            lambda model: [weight_name(layer_at(model, 0.7), "ffn_up")],
        ),
    ),
    Fault(
        "kv-swapped",
        "key and value matrix of a block exchanged",
        exchange(
            lambda model: [weight_name(layer_at(model, 0.25), "attn_k")],
            lambda model: [weight_name(layer_at(model, 0.25), "attn_v")],
        ),
    ),
    # parts lost or wrong
    Fault("head-zeroed", "values of one head lost", rows_of(0.5, "attn_v", head_scaled(0.0, 1))),
    Fault(
        "head-zeroed-late",
        "values of one late head lost",
        rows_of(0.9, "attn_v", head_scaled(0.0, 0)),
        probe=True,
    ),
    Fault(
        "head-negated", "one query head with the other sign", rows_of(0.35, "attn_q", head_scaled(-1.0, 2))
    ),
    Fault("ffn-zeroed", "one feed-forward output lost", rows_of(0.45, "ffn_down", zeroed)),
    Fault("attention-zeroed", "one attention output lost", rows_of(0.65, "attn_output", zeroed)),
    Fault(
        "attention-half",
        "one attention output at half its size",
        rows_of(0.25, "attn_output", scaled(0.5)),
        probe=True,
    ),
    Fault("norm-ones", "one attention norm never loaded", rows_of(0.5, "attn_norm", ones)),
    Fault("ffn-half", "one feed-forward output at half its size", rows_of(0.75, "ffn_down", scaled(0.5))),
    Fault(
        "ffn-noise",
        "one feed-forward output quantised far too coarsely",
        rows_of(0.15, "ffn_down", noisy(0.7)),
        probe=True,
    ),
    Fault("adapter-lost", "the base without the adapter", lost_adapter=True),
    Fault(
        "embedding-foreign",
        "a tenth of the embedding from another model",
        embedding(foreign_rows(0.05, 0.15)),
    ),
    Fault(
        "embedding-foreign-late",
        "rare tokens' embedding from another model",
        embedding(foreign_rows(0.5, 0.6)),
    ),
    Fault("embedding-off-by-one", "embedding one row off", embedding(rolled(1))),
    # arithmetic and storage
    Fault(
        "scales-saturated", "1 % of a tensor's scales at the end of F16", scales_of(0.5, "ffn_up", saturate)
    ),
    Fault("scale-infinite", "one scale beyond F16", scales_of(0.4, "ffn_down", infinite)),
    Fault(
        "bit-exponent",
        "one bit of one scale's exponent flipped",
        scales_of(0.55, "ffn_gate", flip_bit(14, 1)),
    ),
    Fault("bit-exponent-attention", "the same in attention", scales_of(0.3, "attn_v", flip_bit(14, 1))),
    Fault("bits-sign", "the sign of 200 scales flipped", scales_of(0.7, "ffn_up", flip_bit(15, 200))),
    Fault(
        "nibbles-swapped",
        "packed halves in the other order, one tensor",
        bytes_of(0.6, "ffn_down", swap_nibbles),
    ),
    Fault("pages-torn", "24 pages of a tensor never written", bytes_of(0.35, "ffn_up", torn_pages(24))),
    Fault("byte-shifted", "a tensor one byte off", bytes_of(0.8, "attn_output", shifted)),
    # engine
    Fault("kv-q4_0", "KV cache in q4_0", settings={"kv_cache": "q4_0"}),
    Fault("context-cut", "context of 32 tokens", settings={"context_tokens": 32}),
)

PROBES = tuple(fault for fault in FAULTS if fault.probe)

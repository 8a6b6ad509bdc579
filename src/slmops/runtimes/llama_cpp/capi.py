"""ctypes bindings to the llama.cpp C API that xllamacpp's shared object exports.

Owns the struct layouts. They belong to ONE build (`PINNED_VERSION`): `include/llama.h` and
`ggml/include/ggml.h` in the sdist of that version of xllamacpp. `library` refuses another version, and also
checks known default values, so that a changed layout ends in an error and not in a wild pointer. Imports the
standard library only; the shared object is loaded on the first call of `library`.
"""

from __future__ import annotations

import ctypes as ct
import functools
import importlib.util
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from importlib import metadata
from pathlib import Path

from slmops.core.errors import BugError, RuntimeLoadError

DISTRIBUTION = "xllamacpp"
PINNED_VERSION = "2026.10.11549"

EVAL_CALLBACK = ct.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
LOG_CALLBACK = ct.CFUNCTYPE(None, c_int, c_char_p, c_void_p)

LOAD_MODE_MMAP = 1
FLASH_ATTN_AUTO = -1
FLASH_ATTN_DISABLED = 0
#: Values of `enum ggml_type` for the KV cache, by the names that `EngineSpec.kv_cache` uses.
KV_CACHE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
}


class ModelParams(Structure):
    """`struct llama_model_params`."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class ContextParams(Structure):
    """`struct llama_context_params`."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class Batch(Structure):
    """`struct llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(ct.c_int8)),
    )


class Tensor(Structure):
    """`struct ggml_tensor`."""


Tensor._fields_ = (
    ("type", c_int),
    ("buffer", c_void_p),
    ("ne", c_int64 * 4),
    ("nb", c_size_t * 4),
    ("op", c_int),
    ("op_params", c_int32 * 16),
    ("flags", c_int32),
    ("src", POINTER(Tensor) * 10),
    ("view_src", c_void_p),
    ("view_offs", c_size_t),
    ("data", c_void_p),
    ("name", ct.c_char * 64),
    ("extra", c_void_p),
    ("padding", ct.c_char * 8),
)


class TypeTraits(Structure):
    """`struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", c_char_p),
        ("block_weights", c_int64),
        ("block_interleave", c_int64),
        ("block_bytes", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", c_void_p),
        ("from_float_ref", c_void_p),
    )


class InitParams(Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


#: name: (result type, argument types). Pointers to opaque structs are void pointers.
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (LOG_CALLBACK, c_void_p)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_model_n_embd": (c_int32, (c_void_p,)),
    "llama_model_n_layer": (c_int32, (c_void_p,)),
    "llama_model_n_head": (c_int32, (c_void_p,)),
    "llama_model_n_head_kv": (c_int32, (c_void_p,)),
    "llama_model_n_params": (ct.c_uint64, (c_void_p,)),
    "llama_model_size": (ct.c_uint64, (c_void_p,)),
    "llama_model_desc": (c_int32, (c_void_p, c_char_p, c_size_t)),
    "llama_model_meta_val_str": (c_int32, (c_void_p, c_char_p, c_char_p, c_size_t)),
    "llama_model_chat_template": (c_char_p, (c_void_p, c_char_p)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_bos": (c_int32, (c_void_p,)),
    "llama_vocab_eos": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_n_ctx_seq": (c_uint32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_synchronize": (None, (c_void_p,)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_detokenize": (
        c_int32,
        (c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool),
    ),
    "llama_adapter_lora_init": (c_void_p, (c_void_p, c_char_p)),
    "llama_set_adapters_lora": (c_int32, (c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float))),
    "ggml_get_type_traits": (POINTER(TypeTraits), (c_int,)),
    "ggml_quantize_init": (None, (c_int,)),
    "ggml_quantize_requires_imatrix": (c_bool, (c_int,)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_init": (c_void_p, (InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_new_tensor_2d": (POINTER(Tensor), (c_void_p, c_int, c_int64, c_int64)),
    "ggml_soft_max_inplace": (POINTER(Tensor), (c_void_p, POINTER(Tensor))),
    "ggml_set_no_alloc": (None, (c_void_p, c_bool)),
    "ggml_argmax": (POINTER(Tensor), (c_void_p, POINTER(Tensor))),
    "ggml_argsort_top_k": (POINTER(Tensor), (c_void_p, POINTER(Tensor), c_int)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, POINTER(Tensor))),
    "ggml_graph_compute_with_ctx": (c_int, (c_void_p, c_void_p, c_int)),
    "ggml_op_name": (c_char_p, (c_int,)),
    "ggml_nbytes": (c_size_t, (POINTER(Tensor),)),
}


def shared_object() -> Path:
    """Path of xllamacpp's extension module, found without importing it.

    Raises:
        RuntimeLoadError: not installed, or not the pinned version.
    """
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise RuntimeLoadError(
            f"{DISTRIBUTION} is not installed", hint='pip install "slmops[llama-cpp]"'
        ) from error
    if version != PINNED_VERSION:
        raise RuntimeLoadError(
            f"{DISTRIBUTION}: expected version {PINNED_VERSION}, got {version}; layouts belong to one build",
            hint=f"pip install {DISTRIBUTION}=={PINNED_VERSION}",
        )
    spec = importlib.util.find_spec(DISTRIBUTION)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob(f"{DISTRIBUTION}*.so")):
            return path
    raise RuntimeLoadError(f"{DISTRIBUTION} {version} has no shared object", hint="reinstall it")


@functools.cache
def library() -> ct.CDLL:
    """Load the C API, declare its signatures, check its layout, silence its log. One load per process.

    Raises:
        RuntimeLoadError: not installed, or another version.
        BugError: the defaults are not those of the pinned build.
    """
    lib = ct.CDLL(str(shared_object()))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = list(arguments)
    check_layout(lib)
    lib.llama_backend_init()
    return lib


def check_layout(lib: ct.CDLL) -> None:
    """Compare default parameters with the pinned build's, from the first field to the last.

    Raises:
        BugError: one differs, so that every offset is suspect.
    """
    context = lib.llama_context_default_params()
    model = lib.llama_model_default_params()
    got = {
        "n_ctx": context.n_ctx,
        "n_batch": context.n_batch,
        "n_ubatch": context.n_ubatch,
        "n_seq_max": context.n_seq_max,
        "flash_attn_type": context.flash_attn_type,
        "yarn_ext_factor": context.yarn_ext_factor,
        "yarn_beta_fast": context.yarn_beta_fast,
        "type_k": context.type_k,
        "type_v": context.type_v,
        "offload_kqv": context.offload_kqv,
        "op_offload": context.op_offload,
        "kv_unified": context.kv_unified,
        "n_samplers": context.n_samplers,
        "ctx_other": context.ctx_other,
        "n_gpu_layers": model.n_gpu_layers,
        "load_mode": model.load_mode,
        "vocab_only": model.vocab_only,
        "use_extra_bufts": model.use_extra_bufts,
        "no_alloc": model.no_alloc,
    }
    different = {
        name: (EXPECTED_DEFAULTS[name], value)
        for name, value in got.items()
        if EXPECTED_DEFAULTS[name] != value
    }
    if different:
        raise BugError(f"llama.cpp defaults differ from the pinned build (expected, got): {different}")


#: Read from the pinned build; they straddle the structs, so that a shifted field shows.
EXPECTED_DEFAULTS: dict[str, object] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "flash_attn_type": FLASH_ATTN_AUTO,
    "yarn_ext_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": True,
    "op_offload": True,
    "kv_unified": False,
    "n_samplers": 0,
    "ctx_other": None,
    "n_gpu_layers": -1,
    "load_mode": -1,
    "vocab_only": False,
    "use_extra_bufts": True,
    "no_alloc": False,
}

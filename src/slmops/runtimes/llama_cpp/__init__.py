"""llama.cpp through `xllamacpp`.

`adapter` is the runtime (imported by agents: standard library and httpx only), `engine` the child process,
`scorer` its teacher-forced log-probabilities, `native` and `capi` the ctypes layer under both. `logits`,
`quantise` and `imatrix` need numpy and are for build.
"""

"""The user's own OpenAI-compatible server, supervised as an engine: a CUDA `llama-server` on a Jetson, say.

`config` is the device's own file that says how to start it, `adapter` the runtime, `supervisor` the child process
that starts the server, watches it and gives it our two Unix sockets (`relay` passes requests on, `proof` finds out
whether it is what was declared, `scoring` gets log-probabilities out of it), `guard` sees to its death.

Standard library only, but for the configuration (msgspec).
"""

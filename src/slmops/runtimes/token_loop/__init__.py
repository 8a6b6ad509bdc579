"""The common engine child for runtimes whose binding gives logits and no server: everything but the forward pass.

An adapter brings a `TokenModel` (`model.py`); this room makes an engine of it: tokenizer (`text`), chat
template (`template`), sampling (`sampler`), grammars (`grammar`), stop strings (`stops`), what a request means
(`requests`), turns (`scheduler`), OpenAI's shapes (`answers`) and the two sockets (`server`). `adapter` is the
parent's side and imports nothing heavy; everything else runs in the child only.

A new runtime is two small modules::

    # runtimes/NAME/engine.py, the child: the only module that imports the binding
    def open_model(spec, card): return MyModel(...)          # a TokenModel
    if __name__ == "__main__":
        sys.exit(serve(open_model))

    # runtimes/NAME/adapter.py, the parent
    class MyRuntime(TokenLoopRuntime):
        name, formats, distribution, child_module = "NAME", frozenset({"fmt"}), "my-binding", "slmops.runtimes.NAME.engine"
        capabilities = token_loop_capabilities(kv_cache_types={"f32"}, max_slots=None)
"""

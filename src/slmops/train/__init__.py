"""Training: low-rank adapters on a small language model, in plain torch, on a CPU.

Torch lives in this room and nowhere else (extra ``slmops[train]``). Nothing here is needed on a device or to
build a release from a committed adapter: ``build`` merges adapters with numpy alone (the arithmetic is in
``train.adapter``).

Read in this order: ``tokenizer`` (text to ids as the engine does it), ``llama`` (the model, straight from a
GGUF), ``lora`` (what is trained), ``packing`` (examples to rows), ``adapter`` (the GGUF adapter file),
``finetune`` (the loop).

Recovery of cut models: ``students`` (weights that learn, and the file), ``reconstruct`` (block by block), ``distil``
(predictions), ``steps`` (what a build's graph names; imports no torch by itself).
"""

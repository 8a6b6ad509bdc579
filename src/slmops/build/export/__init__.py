"""Exports: the unquantised reference as a file of another runtime, made by that runtime's own exporter.

Exporters come with version needs of their own, torch among them, so each runs in a pinned environment (``toolchains/``) as a
subprocess that is told what to do by a JSON file and answers in JSON lines. Owns: which runtimes and precisions can be
exported and with which options (:mod:`~slmops.build.export.formats`), the environments
(:mod:`~slmops.build.export.toolchain`), the protocol (:mod:`~slmops.build.export.tool_process`). Does not own: whether an
export is the same model (:mod:`slmops.build.parity`), nor serving it (:mod:`slmops.runtimes`).

``tools/`` holds the scripts that a toolchain's interpreter runs. They import nothing of slmops but each other.
"""

"""Parity: whether an exported file is the model that it was made from, asked of the engine that will run it.

Owns: the 1,000 strings (:mod:`~slmops.build.parity.texts`), the comparisons with the cause of a difference where it is known
(:mod:`~slmops.build.parity.checks`), and the step that puts both sides beside each other
(:mod:`~slmops.build.parity.gate`). An exporter's exit code proves nothing: an export that does not load, tokenises unlike its
source, begins a prompt twice or answers otherwise fails the build, and no variant is made of it.
"""

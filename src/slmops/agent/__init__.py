"""The device side: keeps one device serving what it proved, and takes it to what it is assigned.

Newcomers read: ``main`` (what is wired to what) -> ``loop/driver`` (persist, then act) -> ``loop/actions`` (what each
command does) -> ``gateway/app`` (what applications see).
"""

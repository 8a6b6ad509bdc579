"""Shipped fakes: a scripted engine, a scripted control plane, signed releases, a real agent process. For tests and benches."""

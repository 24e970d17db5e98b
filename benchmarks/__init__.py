"""Measurements on devices that this project's tests do not have: ``benchmarks/gpu`` and ``benchmarks/tpu``."""

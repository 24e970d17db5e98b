"""Measurements: what ``easydel-ragged bench`` and ``easydel-ragged tune`` run, and ``benchmarks/gpu`` with them."""

"""``python -m benchmarks.gpu``: ragged page attention on a GPU."""

"""``python -m benchmarks.tpu``: ragged page attention on a TPU, and the schedules of its kernels without one."""

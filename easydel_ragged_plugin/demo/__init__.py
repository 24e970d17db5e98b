"""A real model served by EasyDeL's engine: what ``easydel-ragged demo``, the benchmark's engine case and tests run."""

"""``python -m easydel_ragged_plugin``."""

from __future__ import annotations

from easydel_ragged_plugin.cli import main

if __name__ == "__main__":
    main()

"""Build-time only: reads ``entry_points.toml`` into the distribution's metadata (a hatchling metadata hook)."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class EntryPointsHook(MetadataHookInterface):
    """Fills the dynamic fields ``scripts`` and ``entry-points``."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        groups = tomllib.loads(Path(self.root, "entry_points", "entry_points.toml").read_text(encoding="utf-8"))
        metadata["scripts"] = groups.pop("console_scripts")
        metadata["entry-points"] = groups

"""Attention of other projects on a CPU, which ``easydel-ragged bench --peer NAME`` measures beside this package's."""

from __future__ import annotations

from .base import Form, Peer
from .sdpa import Sdpa
from .vllm import Vllm

__all__ = ["PEERS", "Form", "Peer"]

PEERS: dict[str, Peer] = {peer.name: peer for peer in (Sdpa(), Vllm())}
"""By name, in the order of reports."""

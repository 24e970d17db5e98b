"""Sizes of the kernels' tiles: where they come from, and whether a card has room for them.

The tables below are derived, not measured: no figure in them has been tuned on a GPU yet. ``easydel-ragged tune``
measures candidates on a machine's own card and keeps the winners in the user's cache directory. What they are
derived from:

* A program of the decode kernel reads ``keys`` tokens of one kv head in a step, and copies of ``stages - 1`` steps
  are on their way. Triton starts the copy that takes a buffer's place after the last product that reads the buffer:
  with two stages a program waits for each step, with three it computes one while another comes. By Little's law a
  chip needs about bandwidth x latency in flight: 3.35 TB/s x 0.7 us = 2.3 MB on an H100, 18 KB for each of its 132
  multiprocessors. 64 tokens of head_dim 128 in bfloat16 are 32 KB of keys and values, so one step suffices, and three
  programs of three stages fit beside one another. Other cards have less bandwidth for a multiprocessor, and less
  shared memory: smaller steps.
* Its products have few queries: the query heads of a group. 16 is the least that a tensor core multiplies.
* A part of a split context is 256 tokens at least: its partial result is float32, and must be small beside the keys
  and values that it stands for.
* The prefill kernel is bound by arithmetic. 128 queries are two warpgroups of 64, which is what Hopper's products
  want; the accumulator of 128 x 128 float32 over 8 warps takes 64 of the 255 registers of a thread, the logits of
  128 x 64 another 32. At head_dim 256 that would be 128 and 32, so the queries are halved. One such program fills the
  registers of a multiprocessor, so it needs three stages: no other one computes while it waits.
* float32 is multiplied without tensor cores. A thread keeps whole queries and keys for that: small tiles, and many
  warps.

``tests/test_gpu_compile.py`` compiles them for cards of each kind, where NVIDIA's compilers are installed, and holds
them against what the compilers made of them: shared memory as :meth:`Tile.shared_bytes` says, and no register spilled
to memory.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from easydel_ragged_plugin import entries
from easydel_ragged_plugin.config import RaggedPageConfig, cache_dir
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.types import AttentionRequest

__all__ = [
    "CARDS",
    "Card",
    "Tile",
    "Tiles",
    "card",
    "choose",
    "power_of_two",
    "too_large",
    "tuned_file",
    "tuned_here",
    "tuned_key",
]

KIB = 1024
LEAST_SIDE = 16
"""Queries, keys and lanes below which a tensor core has no product."""
MOST_QUERIES = 128
MOST_KEYS = 256
MOST_WARPS = 16
LEAST_WARPGROUP_QUERIES = 64
"""Queries from which on Hopper and Blackwell multiply in groups of four warps, with operands in shared memory."""

MOST_REGISTERS = {"shared": 160, "registers": 144, "float32": 16}
"""Of the 255 that a thread can have, for the accumulator and the logits, by where the products take their operands
from. Those and addresses take the others; for float32 a thread has whole queries and keys."""

SCRATCH_BYTES = 1 * KIB
"""For reductions between warps, and barriers."""

PROGRAMS_PER_MULTIPROCESSOR = 4
"""Programs of the decode kernel that a batch is split into at least: two fit at a time, and the second wave evens
out what the first one's parts differ by."""


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card has, for each multiprocessor. ``shared_bytes`` is what one program may use."""

    multiprocessors: int
    shared_bytes: int
    capability: tuple[int, int] | None = None


CARDS = {
    "H100": Card(132, 227 * KIB, (9, 0)),
    "H200": Card(132, 227 * KIB, (9, 0)),
    "B200": Card(148, 227 * KIB, (10, 0)),
    "A100": Card(108, 163 * KIB, (8, 0)),
    "L4": Card(58, 99 * KIB, (8, 9)),
    "MI300": Card(304, 64 * KIB),
}
"""By a part of the device's name, for what the device does not tell itself. NVIDIA: CUDA C++ Programming Guide,
"Technical Specifications per Compute Capability"; AMD: the 64 KiB of LDS of a compute unit."""

ANY_CARD = Card(108, 99 * KIB)
"""What every card of compute capability 8.0 and above has: consumer cards have the least shared memory."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Static sizes of one kernel.

    Attributes:
        queries: tokens times the query heads of a group, in one tile.
        keys: tokens of the cache that one step reads.
        warps: groups of 32 threads of a program.
        stages: steps that are in flight, the one being computed included.
    """

    queries: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name in ("queries", "keys", "warps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"{name}: got {value!r}, wanted a power of two.")
        if self.queries < LEAST_SIDE or self.keys < LEAST_SIDE:
            raise ValueError(
                f"queries and keys: got {self.queries} and {self.keys}, wanted at least {LEAST_SIDE} of each."
            )
        if not isinstance(self.stages, int) or self.stages < 1:
            raise ValueError(f"stages: got {self.stages!r}, wanted an int of at least 1.")

    @property
    def num_stages(self) -> int:
        """Triton's word for ``stages``. Keys and values are found through a page id, which is loaded, too, and Triton
        shares its stages out among the loads of such a chain: each further step in flight takes two of them. (The
        compiled kernels have ``stages - 1`` buffers for keys and values; at 2 and 4 they would have those of 3.)"""
        return 2 * self.stages - 1

    def operands_from(self, request: AttentionRequest, found: Card) -> str:
        """Where the products take their operands from, a key of :data:`MOST_REGISTERS`."""
        if request.compute_dtype.itemsize > 2:
            return "float32"
        groups = self.queries >= LEAST_WARPGROUP_QUERIES and (found.capability is None or found.capability >= (9, 0))
        return "shared" if groups else "registers"

    def shared_bytes(self, request: AttentionRequest, found: Card) -> int:
        """Shared memory of one program, an upper bound that the compiled kernels come close to.

        Steps on their way, each with its page ids; the step that is computed, where it does not lie there already in
        the form that the products take; the queries; and the weights on their way from the first product's layout to
        the second's. When all is computed, the float32 result lies there for its way to the output.
        """
        lanes, operand = power_of_two(request.head_dim), request.compute_dtype.itemsize
        coming = (self.stages - 1) * self.keys * (2 * lanes * request.cache_dtype.itemsize + 4)
        computed = 2 * self.keys * lanes * operand
        apart = self.operands_from(request, found) == "shared" or is_converted_to_float32(request)
        steps = coming + computed if apart else max(coming, computed)
        return max(steps + self.queries * (lanes + self.keys) * operand, 4 * self.queries * lanes) + SCRATCH_BYTES

    def registers(self, request: AttentionRequest) -> int:
        """Registers of a thread that hold the accumulator and the logits, in float32."""
        return self.queries * (power_of_two(request.head_dim) + self.keys) // (32 * self.warps)

    def fits(self, request: AttentionRequest, found: Card) -> bool:
        """Whether a card has the shared memory and a thread the registers."""
        most = MOST_REGISTERS[self.operands_from(request, found)]
        return self.shared_bytes(request, found) <= found.shared_bytes and self.registers(request) <= most


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of all kernels for one kind of request.

    Attributes:
        decode, prefill: of the two attention kernels.
        programs: programs that the decode kernel is split into, about.
        split_tokens: tokens in a part of a split context, at least.
        update_tokens: tokens that one program writes.
    """

    decode: Tile
    prefill: Tile
    programs: int
    split_tokens: int = 256
    update_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("programs", "split_tokens", "update_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted an int of at least 1.")
        if self.update_tokens & (self.update_tokens - 1):
            raise ValueError(f"update_tokens: got {self.update_tokens}, wanted a power of two.")

    def decoded_tokens(self, request: AttentionRequest) -> int:
        """Most new tokens of a row that is decoded: those whose queries fill one tile. Longer rows are prefilled."""
        return self.decode.queries // request.group_size

    @property
    def least_blocks(self) -> int:
        """Fewest blocks of keys in a part of a split context."""
        return max(1, self.split_tokens // self.decode.keys)


def is_converted_to_float32(request: AttentionRequest) -> bool:
    """Whether pages of a smaller dtype are converted before float32 products."""
    return request.compute_dtype.itemsize > 2 and request.cache_dtype != request.compute_dtype


def power_of_two(value: int) -> int:
    """The least power of two that is no less than ``value``, and at least 16."""
    return max(LEAST_SIDE, 1 << (value - 1).bit_length())


# Keyed by the lanes of a head (head_dim rounded up to a power of two), then by whether operands are float32.
_LARGE = {
    (64, False): (Tile(16, 128, 4, 3), Tile(128, 64, 8, 3)),
    (128, False): (Tile(16, 64, 4, 3), Tile(128, 64, 8, 3)),
    (256, False): (Tile(16, 32, 4, 3), Tile(64, 64, 8, 2)),
    (64, True): (Tile(16, 32, 4, 2), Tile(32, 32, 8, 2)),
    (128, True): (Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
    (256, True): (Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
}
_OTHERS = {
    **_LARGE,
    (64, False): (Tile(16, 64, 4, 3), Tile(64, 64, 4, 3)),
    (128, False): (Tile(16, 32, 4, 3), Tile(64, 32, 4, 3)),
    (256, False): (Tile(16, 32, 4, 2), Tile(64, 32, 8, 2)),
}
LARGE_BYTES = 227 * KIB
"""Cards with this much shared memory take the first table: Hopper's, and Blackwell's for data centers."""


@functools.cache
def card() -> tuple[str, Card]:
    """(name, card) of this process's GPU; an empty name where JAX's default backend is none."""
    return card_of(jax.local_devices()[0]) if jax.default_backend() == "gpu" else ("", ANY_CARD)


def card_of(device: Any) -> tuple[str, Card]:
    """(name, card) of a JAX device: what it says of itself, then what is known by its name."""
    known = next((found for name, found in CARDS.items() if name in device.device_kind), ANY_CARD)
    major, _, minor = str(getattr(device, "compute_capability", None)).partition(".")
    # ROCm gives a name such as gfx942 there.
    capability = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    multiprocessors = getattr(device, "core_count", None) or known.multiprocessors
    shared_bytes = getattr(device, "shared_memory_per_block_optin", None) or known.shared_bytes
    return device.device_kind, Card(multiprocessors, shared_bytes, capability)


def default_tiles(request: AttentionRequest, found: Card) -> Tiles:
    """The table's tiles, made to fit: at least one token's queries, and everything in the card's shared memory."""
    table = _LARGE if found.shared_bytes >= LARGE_BYTES else _OTHERS
    lanes = max(64, power_of_two(request.head_dim))
    decode, prefill = table[lanes, request.compute_dtype.itemsize > 2]
    group = power_of_two(request.group_size)
    decode, prefill = (dataclasses.replace(tile, queries=max(tile.queries, group)) for tile in (decode, prefill))
    decode, prefill = (_fit(tile, request, found) for tile in (decode, prefill))
    return Tiles(decode, prefill, found.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR)


def _fit(tile: Tile, request: AttentionRequest, found: Card) -> Tile:
    """The tile with more warps until a thread has the registers; with fewer stages, then keys, then queries until the
    card has the shared memory. The smallest one may still not fit: see :func:`too_large`."""
    if is_converted_to_float32(request):
        # What is on its way would be converted in registers that the products need.
        tile = dataclasses.replace(tile, stages=1)
    elif request.cache_dtype.itemsize > request.compute_dtype.itemsize:
        # As many bytes in a step as the table means.
        tile = dataclasses.replace(tile, keys=max(LEAST_SIDE, tile.keys // 2))
    while tile.registers(request) > MOST_REGISTERS[tile.operands_from(request, found)] and tile.warps < MOST_WARPS:
        tile = dataclasses.replace(tile, warps=2 * tile.warps)
    while tile.shared_bytes(request, found) > found.shared_bytes:
        if tile.stages > 1:
            tile = dataclasses.replace(tile, stages=tile.stages - 1)
        elif tile.keys > LEAST_SIDE:
            tile = dataclasses.replace(tile, keys=tile.keys // 2)
        elif tile.queries > power_of_two(request.group_size):
            tile = dataclasses.replace(tile, queries=tile.queries // 2)
        else:
            break
    return tile


def too_large(request: AttentionRequest) -> str | None:
    """Why even the smallest tiles do not fit this card, or None."""
    _, found = card()
    sizes = default_tiles(request, found)
    needed = max(tile.shared_bytes(request, found) for tile in (sizes.decode, sizes.prefill))
    if needed <= found.shared_bytes:
        return None
    return (
        f"head_dim {request.head_dim} with {request.group_size} query heads for a kv head in "
        f"{request.compute_dtype.name} takes {needed // KIB} KiB of shared memory, this card has "
        f"{found.shared_bytes // KIB}"
    )


def choose(request: AttentionRequest, config: RaggedPageConfig) -> Tiles:
    """Tiles for a request: the config's fields, then its ``kernel_config``, what was tuned on this card, the table.

    Raises:
        Unsupported: sizes of the config do not fit the card, or hold less than the queries of one token.
    """
    name, found = card()
    tuned = read_tuned().get(tuned_key(name, request)) if name else None
    tiles: Tiles = config.kernel_config or tuned or default_tiles(request, found)
    changes: dict[str, Any] = {}
    if config.num_kv_pages_per_block is not None:
        wanted = power_of_two(config.num_kv_pages_per_block * request.page_size)
        changes["keys"] = min(wanted, MOST_KEYS)
    if config.num_warps is not None:
        changes["warps"] = 1 << (config.num_warps - 1).bit_length()
    if config.num_stages is not None:
        changes["stages"] = config.num_stages
    decode, prefill = (dataclasses.replace(tile, **changes) for tile in (tiles.decode, tiles.prefill))
    if config.num_queries_per_block is not None:
        wanted = power_of_two(config.num_queries_per_block * request.group_size)
        prefill = dataclasses.replace(prefill, queries=max(min(wanted, MOST_QUERIES), power_of_two(request.group_size)))
    for kernel, tile in (("decode", decode), ("prefill", prefill)):
        if tile.queries < request.group_size:
            raise Unsupported(
                f"pallas_gpu: {kernel} tiles of {tile.queries} queries do not hold the {request.group_size} query "
                "heads of a kv head. Raise queries of the Tiles in kernel_config, or leave them to the kernel."
            )
        needed = tile.shared_bytes(request, found)
        if needed > found.shared_bytes:
            raise Unsupported(
                f"pallas_gpu: {kernel} tiles of {tile.queries} queries, {tile.keys} keys and {tile.stages} stages take "
                f"{needed // KIB} KiB of shared memory, {name or 'this card'} has {found.shared_bytes // KIB}. Lower "
                "num_kv_pages_per_block, num_queries_per_block or num_stages, or leave them to the kernel."
            )
    return dataclasses.replace(tiles, decode=decode, prefill=prefill)


# Tuned tiles. `easydel-ragged tune` writes them; nothing is ever measured by a call.

FORMAT = 2
"""Raised whenever the fields of :class:`Tiles` or :class:`Tile` change."""


def tuned_file() -> Path:
    """Where tuned tiles are kept."""
    return cache_dir() / "pallas_gpu.json"


def tuned_key(name: str, request: AttentionRequest) -> str:
    """What a tuned entry holds for: the card and those parts of a request that decide how a tile runs."""
    parts = (
        name,
        f"head_dim={request.head_dim}",
        f"group={request.group_size}",
        f"page_size={request.page_size}",
        f"queries={request.query_dtype.name}",
        f"compute={request.compute_dtype.name}",
        f"cache={request.cache_dtype.name}",
    )
    return " ".join(parts)


def tuned_here() -> dict[str, Tiles]:
    """Those of :func:`read_tuned` that hold for this process's GPU; empty where there is none."""
    name, _ = card()
    # A card's name may begin with another one's.
    return {key: tiles for key, tiles in read_tuned().items() if name and key.startswith(f"{name} head_dim=")}


@functools.cache
def read_tuned() -> dict[str, Tiles]:
    """Tuned tiles by key, read once in a process. A file that can't be used is named in a warning, and ignored."""
    return entries.read(tuned_file(), FORMAT, "tuned tiles", lambda entry: tiles_from_json(entry["tiles"]))


def tiles_from_json(fields: dict[str, Any]) -> Tiles:
    """What ``dataclasses.asdict`` and JSON made of tiles."""
    return Tiles(**{**fields, "decode": Tile(**fields["decode"]), "prefill": Tile(**fields["prefill"])})

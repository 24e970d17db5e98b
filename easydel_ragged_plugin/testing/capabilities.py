"""What an operation declares."""

from __future__ import annotations

import dataclasses

from .batches import Case, Version

__all__ = ["PASSED_OPTIONS", "Capabilities"]

PASSED_OPTIONS = frozenset({"softmax_scale", "sliding_window", "logits_soft_cap"})
"""Options that the host passes to an operation."""


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What an operation declares. Tests of the rest are skipped, with the reason.

    The defaults declare everything that the host may request. An operation that can do less sets the fields.

    Attributes:
        version: the operation that it is, for one whose name is neither ``ragged_page_attention_v2`` nor
            ``ragged_page_attention_v3``. None: the name says it.
        head_dims: head sizes; None for any.
        page_sizes: tokens in a page; None for any.
        dtypes: of queries, keys and values.
        cache_dtypes: of the pages.
        mixed_dtypes: whether the cache's dtype may differ from that of the new keys.
        options: names of the :class:`~easydel_ragged_plugin.options.Options` that it honors, taken as keywords.
        window_pairs: ``sliding_window=(left, right)``.
        sinks: shapes of ``softmax_aux`` taken: "heads" ``[q_heads]``, "groups" ``[kv_heads, n]``.
        any_row_order: rows may come in any order; otherwise rows with one new token come first.
        nan_in_dead_slots: dead slots may hold NaN. Otherwise they hold large finite numbers.
        garbage_table_entries: unused table entries may name pages that do not exist.
        compute_dtype_none_keeps_precision: ``compute_dtype=None`` computes in the precision of the queries.
            Otherwise the kit passes the dtype of the queries, except in the test of this field.
        invalid_rows: malformed rows give zeros and write nothing.
        strict_arguments: a keyword that the host does not pass is refused.
        forwarding_view: takes a view that only forwards ``kv_pages`` and ``metadata``.
        forward_methods: methods that can be called directly on the machine that runs the tests.
        updates_in_place: v3 puts the new pages into the view that it was called with.
    """

    version: Version | None = None
    head_dims: frozenset[int] | None = None
    page_sizes: frozenset[int] | None = None
    dtypes: frozenset[str] = frozenset(("float32", "bfloat16", "float16"))
    cache_dtypes: frozenset[str] = frozenset(("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"))
    mixed_dtypes: bool = True
    options: frozenset[str] = PASSED_OPTIONS
    window_pairs: bool = True
    sinks: frozenset[str] = frozenset(("heads", "groups"))
    any_row_order: bool = True
    nan_in_dead_slots: bool = True
    garbage_table_entries: bool = True
    compute_dtype_none_keeps_precision: bool = True
    invalid_rows: bool = True
    strict_arguments: bool = True
    forwarding_view: bool = True
    forward_methods: tuple[str, ...] = ("native", "cpu", "gpu", "cuda", "rocm", "tpu")

    def lacks(self, case: Case) -> str | None:
        """What ``case`` needs and this operation does not declare, or None."""
        cache_dtype = case.np_cache_dtype.name
        undeclared = sorted(case.options.given(hints=False).keys() - self.options)
        checks = (
            (self.head_dims is not None and case.head_dim not in self.head_dims, f"head_dim {case.head_dim}"),
            (self.page_sizes is not None and case.page_size not in self.page_sizes, f"page_size {case.page_size}"),
            (case.dtype not in self.dtypes, f"dtype {case.dtype}"),
            (cache_dtype not in self.cache_dtypes, f"cache dtype {cache_dtype}"),
            (not self.mixed_dtypes and cache_dtype != case.dtype, f"{case.dtype} on a {cache_dtype} cache"),
            (bool(undeclared), ", ".join(undeclared)),
            (not self.window_pairs and isinstance(case.options.sliding_window, tuple), "sliding_window as a pair"),
            (case.sinks is not None and case.sinks not in self.sinks, f"sinks of the form {case.sinks!r}"),
            (not self.any_row_order and not case.decode_first, "rows in any order"),
            (not self.garbage_table_entries and case.table == "garbage", "garbage in unused table entries"),
        )
        return next((feature for missing, feature in checks if missing), None)

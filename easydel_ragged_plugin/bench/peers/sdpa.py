"""PyTorch's ``scaled_dot_product_attention``, in its best form for the case.

It knows no pages. So keys and values lie gathered, contiguous for each row, and gathering them is not counted, which
favors it; with a sliding window only the keys that a query sees are there. Neighboring rows that are alike are one
batch. What is counted: the new tokens are copied to their places, and each batch is one call. Grouped query heads can
be passed in several ways, and all are tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from easydel_ragged_plugin.bench.problem import Problem
from easydel_ragged_plugin.types import Features

from .base import Form, Peer
from .tensors import facts_of, missing_torch, tensor, torch_of_bench

__all__ = ["Sdpa"]

WAYS = {
    "gqa": "enable_gqa",
    "heads": "a batch for each kv head",
    "folded": "query heads of a kv head as its query tokens",
}


class _Rows:
    """Neighboring rows alike: their tensors, and the ways to attend.

    Args:
        problem: what is called.
        first, count: which rows.
    """

    def __init__(self, problem: Problem, first: int, count: int) -> None:
        case = problem.case
        row = case.rows[first]
        self.new, self._problem, self._rows = row.new, problem, range(first, first + count)
        # Keys left of all windows are not there.
        self._hidden = max(0, row.context - row.new + 1 - (case.window or row.context))
        self.keys, self.values = (tensor(each) for each in self._gathered(np.asarray(problem.operands.pages)))
        start = int(problem.operands.query_start_loc[first])
        self.tokens = slice(start, start + count * row.new)
        shape = (count, row.new, case.kv_heads, case.q_heads // case.kv_heads, case.head_dim)
        self._queries = tensor(problem.operands.queries[self.tokens]).view(shape)
        self._places = []
        for cache, new in ((self.keys, problem.operands.keys), (self.values, problem.operands.values)):
            if new is not None:
                fresh = tensor(new[self.tokens]).view(count, row.new, case.kv_heads, case.head_dim)
                self._places.append((cache[:, :, -row.new :], fresh.transpose(1, 2)))

    def _gathered(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values, ``[rows, kv_heads, keys, head_dim]``."""
        rows = [self._problem.gather(row, pages) for row in self._rows]
        keys, values = (np.stack(each)[:, self._hidden :].swapaxes(1, 2) for each in zip(*rows, strict=True))
        return keys, values

    def has_written(self, pages: np.ndarray) -> bool:
        """Whether keys and values are those of ``pages``."""
        mine, wanted = (self.keys, self.values), self._gathered(pages)
        return all(bool((each == tensor(array)).all()) for each, array in zip(mine, wanted, strict=True))

    def write(self) -> None:
        """Copy the new tokens to their places."""
        for place, fresh in self._places:
            place.copy_(fresh)

    def ways(self) -> list[str]:
        """Keys of :data:`WAYS` that differ here."""
        if self._queries.shape[3] == 1:
            return ["gqa"]
        # Folded queries of a whole prompt would need a mask that is larger than keys and values.
        return [way for way in WAYS if way != "folded" or self.new < self.keys.shape[2]]

    def _mask(self, repeated: int) -> dict[str, Any]:
        """How to tell which keys the queries see, each query ``repeated`` times."""
        keys = self.keys.shape[2]
        window = self._problem.case.window
        if self.new == 1:
            return {}  # all
        if self.new == keys and window is None:
            return {"is_causal": True}
        query = np.arange(keys - self.new, keys)[:, None]
        seen = (np.arange(keys) <= query) & (np.arange(keys) > query - (window or math.inf))
        mask = np.repeat(np.where(seen, 0.0, -math.inf).astype(np.float32), repeated, axis=0)
        return {"attn_mask": tensor(mask).to(self.keys.dtype)}

    def attend(self, way: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        """The call, and what makes ``[tokens, q_heads, head_dim]`` of its result."""
        import torch

        count, new, kv_heads, group, dim = self._queries.shape
        keys, values = self.keys, self.values
        how = {"scale": self._problem.case.softmax_scale, **self._mask(group if way == "folded" else 1)}
        if way == "heads":
            # Strides of 0, no copies.
            keys, values = (each.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for each in (keys, values))
        elif way == "gqa" and group > 1:
            how["enable_gqa"] = True
        arranged = {
            "gqa": lambda: self._queries.flatten(2, 3).transpose(1, 2),
            "heads": lambda: self._queries.permute(0, 2, 3, 1, 4).flatten(0, 1),
            "folded": lambda: self._queries.transpose(1, 2).flatten(2, 3),
        }[way]
        restored = {
            "gqa": lambda result: result.transpose(1, 2),
            "heads": lambda result: result.unflatten(0, (count, kv_heads)).permute(0, 3, 1, 2, 4),
            "folded": lambda result: result.unflatten(2, (new, group)).transpose(1, 2),
        }[way]
        function = torch.nn.functional.scaled_dot_product_attention
        return (
            lambda: function(arranged(), keys, values, **how),
            lambda result: restored(result).reshape(count * new, kv_heads * group, dim),
        )


class _SdpaForm(Form):
    """One way for rows of one new token, one for the others.

    Args:
        rows: all rows of the problem.
        ways: a key of :data:`WAYS` for each of ``rows``.
    """

    def __init__(self, problem: Problem, rows: Sequence[_Rows], ways: Sequence[str]) -> None:
        import torch

        self._inference = torch.inference_mode
        self._problem, self._rows = problem, rows
        self._calls = [each.attend(way) for each, way in zip(rows, ways, strict=True)]
        self._results: list[Any] = []
        count = len(rows)
        self.text = (
            f"{count} call{'s' * (count != 1)} ({', '.join(WAYS[way] for way in dict.fromkeys(ways))}); keys and "
            "values lie gathered for each row, gathering is not counted"
        )

    def run(self, calls: int) -> None:
        with self._inference():
            for _ in range(calls):
                for each in self._rows:
                    each.write()
                self._results = [attend() for attend, _ in self._calls]

    def answer(self) -> np.ndarray:
        case = self._problem.case
        answers = np.zeros((case.num_tokens, case.q_heads, case.head_dim), np.float32)
        for each, result, (_, restored) in zip(self._rows, self._results, self._calls, strict=True):
            answers[each.tokens] = restored(result).float().numpy()
        return answers

    def has_written(self) -> bool:
        pages = self._problem.updated_pages()
        return all(each.has_written(pages) for each in self._rows)


class Sdpa(Peer):
    """``torch.nn.functional.scaled_dot_product_attention``."""

    name = "sdpa"
    label = "PyTorch SDPA"
    color = "#a63d57"
    features = Features(options=frozenset({"softmax_scale", "sliding_window"}))
    dtypes = ("float32", "bfloat16", "float16")

    def unavailable(self) -> str | None:
        return missing_torch()

    def facts(self) -> dict[str, Any]:
        return facts_of(self.unavailable(), "torch")

    def forms(self, problem: Problem) -> list[Form]:
        torch_of_bench()
        rows, first = [], 0
        for _, alike in itertools.groupby(problem.case.rows):
            count = len(list(alike))
            if problem.case.rows[first].new:
                rows.append(_Rows(problem, first, count))
            first += count
        # Rows of one new token go one way, and the others one, so that the combinations are few.
        kinds = {each.new == 1: each.ways() for each in rows}
        choices = [dict(zip(kinds, chosen, strict=True)) for chosen in itertools.product(*kinds.values())]
        return [_SdpaForm(problem, rows, [chosen[each.new == 1] for each in rows]) for chosen in choices]

"""The contract of operations on ``page_attention``: called as EasyDeL's attention layer calls it."""

from __future__ import annotations

import pytest

from easydel_ragged_plugin.testing import Capabilities, RaggedPageAttentionContract, case_named

pytest.importorskip("easydel")


class TestDenseAttention(RaggedPageAttentionContract):
    """What ``capabilities`` does not declare is skipped, with the reason. Without ``cases`` all of them run."""

    capabilities = Capabilities(version="v2", options=frozenset({"softmax_scale", "sliding_window"}), sinks=frozenset())
    cases = (case_named("mixed"), case_named("window-3"), case_named("soft-cap"))

    @pytest.fixture
    def operation(self):
        from dense_attention.operation import DenseAttention

        return DenseAttention

"""The contract of a ragged page attention operation, as one pytest class."""

from __future__ import annotations

from .capabilities import Capabilities
from .compare import assert_close
from .contract_calls import CallTests
from .contract_laws import LawTests

__all__ = ["Capabilities", "RaggedPageAttentionContract", "assert_close"]


class RaggedPageAttentionContract(LawTests, CallTests):
    """Inherit this class, name the operation, and pytest holds it to the host's contract::

        from easydel_ragged_plugin.testing import Capabilities, RaggedPageAttentionContract

        class TestMyAttention(RaggedPageAttentionContract):
            capabilities = Capabilities(window_pairs=False)
            known_failures = {"test_values[sinks]": "https://example.org/issues/7"}

            @pytest.fixture
            def operation(self):
                return MyAttention          # the OperationImpl class, not an instance

    Whether it is v2 or v3 follows from ``MyAttention.get_impl_name()``. The operation meets the host's own cache
    view and metadata with the arguments that the host's attention layer passes, on hostile batches (see
    ``batches``), and is compared with the float64 oracle (``reference``). Narrow it with:

    ``capabilities``
        what the operation does; the rest is skipped with the reason.
    ``known_failures``
        test name (``test_values[sinks]``, or ``test_values`` for all of them, or a case's name for all
        tests of that case) to a reason. A strict xfail: the test must fail, and says so once it passes.
    ``cases``
        the cases to run, :data:`~easydel_ragged_plugin.testing.cases.CASES` unless set.

    Needs pytest and hypothesis, and a supported EasyDeL.
    """

"""The contract of a ragged page attention operation, as one pytest class."""

from __future__ import annotations

from .capabilities import Capabilities
from .compare import assert_close
from .contract_calls import CallTests
from .contract_laws import LawTests

__all__ = ["Capabilities", "RaggedPageAttentionContract", "assert_close"]


class RaggedPageAttentionContract(LawTests, CallTests):
    """The contract of an operation. Inherit this class and define the fixture ``operation``::

        from easydel_ragged_plugin.testing import Capabilities, RaggedPageAttentionContract

        class TestMyAttention(RaggedPageAttentionContract):
            capabilities = Capabilities(window_pairs=False)
            known_failures = {"test_values[sinks]": "https://example.org/issues/7"}

            @pytest.fixture
            def operation(self):
                return MyAttention          # the OperationImpl class, not an instance

    ``MyAttention.get_impl_name()`` decides whether it is tested as v2 or as v3; an operation of another name declares
    it, with ``Capabilities(version="v2")``. The operation is called as the host's
    attention layer calls it: with the host's own cache view, metadata and arguments. The batches are hostile (see
    ``batches``), and results are compared with the float64 oracle (``reference``). Class attributes:

    ``capabilities``
        what the operation declares; tests of the rest are skipped with the reason.
    ``known_failures``
        test name (``test_values[sinks]``, or ``test_values`` for all of them, or a case's name for all
        tests of that case) to a reason. A strict xfail: the test must fail, and is reported once it passes.
    ``cases``
        the cases to run, :data:`~easydel_ragged_plugin.testing.cases.CASES` unless set.

    Needs pytest and hypothesis (the extra ``testing``), and a supported EasyDeL.
    """

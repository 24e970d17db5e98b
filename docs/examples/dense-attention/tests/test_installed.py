"""What an install of this package does: the kernel is offered, the operation is registered."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from easydel_ragged_plugin import explain, page_shape, ragged_page_attention_v2, status


def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def chosen(pages_per_row, **options):
    """The kernel for a decode of two requests over pages of 16 tokens."""
    pages = array(*page_shape("v2", 8, 16, 2, 64, jnp.float32), dtype=jnp.float32)
    index = (array(2), array(2, pages_per_row), array(3), array(1))
    return explain(ragged_page_attention_v2, array(2, 4, 64, dtype=jnp.float32), pages, *index, **options)


def test_the_kernel_comes_first():
    assert chosen(8).kernel == "dense"
    assert chosen(8, sliding_window=8).kernel == "dense"


def test_others_run_what_it_refuses():
    for selection, reason in (
        (chosen(8, logits_soft_cap=30.0), "takes no logits_soft_cap"),
        (chosen(1024), "takes block tables of up to 2048 tokens, got 16384"),
    ):
        assert selection.kernel != "dense"
        assert reason in [refusal.reason for refusal in selection.refusals if refusal.kernel == "dense"]


def test_easydel_has_the_operation():
    pytest.importorskip("easydel")
    try:
        from easydel.operations import OperationRegistry
    except ModuleNotFoundError:  # EasyDeL 0.2.0.2
        from easydel.layers.operations import OperationRegistry

    assert OperationRegistry.get("page_attention").__module__ == "dense_attention.operation"
    assert "page_attention: dense_attention.operation:DenseAttention from dense-attention" in str(status())

"""What the host's call leaves out, or says in a mask alone, and the model's configuration tells.

An operation's metadata holds the configuration of its model (``metadata.base_config``). It is read for what a model
clearly means and EasyDeL does not pass: the soft cap of Gemma 2, the chunks of Llama 4. What the call passes is never
replaced.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from .errors import Unsupported

__all__ = ["chunk_size", "refuse_mask", "soft_cap"]

logger = logging.getLogger("easydel_ragged_plugin")

_CHUNKED = ("chunked_attention", "chunk_attention")
"""What the host calls a chunked layer in ``layer_types``."""


@functools.cache
def _say_once(text: str) -> None:
    logger.info("%s", text)


def _number(config: Any, name: str) -> Any:
    """The field ``name`` of a model's configuration where it is a number above 0; None where it says nothing clear."""
    value = getattr(config, name, None)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def soft_cap(config: Any) -> float | None:
    """The soft cap of a model's logits, ``attn_logit_softcapping``; None where its configuration has none."""
    value = _number(config, "attn_logit_softcapping")
    if value is None:
        return None
    _say_once(
        f"logits_soft_cap={float(value):g}: EasyDeL does not pass it, so it was taken from attn_logit_softcapping of "
        f"the model's config ({type(config).__name__}). RaggedPageConfig(logits_soft_cap=...) sets another."
    )
    return float(value)


def refuse_mask(operation: str, causal: Any, mask_info: Any, sliding_window: Any) -> None:
    """Refuse a mask that paged attention would not follow. It is causal, and it never reads ``mask_info``'s arrays.

    ``mask_info`` has flags for what its arrays hold. With ``causal=False`` the host means that the mask alone says what
    is seen: that is taken where a flag says that the mask is causal, too.

    Raises:
        Unsupported: the call is not causal, tokens see later ones, or a window's size is in the arrays alone.
    """
    if getattr(mask_info, "token_type_ids_baked_in", False):
        raise Unsupported(
            f"{operation}: mask_info with token_type_ids, by which tokens of an image see later ones. Paged attention "
            "is causal; use an attn_mechanism without pages, such as 'sdpa', and model.generate()."
        )
    is_causal = any(getattr(mask_info, f"{kind}_mask_baked_in", False) for kind in ("causal", "chunked"))
    if causal is not None and not causal and not is_causal:
        raise Unsupported(
            f"{operation}: causal=False, and no causal mask in mask_info. Paged attention is causal; an encoder, a "
            "prefix or a diffusion model needs an attn_mechanism without pages, such as 'sdpa'."
        )
    if getattr(mask_info, "sliding_window_baked_in", False) and sliding_window is None:
        raise Unsupported(
            f"{operation}: mask_info with a sliding window, whose size is not in the call. Pass sliding_window."
        )


def chunk_size(operation: str, mask_info: Any, config: Any, cache_view: Any) -> int | None:
    """The size of the chunks that ``mask_info`` holds, for the layer of ``cache_view``; None where there are none.

    The size is in the model's configuration, and so is the kind of each layer: Llama 4 has one mask for all layers, and
    those without rotary embeddings are not chunked.

    Raises:
        Unsupported: the mask holds chunks, and the size or the layer's kind can't be told.
    """
    if not getattr(mask_info, "chunked_mask_baked_in", False):
        return None
    size = _number(config, "attention_chunk_size")
    if size is None:
        raise Unsupported(
            f"{operation}: mask_info with chunks, and the model's config has no attention_chunk_size. Pass "
            "attention_chunk_size."
        )
    kinds = [kind in _CHUNKED for kind in getattr(config, "layer_types", None) or ()]
    if not kinds or all(kinds):
        return int(size)
    layer = getattr(cache_view, "layer_index", None)
    if not isinstance(layer, int) or not 0 <= layer < len(kinds):
        raise Unsupported(
            f"{operation}: mask_info with chunks for some of the {len(kinds)} layers, and cache_view has layer_index "
            f"{layer!r}. Pass attention_chunk_size."
        )
    return int(size) if kinds[layer] else None

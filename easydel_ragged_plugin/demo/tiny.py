"""A random Llama of two layers with a tokenizer of words, for engines whose answers are compared token by token.

It costs a second to write and milliseconds a step. Its text means nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["SPECIAL", "WORDS", "load_tokenizer", "save", "save_tokenizer"]

WORDS = 96
"""Size of the vocabulary: three special tokens, and the words ``w3`` to ``w95``."""

SPECIAL = ("<s>", "</s>", "<unk>")


def save(folder: Path, *, kv_heads: int = 2, positions: int = 128) -> str:
    """Write the model and its tokenizer to ``folder``; the same weights each time.

    Args:
        folder: is made where it is missing.
        kv_heads: key/value heads, for four query heads.
        positions: tokens of the longest context.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    config.rope_theta = 10000.0  # the host reads it here, transformers 5 writes it elsewhere
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)  # large enough that the answers depend on what attention reads
    network.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of :data:`WORDS` words to ``folder``: each word is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(SPECIAL)} | {f"w{n}": n for n in range(len(SPECIAL), WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos, eos, unknown = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos, unk_token=unknown
    )
    fast.save_pretrained(folder)


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of :func:`save`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)

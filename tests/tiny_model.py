"""A random Llama of two layers in a folder, with a tokenizer, for engines whose answers are compared token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = 96
SPECIAL = ("<s>", "</s>", "<unk>")
PROMPTS = ["w11 w12 w13 w14 w15", "w9 w8 w7", "w20 w21 w22 w23 w24 w25 w26 w27 w28 w29 w30", "w50"]


def save(folder: Path, *, kv_heads: int = 2) -> str:
    """Write the model and its tokenizer to ``folder``; the same weights each time."""
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
        max_position_embeddings=128,
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


def expected(folder: str, prompts: list[str], max_tokens: int) -> list[tuple[int, ...]]:
    """Greedy tokens of transformers in float32, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = network.generate(ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=1, eos_token_id=None)
        answers.append(tuple(int(token) for token in tokens[0, ids.shape[1] :]))
    return answers


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of :func:`save`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)

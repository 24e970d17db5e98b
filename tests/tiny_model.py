"""The tiny model of the package, prompts for it, and what transformers answers."""

from __future__ import annotations

from easydel_ragged_plugin.demo.tiny import SPECIAL, WORDS, load_tokenizer, save, save_tokenizer

__all__ = ["PROMPTS", "SPECIAL", "WORDS", "expected", "load_tokenizer", "save", "save_tokenizer"]

PROMPTS = ["w11 w12 w13 w14 w15", "w9 w8 w7", "w20 w21 w22 w23 w24 w25 w26 w27 w28 w29 w30", "w50"]


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

"""Tiny random models in a folder, and what transformers says about an answer: float32, one prompt at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tiny_model
from zoo.families import Family

PROMPT_LENGTHS = (3, 17, 25, 40, 60)
"""Tokens of the prompts: shorter and longer than the window, in one page and in four of 16."""

NEW_TOKENS = 12

TIE = 1e-3
"""Two logits that differ by less are a tie: another order of the sums may swap them."""


def prompts(lengths: Sequence[int] = PROMPT_LENGTHS, seed: int = 0) -> list[str]:
    """Random words, each one token."""
    chosen = random.Random(seed)
    first = len(tiny_model.SPECIAL)
    return [" ".join(f"w{chosen.randrange(first, tiny_model.WORDS)}" for _ in range(n)) for n in lengths]


def save(family: Family, folder: Path) -> Any:
    """Write the family's model, with its tokenizer, to ``folder``, and return the network; the same weights each time.

    The weights are exact in bfloat16 and in float16, because EasyDeL converts by way of float16.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.arguments())
    # The default attention of transformers leaves soft caps out.
    how = {"dtype": torch.float32, "attn_implementation": "eager"}
    network = transformers.AutoModelForCausalLM.from_config(config, **how).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            last = name.rpartition(".")[2]
            if any(part in name for part in family.zeroed):
                parameter.zero_()
            elif parameter.dim() > 1 and "conv" not in name:
                parameter.normal_(0.0, 0.2)  # large enough that the answers depend on what attention reads
            elif last in ("weight", "bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)  # norms of 1 and biases of 0 would hide mistakes
            elif last == "sinks":
                parameter.normal_()
            parameter.copy_(_exact(parameter))
    network.save_pretrained(folder)
    tiny_model.save_tokenizer(folder)
    _write_for_easydel(family, folder)
    return network


def _exact(values: Any) -> Any:
    """``values`` rounded to numbers that bfloat16 and float16 both have."""
    rounded = values.bfloat16().float()
    return rounded * (rounded.abs() >= 2.0**-14)  # float16 has fewer bits below


def _write_for_easydel(family: Family, folder: Path) -> None:
    """EasyDeL reads ``rope_theta`` at the top of the config; transformers 5 writes it under ``rope_parameters``."""
    path = folder / "config.json"
    written = json.loads(path.read_text())
    rotary = written.get("rope_parameters") or {}
    for each in (rotary, *(value for value in rotary.values() if isinstance(value, dict))):
        if "rope_theta" in each:
            written.setdefault("rope_theta", each["rope_theta"])
    path.write_text(json.dumps({**written, **family.for_easydel}, indent=2))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How the answers of an engine compare with transformers' greedy ones.

    Attributes:
        gaps: for each prompt and new token, the largest logit less that of the engine's token, after the engine's own
            tokens before it. All zero: the answers are transformers', token for token.
        lengths: tokens of the prompts.
    """

    gaps: tuple[tuple[float, ...], ...]
    lengths: tuple[int, ...]

    @property
    def worst(self) -> float:
        """The largest gap."""
        return max(max(each) for each in self.gaps)

    @property
    def first(self) -> tuple[int, int, float] | None:
        """Prompt, token and gap of the first difference; None without one."""
        for prompt, gaps in enumerate(self.gaps):
            for token, gap in enumerate(gaps):
                if gap > 0:
                    return prompt, token, gap
        return None

    @property
    def equal(self) -> bool:
        """No difference, or nothing but ties."""
        return self.worst < TIE

    def __str__(self) -> str:
        if self.first is None:
            return "equal"
        prompt, token, gap = self.first
        wrong = sum(max(each) >= TIE for each in self.gaps)
        where = f"first at token {token} of prompt {prompt} ({self.lengths[prompt]} tokens), gap {gap:.2g}"
        return f"equal but for ties; {where}" if self.equal else f"{wrong} of {len(self.gaps)} prompts differ; {where}"


def judge(network: Any, tokenizer: Any, texts: Sequence[str], answers: Sequence[Sequence[int]]) -> Verdict:
    """Compare with transformers: one forward pass, without a cache, for each prompt and its answer."""
    import torch

    gaps = []
    for text, answer in zip(texts, answers, strict=True):
        if len(answer) != NEW_TOKENS:
            raise ValueError(f"got {len(answer)} tokens for a prompt of {len(text.split())}, wanted {NEW_TOKENS}")
        prompt = tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = network(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        gaps.append(tuple((logits.max(1).values - chosen).tolist()))
    return Verdict(tuple(gaps), tuple(len(text.split()) for text in texts))


@contextlib.contextmanager
def rounded_rotary_tables(network: Any) -> Iterator[None]:
    """Round the cosines and sines of ``network`` to bfloat16, as EasyDeL does in all but a few families."""
    import torch

    def rounded(module: Any, arguments: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(each.bfloat16().to(each.dtype) for each in output)
        if output.is_complex():
            return torch.view_as_complex(torch.view_as_real(output).bfloat16().float())
        return output.bfloat16().to(output.dtype)

    hooks, tables = [], {}
    for module in network.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            hooks.append(module.register_forward_hook(rounded))
        table = getattr(module, "embed_positions", None)
        if isinstance(table, torch.Tensor):  # GPT-J
            tables[module] = table
            module.embed_positions = table.bfloat16().float()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, table in tables.items():
            module.embed_positions = table

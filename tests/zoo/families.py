"""The families of the zoo: the transformers config of a tiny model of each, and what differs from the usual in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

WINDOW = 20
"""Tokens that a layer with a sliding window sees; longer prompts have five pages of 16."""

USUAL: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
"""What every config gets unless its family says otherwise."""

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the matrix.

    Attributes:
        name: the row's name, and what ``--only`` takes.
        config: class of transformers.
        options: arguments of the config beside :data:`USUAL`; a value of ``...`` leaves the usual one out.
        for_easydel: fields of ``config.json`` that only EasyDeL reads.
        zeroed: parts of names; parameters that have one in their name are zero.
        remark: what a reader of the matrix must know about the row.
        fault: why the operations can't give transformers' tokens: what EasyDeL does wrong, or what they refuse. Without
            one, they must.
        faulty: versions of the operation that the fault is about.
    """

    name: str
    config: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    for_easydel: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    zeroed: tuple[str, ...] = ()
    remark: str = ""
    fault: str = ""
    faulty: tuple[str, ...] = ("v2", "v3")

    def arguments(self) -> dict[str, Any]:
        """Arguments of the config."""
        return {name: value for name, value in {**USUAL, **self.options}.items() if value is not ...}


def _llama(name: str, heads: int, kv_heads: int, head_dim: int) -> Family:
    options = {
        "hidden_size": 16 * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    return Family(name, "LlamaConfig", options)


SLIDING = {"sliding_window": WINDOW}
ALTERNATING = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
KV_HEADS = {"num_key_value_heads": 4}
KV_HEADS_REMARK = "`num_key_value_heads` written into `config.json`: without it EasyDeL makes a cache of one kv head"
PARTIAL = "`partial_rotary_factor` of 1: EasyDeL multiplies with a smaller one twice"
NEIGHBORS = "EasyDeL rotates the halves of a head, transformers its neighbors"
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DROPOUT = "dropout of 0 in its config: EasyDeL leaves it on"
OLD = {"num_key_value_heads": ..., "intermediate_size": ...}  # configs that have no such fields

FAMILIES = (
    _llama("Llama, head_dim 64", 4, 2, 64),
    _llama("Llama, head_dim 80, 3 kv heads", 6, 3, 80),
    _llama("Llama, head_dim 128, 1 kv head", 4, 1, 128),
    Family("Mistral", "MistralConfig", {**SLIDING, "head_dim": 32}),
    Family("Mixtral", "MixtralConfig", {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("Qwen2", "Qwen2Config", {**ALTERNATING, "use_sliding_window": True, "max_window_layers": 1}),
    Family(
        "Qwen2-MoE",
        "Qwen2MoeConfig",
        {**EXPERTS, "shared_expert_intermediate_size": 48, "use_sliding_window": False},
    ),
    Family("Qwen3", "Qwen3Config", {"head_dim": 64}),
    Family(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        {**EXPERTS, "head_dim": 32},
        {"num_experts": 4},
        remark="`num_experts` written into `config.json`, where transformers 5 calls it `num_local_experts`",
    ),
    Family(
        "Qwen3-Next",
        "Qwen3NextConfig",
        {
            **EXPERTS,
            "head_dim": 32,
            "shared_expert_intermediate_size": 48,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
        fault="the state of the linear layers is wrong in EasyDeL where requests share a batch",
    ),
    Family("Gemma", "GemmaConfig", {"head_dim": 64}),
    Family(
        "Gemma 2",
        "Gemma2Config",
        {**ALTERNATING, "head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 1.5},
        remark="`attn_logit_softcapping` of 1.5, so that the cap matters",
        fault="with v2, EasyDeL drops the cache view between layers",
        faulty=("v2",),
    ),
    Family("Gemma 3", "Gemma3TextConfig", {**ALTERNATING, "head_dim": 32, "query_pre_attn_scalar": 32}),
    Family(
        "Gemma 4",
        "Gemma4TextConfig",
        {
            **ALTERNATING,
            "head_dim": 32,
            "global_head_dim": 64,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 96,
        },
    ),
    Family(
        "Gemma 4, layers that share a cache",
        "Gemma4TextConfig",
        {
            **SLIDING,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "head_dim": 32,
            "global_head_dim": 64,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 96,
        },
    ),
    Family(
        "gpt-oss",
        "GptOssConfig",
        {
            **ALTERNATING,
            "head_dim": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
        zeroed=("experts.",),
        remark="experts of weight 0, because EasyDeL's mixture differs from transformers'; without YaRN, whose range "
        "EasyDeL rounds and transformers does not (`truncate`)",
    ),
    Family(
        "GPT-2", "GPT2Config", {**OLD, **NO_DROPOUT, "n_inner": 96}, KV_HEADS, remark=f"{KV_HEADS_REMARK}; {DROPOUT}"
    ),
    Family(
        "GPT-J",
        "GPTJConfig",
        {**OLD, **NO_DROPOUT, "n_inner": 96, "rotary_dim": 8},
        KV_HEADS,
        remark=f"{KV_HEADS_REMARK}; {DROPOUT}",
    ),
    Family("GPT-NeoX", "GPTNeoXConfig", {"num_key_value_heads": ...}, KV_HEADS, remark=KV_HEADS_REMARK),
    Family(
        "Falcon",
        "FalconConfig",
        {**OLD, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False, "bias": False},
    ),
    Family(
        "Falcon-H1",
        "FalconH1Config",
        {
            "head_dim": 32,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
        fault="the state of the Mamba layers is wrong in EasyDeL's engine",
    ),
    Family(
        "Cohere",
        "CohereConfig",
        {"logit_scale": 1.0, "tie_word_embeddings": True},
        remark=NEIGHBORS,
    ),
    Family("Cohere 2", "Cohere2Config", {**ALTERNATING, "logit_scale": 1.0, "tie_word_embeddings": True}),
    Family("OLMo", "OlmoConfig"),
    Family("OLMo 2", "Olmo2Config"),
    Family("OLMo 3", "Olmo3Config", ALTERNATING),
    Family("Phi", "PhiConfig", {"partial_rotary_factor": 1.0}, remark=PARTIAL),
    Family("Phi-3", "Phi3Config", SLIDING),
    Family("PhiMoE", "PhimoeConfig", {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("StableLM", "StableLmConfig", {"partial_rotary_factor": 1.0}, remark=PARTIAL),
    Family("SmolLM3", "SmolLM3Config", {"no_rope_layers": [1, 0]}),
    Family("GLM", "GlmConfig", {"head_dim": 32}, remark=NEIGHBORS),
    Family("GLM-4", "Glm4Config", {"head_dim": 32}, remark=NEIGHBORS),
    Family(
        "GLM-4-MoE",
        "Glm4MoeConfig",
        {
            "head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    Family("EXAONE 4", "Exaone4Config", {**ALTERNATING, "sliding_window_pattern": 2}),
    Family("Seed-OSS", "SeedOssConfig", {"head_dim": 32}),
    Family(
        "OPT",
        "OPTConfig",
        {**OLD, "ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
        KV_HEADS,
        remark=f"{KV_HEADS_REMARK}; {DROPOUT}",
    ),
    Family(
        "MPT",
        "MptConfig",
        {
            **OLD,
            "hidden_size": ...,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "expansion_ratio": 2,
        },
        KV_HEADS,
        fault="its positions are an ALiBi bias, which the operations refuse by name",
    ),
    Family(
        "Llama 4, text",
        "Llama4TextConfig",
        {
            "head_dim": 32,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 4,
            "attention_chunk_size": 24,
            "attn_temperature_tuning": False,
        },
        remark="four layers, because EasyDeL takes each fourth layer for one without positions, whatever "
        "`no_rope_layers` says",
    ),
)

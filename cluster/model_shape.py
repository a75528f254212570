"""What a model is made of, from its config.json alone: enough to count its weights and its KV. Pure, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigError

COUNTED = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""Architectures whose tensors are known here, by the name that config.json has for each, and by its model_type."""

_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_HYBRID_KEYS = (  # how Jamba, Bamba, Falcon-H1, Zamba, Nemotron-H, Granite 4, RecurrentGemma, Qwen3-Next ... say it
    "attn_layer_indices",
    "attn_layer_period",
    "attn_type_list",
    "block_types",
    "hybrid_override_pattern",
    "layers_block_type",
    "linear_num_value_heads",
    "mamba_d_state",
    "mamba_n_heads",
    "ssm_state_size",
    "state_size",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """All that the size of the KV cache depends on."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    num_layers: int  # that have experts; the others have the dense feed-forward
    num_experts: int
    inner_size: int  # of each
    shared_size: int = 0  # of the expert that every token goes through; 0: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    architecture: str
    attention: AttentionShape
    vocab_size: int
    hidden_size: int
    inner_size: int  # of the dense feed-forward
    max_position_embeddings: int
    tied: bool  # the embedding serves as head
    dtype: str  # of the checkpoint
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    head_norms: bool = False  # of each head of q and of k
    experts: Experts | None = None
    window: int | None = None  # how many tokens some or all layers look back


def read_shape(raw: Mapping[str, Any]) -> ModelShape:
    """Raises ConfigError, naming the architecture, for what is not counted here."""
    name, family = _family(raw)
    return ModelShape(
        architecture=name,
        attention=read_attention(raw),
        vocab_size=_int(raw, "vocab_size"),
        hidden_size=_int(raw, "hidden_size"),
        inner_size=_int(raw, "intermediate_size"),
        max_position_embeddings=_int(raw, "max_position_embeddings"),
        tied=bool(raw.get("tie_word_embeddings", False)),
        dtype=stored_dtype(raw),
        qkv_bias=_qkv_bias(raw, family),
        output_bias=_chosen_bias(raw, family),
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        head_norms=family in ("qwen3", "qwen3_moe"),
        experts=_experts(raw, family),
        window=_window(raw, family),
    )


def read_attention(raw: Mapping[str, Any]) -> AttentionShape:
    """Raises ConfigError where a number is missing or does not fit the others."""
    heads = _int(raw, "num_attention_heads")
    kv_heads = heads if raw.get("num_key_value_heads") is None else _int(raw, "num_key_value_heads")
    head_size = _int(raw, "hidden_size") // heads if raw.get("head_dim") is None else _int(raw, "head_dim")
    if heads % kv_heads or head_size < 1:
        raise ConfigError(f"config.json: {heads} heads of {head_size} do not share {kv_heads} KV heads.")
    return AttentionShape(
        num_layers=_int(raw, "num_hidden_layers"), num_heads=heads, num_kv_heads=kv_heads, head_size=head_size
    )


def stored_dtype(raw: Mapping[str, Any]) -> str:
    return str(raw.get("torch_dtype") or raw.get("dtype") or "float32").removeprefix("torch.")


def _family(raw: Mapping[str, Any]) -> tuple[str, str]:
    """The architecture's name and our word for it."""
    named = raw.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    kind = raw.get("model_type")
    name = next((name for name in names if name in COUNTED), names[0] if names else str(kind or "no architecture"))
    reason = _why_not(raw)
    if reason is not None:
        raise ConfigError(f"config.json: {name} is not counted here: {reason}.")
    family = COUNTED.get(name) or (kind if not names and kind in COUNTED.values() else None)
    if family is None:
        raise ConfigError(f"config.json: {name} is not counted here; these are: {', '.join(sorted(COUNTED))}.")
    return name, str(family)


def _why_not(raw: Mapping[str, Any]) -> str | None:
    """What makes the plain arithmetic wrong, whatever the architecture is called."""
    if raw.get("text_config") or raw.get("thinker_config"):
        return "it has several parts, and text is one of them (text_config)"
    if raw.get("is_encoder_decoder"):
        return "it is an encoder with a decoder"
    if raw.get("kv_lora_rank"):
        return "it keeps one latent vector for each token in place of K and V (MLA, kv_lora_rank)"
    quantised = raw.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        return f"its weights are quantised ({method or 'quantization_config'}); give the bfloat16 or float32 checkpoint"
    return _why_hybrid(raw)


def _why_hybrid(raw: Mapping[str, Any]) -> str | None:
    kinds = raw.get("layer_types")
    others = sorted({str(kind) for kind in kinds} - _PLAIN_LAYERS) if isinstance(kinds, list) else []
    named = f"layers of the kind {', '.join(others)}" if others else next(filter(raw.get, _HYBRID_KEYS), None)
    return f"it is a hybrid: not every layer keeps K and V of every token ({named})" if named else None


def _qkv_bias(raw: Mapping[str, Any], family: str) -> bool:
    if family == "qwen2_moe":
        return bool(raw.get("qkv_bias", True))
    return family == "qwen2" or _chosen_bias(raw, family)


def _chosen_bias(raw: Mapping[str, Any], family: str) -> bool:
    """On q, k, v and the output alike, where the family leaves it to the configuration."""
    return family in ("llama", "qwen3", "qwen3_moe") and bool(raw.get("attention_bias", False))


def _experts(raw: Mapping[str, Any], family: str) -> Experts | None:
    layers = _int(raw, "num_hidden_layers")
    if family == "mixtral":
        return Experts(
            num_layers=layers,
            num_experts=_int(raw, "num_local_experts"),
            inner_size=_int(raw, "intermediate_size"),
        )
    if not family.endswith("_moe"):
        return None
    key = "num_experts" if raw.get("num_experts") is not None else "num_local_experts"
    if raw.get(key) == 0:
        return None
    step = 1 if raw.get("decoder_sparse_step") is None else _int(raw, "decoder_sparse_step")
    dense = raw.get("mlp_only_layers") or ()
    sparse = sum(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    if not sparse:
        return None
    return Experts(
        num_layers=sparse,
        num_experts=_int(raw, key),
        inner_size=_int(raw, "moe_intermediate_size"),
        shared_size=_int(raw, "shared_expert_intermediate_size") if family == "qwen2_moe" else 0,
    )


def _window(raw: Mapping[str, Any], family: str) -> int | None:
    if family == "llama" or (family.startswith("qwen") and not raw.get("use_sliding_window", False)):
        return None
    return None if raw.get("sliding_window") is None else _int(raw, "sliding_window")


def _int(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {name} must be a positive whole number, not {value!r}.")
    return value

"""What a checkpoint's config.json says, checked: the part of it that our models need."""

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from .safetensors_file import SafetensorsDir

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
ROPE_KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
_DEFAULT_ROPE_THETA = 10000.0
# What a family's config.json may leave out and means otherwise than the others do.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    "qwen3_moe": {"num_key_value_heads": 4},
}
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: its base and how it was stretched. Fields that a kind doesn't use stay at their defaults."""

    theta: float = _DEFAULT_ROPE_THETA
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope; None: from factor (and mscale)
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] = ()  # longrope: a divisor for each pair


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts: how many there are, and which layers have them."""

    count: int
    per_token: int
    intermediate_size: int  # of each
    normalise: bool  # the shares of a token's experts sum to one
    layers: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder of the Llama kind."""

    architecture: str  # a value of ARCHITECTURES
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int  # of dense feed-forward layers
    experts: ExpertsConfig | None  # None: all layers are dense
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool  # q, k and v have one
    output_bias: bool  # and the attention's output projection
    mlp_bias: bool
    windows: tuple[int | None, ...]  # one per layer: how many keys a query sees; None: all
    dtype: torch.dtype  # of the checkpoint
    fingerprint: str  # of configuration and weights

    @classmethod
    def from_dir(cls, path: Path) -> "ModelConfig":
        """Read `path`/config.json and look at the weights' files.

        Raises ValueError, in words for who runs the server, where a file is missing or says what we can't serve.
        """
        raw = _read_json(path / "config.json")
        if raw is None:
            raise ValueError(f"{path} has no config.json")
        architecture = _architecture(raw)
        raw = _FAMILY_DEFAULTS.get(architecture, {}) | raw
        _refuse_unsupported(raw)
        hidden_size, num_heads = _int(raw, "hidden_size"), _int(raw, "num_attention_heads")
        num_kv_heads = raw.get("num_key_value_heads") or num_heads
        head_size = raw.get("head_dim") or hidden_size // num_heads
        if num_heads % num_kv_heads or head_size % 2:
            raise ValueError(f"config.json: {num_heads} heads, {num_kv_heads} KV heads, size {head_size} do not fit")
        bias = architecture == "qwen2" or bool(raw.get("attention_bias", False))
        num_layers = _int(raw, "num_hidden_layers")
        return cls(
            architecture=architecture,
            vocab_size=_int(raw, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            intermediate_size=_int(raw, "intermediate_size"),
            experts=_experts(raw, architecture, num_layers),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_rope(raw, head_size),
            max_position_embeddings=_int(raw, "max_position_embeddings"),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bias,
            output_bias=bias and architecture != "qwen2",
            mlp_bias=architecture == "llama" and bool(raw.get("mlp_bias", False)),
            windows=_windows(raw, architecture, num_layers),
            dtype=_dtype(raw),
            fingerprint=_fingerprint(path),
        )

    def kv_fingerprint(self, dtype: torch.dtype) -> str:
        """Names what KV of this model in this dtype is compatible with."""
        return blake2b(f"{self.fingerprint}/{dtype}".encode(), digest_size=16).hexdigest()


def _architecture(raw: dict[str, Any]) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    asked, supported = ", ".join(names) or "unknown", ", ".join(sorted(ARCHITECTURES))
    raise ValueError(f"config.json: architecture {asked} is not supported; these are: {supported}")


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    if raw.get("quantization_config"):
        raise ValueError("config.json: quantised checkpoints are not supported; use the bfloat16 or float32 one")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; silu is")
    if raw.get("pretraining_tp", 1) != 1:
        raise ValueError("config.json: pretraining_tp other than 1 is not supported")


def _rope(raw: dict[str, Any], head_size: int) -> RopeConfig:
    """From `rope_parameters` (transformers 5), else from `rope_theta` and `rope_scaling` (before)."""
    given = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(f"config.json: rope type {kind!r} is not supported; these are: {', '.join(ROPE_KINDS)}")
    if (given.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor is not supported")
    theta = given.get("rope_theta") or raw.get("rope_theta") or _DEFAULT_ROPE_THETA
    longest = _int(raw, "max_position_embeddings")
    original = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or longest
    known = {name: given[name] for name in RopeConfig.__dataclass_fields__ if given.get(name) is not None}
    if kind == "default":
        return RopeConfig(theta=float(theta))
    if kind in ("yarn", "longrope") and "factor" not in known:
        known["factor"] = longest / original
    if "factor" not in known:
        raise ValueError(f"config.json: rope type {kind} needs a factor")
    if kind == "dynamic":
        original = longest  # what transformers stretches from, whatever else is written there
    if kind == "longrope":
        known["short_factor"] = _numbers(known.get("short_factor"), head_size // 2, "short_factor")
    known |= {"theta": float(theta), "kind": kind, "original_max_position_embeddings": int(original)}
    return RopeConfig(**known)


def _windows(raw: dict[str, Any], architecture: str, num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if architecture.startswith("qwen") and not raw.get("use_sliding_window", False):
        window = None
    if architecture == "llama" or window is None:
        return (None,) * num_layers
    if architecture in ("mistral", "mixtral", "qwen3_moe"):
        return (window,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", 28)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if len(kinds) != num_layers:
        raise ValueError(f"config.json: {len(kinds)} layer_types for {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _experts(raw: dict[str, Any], architecture: str, num_layers: int) -> ExpertsConfig | None:
    if architecture == "mixtral":
        count, size, normalise = _int(raw, "num_local_experts"), _int(raw, "intermediate_size"), True
        layers = frozenset(range(num_layers))
    elif architecture == "qwen3_moe":
        count = _int(raw, "num_experts" if "num_experts" in raw else "num_local_experts")  # as published; as saved now
        size, normalise = _int(raw, "moe_intermediate_size"), bool(raw.get("norm_topk_prob", False))
        step = _int(raw, "decoder_sparse_step") if "decoder_sparse_step" in raw else 1
        dense = raw.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise ValueError(f"config.json: mlp_only_layers must be a list of layers, not {dense!r}")
        layers = frozenset(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense)
    else:
        return None
    per_token = _int(raw, "num_experts_per_tok")
    if per_token > count:
        raise ValueError(f"config.json: {per_token} experts for each token, of {count}")
    return ExpertsConfig(count=count, per_token=per_token, intermediate_size=size, normalise=normalise, layers=layers)


def _dtype(raw: dict[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise ValueError(f"config.json: dtype {name!r} is not supported")
    return _DTYPES[name]


def _fingerprint(path: Path) -> str:
    digest = blake2b((path / "config.json").read_bytes(), digest_size=16)
    for part in SafetensorsDir(path).identity():
        digest.update(part)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return found


def _numbers(value: Any, count: int, name: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count or not all(isinstance(x, int | float) for x in value):
        raise ValueError(f"config.json: {name} must be a list of {count} numbers")
    return tuple(map(float, value))


def _int(raw: dict[str, Any], name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {name} must be a positive integer, not {value!r}")
    return value

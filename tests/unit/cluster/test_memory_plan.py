"""The counts are those of the models' own cards and of `transformers`; where a comment multiplies, it was by hand."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.memory_plan import GPUS, check_split, count_weights, plan_memory
from baton.cluster.model_shape import AttentionShape, Experts, ModelShape, read_shape
from baton.core.errors import ConfigError
from baton.engine.memory import GPU_SHARE, GPU_WORKSPACE


def config(architecture: str, *sizes: int, **more: Any) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    return {"architectures": [architecture], "torch_dtype": "bfloat16", **dict(zip(names, sizes, strict=True)), **more}


LLAMA_8B = config("LlamaForCausalLM", 128256, 4096, 14336, 32, 32, 8, 131072)
LLAMA_70B = config("LlamaForCausalLM", 128256, 8192, 28672, 80, 64, 8, 131072)
MISTRAL_7B = config("MistralForCausalLM", 32000, 4096, 14336, 32, 32, 8, 32768, sliding_window=4096)
QWEN2_7B = config("Qwen2ForCausalLM", 152064, 3584, 18944, 28, 28, 4, 32768, use_sliding_window=False)
QWEN3_06B = config("Qwen3ForCausalLM", 151936, 1024, 3072, 28, 16, 8, 40960, head_dim=128, tie_word_embeddings=True)
MIXTRAL_8X7B = config("MixtralForCausalLM", 32000, 4096, 14336, 32, 32, 8, 32768, num_local_experts=8)
QWEN3_30B_A3B = config(
    "Qwen3MoeForCausalLM",
    151936,
    2048,
    6144,
    48,
    32,
    4,
    40960,
    head_dim=128,
    num_experts=128,
    moe_intermediate_size=768,
)


@pytest.mark.parametrize(
    ("raw", "parameters", "token_bytes"),
    [
        # a layer: q and output 2 x 4096 x 4096, k and v 2 x 4096 x 1024, feed-forward 3 x 4096 x 14336, norms 2 x 4096
        #        = 33,554,432 + 8,388,608 + 176,160,768 + 8,192 = 218,112,000
        # 32 x 218,112,000 + embedding and head 2 x 128,256 x 4,096 + last norm 4,096 = 8,030,261,248
        # KV: 32 layers x 2 x 8 heads x 128 x 2 B = 131,072
        (LLAMA_8B, 8_030_261_248, 131_072),
        # a layer: 2 x 8192 x 8192 + 2 x 8192 x 1024 + 3 x 8192 x 28672 + 2 x 8192 = 855,654,400
        # 80 x 855,654,400 + 2 x 128,256 x 8,192 + 8,192 = 70,553,706,496;  KV: 80 x 2 x 8 x 128 x 2 = 327,680
        (LLAMA_70B, 70_553_706_496, 327_680),
        # 32 layers of Llama-8B's and 2 x 32,000 x 4,096 + 4,096: 6,979,584,000 + 262,144,000 + 4,096 = 7,241,732,096
        (MISTRAL_7B, 7_241_732_096, 131_072),
        # a layer: 2 x 3584 x 3584 + 2 x 3584 x 512 + biases 3584 + 2 x 512 + 3 x 3584 x 18944 + 2 x 3584 = 233,057,792
        # 28 x 233,057,792 + 2 x 152,064 x 3,584 + 3,584 = 7,615,616,512;  KV: 28 x 2 x 4 x 128 x 2 = 57,344
        (QWEN2_7B, 7_615_616_512, 57_344),
        # heads of 128, so q is 2048 x 1024, twice the hidden size; the head is the embedding
        # a layer: 2 x 2,097,152 + 2 x 1,048,576 + 3 x 3,145,728 + 2 x 1,024 + 2 x 128 = 15,730,944
        # 28 x 15,730,944 + 151,936 x 1,024 + 1,024 = 596,049,920;  KV: 28 x 2 x 8 x 128 x 2 = 114,688
        (QWEN3_06B, 596_049_920, 114_688),
        # a layer: 33,554,432 + 8,388,608 + 8 experts x 176,160,768 + router 8 x 4,096 + 8,192 = 1,451,270,144
        # 32 x 1,451,270,144 + 262,144,000 + 4,096 = 46,702,792,704
        (MIXTRAL_8X7B, 46_702_792_704, 131_072),
        # a layer: 2 x 2048 x 4096 + 2 x 2048 x 512 + 128 x 3 x 2048 x 768 + 128 x 2048 + 2 x 2048 + 256 = 623,120,640
        # 48 x 623,120,640 + 2 x 151,936 x 2,048 + 2,048 = 30,532,122,624;  KV: 48 x 2 x 4 x 128 x 2 = 98,304
        (QWEN3_30B_A3B, 30_532_122_624, 98_304),
    ],
    ids=["Llama-3.1-8B", "Llama-3.1-70B", "Mistral-7B", "Qwen2.5-7B", "Qwen3-0.6B", "Mixtral-8x7B", "Qwen3-30B-A3B"],
)
def test_known_models_have_their_known_sizes(raw: dict[str, Any], parameters: int, token_bytes: int) -> None:
    plan = plan_memory(read_shape(raw))
    assert (plan.parameters, plan.token_bytes) == (parameters, token_bytes)
    assert plan.weight_bytes == 2 * parameters


TINY = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 5, "moe_intermediate_size": 24, "num_experts_per_tok": 2}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"head_dim": 32, "num_key_value_heads": None}),
        ("Mistral", {"head_dim": 8}),
        ("Mistral", {"attention_bias": True}),  # which it knows nothing of
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
        ("Qwen3", {"head_dim": 16, "attention_bias": True}),
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 40}),
        ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 40, "qkv_bias": False, "mlp_only_layers": [1]}),
        ("Qwen3Moe", {**EXPERTS, "head_dim": 32}),
        ("Qwen3Moe", {**EXPERTS, "attention_bias": True, "decoder_sparse_step": 2}),
        ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [0, 1, 2]}),
    ],
)
def test_a_count_is_that_of_the_model_itself(family: str, changes: dict[str, Any], tied: bool) -> None:
    import torch
    import transformers

    made = getattr(transformers, f"{family}Config")(**{**TINY, **changes}, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(made)
        model.tie_weights()
    raw = {**json.loads(made.to_json_string()), "architectures": [f"{family}ForCausalLM"]}
    assert sum(weight.count for weight in count_weights(read_shape(raw))) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("DeepseekV3", r"DeepseekV3ForCausalLM is not counted here.*\(MLA, kv_lora_rank\)"),
        ("Jamba", "JambaForCausalLM is not counted here: it is a hybrid"),
        ("Qwen3Next", "Qwen3NextForCausalLM is not counted here: it is a hybrid.*linear_attention"),
        ("FalconH1", "FalconH1ForCausalLM is not counted here: it is a hybrid"),
        ("Gemma3", r"Gemma3ForCausalLM is not counted here.*\(text_config\)"),
        ("T5", "T5ForCausalLM is not counted here: it is an encoder with a decoder"),
        ("GPT2", "GPT2ForCausalLM is not counted here; these are: LlamaForCausalLM"),
    ],
)
def test_what_is_not_counted_is_refused_by_name(name: str, says: str) -> None:
    import transformers

    raw = json.loads(getattr(transformers, f"{name}Config")().to_json_string(use_diff=False))
    with pytest.raises(ConfigError, match=says):
        read_shape({**raw, "architectures": [f"{name}ForCausalLM"]})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
        ({"kv_lora_rank": 512}, "LlamaForCausalLM is not counted here.*MLA"),
        ({"layer_types": ["full_attention", "mamba"]}, "hybrid.*mamba"),
        ({"vocab_size": None}, "vocab_size must be a positive whole number"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers must be a positive whole number"),
        ({"num_key_value_heads": 5}, "do not share 5 KV heads"),
        ({"architectures": None, "model_type": "bert"}, "bert is not counted"),
        ({"architectures": []}, "no architecture is not counted"),
    ],
)
def test_a_config_that_can_not_be_counted_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read_shape({**LLAMA_8B, **changes})
    assert "\n" not in str(caught.value)


def test_a_config_without_architectures_is_known_by_its_model_type() -> None:
    raw = {**LLAMA_8B, "architectures": None, "model_type": "llama"}
    assert plan_memory(read_shape(raw)).parameters == 8_030_261_248


def test_a_rank_has_its_part_and_what_every_rank_needs() -> None:
    plan = plan_memory(read_shape(LLAMA_8B), tp=2)
    # norms 65 x 4,096 = 266,240 on both; the rest halves: (8,030,261,248 - 266,240) / 2 + 266,240
    assert plan.rank_parameters == 4_015_263_744
    assert plan.token_bytes == 65_536
    wide = plan_memory(read_shape(LLAMA_8B), tp=16)  # 8 KV heads: one on each rank, on two ranks alike
    assert (wide.rank_kv_heads, wide.token_bytes) == (1, 16_384)
    k_and_v = next(weight for weight in wide.weights if weight.name == "k and v")
    assert k_and_v.rank_count == k_and_v.count // 8
    with pytest.raises(ConfigError, match="--tp is 3: 32 heads do not split evenly"):
        check_split(read_shape(LLAMA_8B), 3)


@pytest.mark.parametrize(("dtype", "token_bytes"), [("float32", 262_144), ("bfloat16", 131_072), ("fp8", 65_536)])
def test_kv_has_a_dtype_of_its_own(dtype: str, token_bytes: int) -> None:
    plan = plan_memory(read_shape(LLAMA_8B), kv_dtype=dtype)
    assert (plan.token_bytes, plan.weight_bytes) == (token_bytes, 16_060_522_496)
    assert plan_memory(read_shape(LLAMA_8B), dtype="float32").token_bytes == 262_144


def test_sequences_are_those_whose_blocks_fit() -> None:
    plan = plan_memory(read_shape(LLAMA_8B), context=8192)
    fit = plan.fit(80 << 30)
    # 80 GiB x 0.9 = 77,309,411,328 - 16,060,522,496 - 1,073,741,824 = 60,175,147,008 for KV
    # / 2,097,152 a block = 28,693 blocks = 459,088 tokens; / 512 blocks a sequence = 56
    assert (fit.room, fit.blocks, fit.tokens, fit.sequences) == (60_175_147_008, 28_693, 459_088, 56)
    assert plan_memory(read_shape(LLAMA_8B), context=8193).sequence_blocks == 513
    small = plan.fit(16 << 30)
    assert small.room < 0
    assert (small.blocks, small.tokens, small.sequences) == (0, 0, 0)


def test_a_context_is_bounded_by_the_model() -> None:
    shape = read_shape(LLAMA_8B)
    assert plan_memory(shape).context == 131_072
    assert plan_memory(shape, max_model_len=4096).context == 4096
    with pytest.raises(ConfigError, match="--context is 5000: a sequence has at most 4096"):
        plan_memory(shape, max_model_len=4096, context=5000)
    with pytest.raises(ConfigError, match="at most 131072"):
        plan_memory(shape, max_model_len=131_073)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Of any family, with heads and columns that split over up to 8 ranks."""
    layers, kv_heads = draw(st.integers(1, 9)), 2 ** draw(st.integers(0, 5))
    experts = st.builds(
        Experts,
        num_layers=st.integers(1, layers),
        num_experts=st.integers(1, 9),
        inner_size=st.integers(1, 9).map(lambda n: 8 * n),
        shared_size=st.integers(0, 3).map(lambda n: 8 * n),
    )
    flags = ("tied", "qkv_bias", "output_bias", "mlp_bias", "head_norms")
    return ModelShape(
        architecture="X",
        attention=AttentionShape(
            num_layers=layers,
            num_heads=kv_heads * 8 * draw(st.integers(1, 3)),
            num_kv_heads=kv_heads,
            head_size=draw(st.sampled_from([32, 64, 128])),
        ),
        vocab_size=draw(st.integers(1, 999)),
        hidden_size=draw(st.integers(1, 999)),
        inner_size=8 * draw(st.integers(1, 99)),
        max_position_embeddings=draw(st.integers(16, 9999)),
        dtype="bfloat16",
        experts=draw(st.none() | experts),
        **{flag: draw(st.booleans()) for flag in flags},
    )


EVERYWHERE = {"norms", "q and k norms", "output bias", "down bias", "router", "its gate"}
VOCABULARY = {"embedding", "head"}
KV = {"k and v", "q, k, v biases"}


@given(shapes(), st.sampled_from([1, 2, 4, 8]))
def test_ranks_divide_what_splits_and_repeat_the_rest(shape: ModelShape, tp: int) -> None:
    check_split(shape, tp)
    heads = shape.attention.num_kv_heads
    for weight in count_weights(shape, tp):
        together = weight.rank_count * tp
        if weight.name in EVERYWHERE:
            assert weight.rank_count == weight.count
        elif weight.name in VOCABULARY:
            assert 0 <= together - weight.count < tp * shape.hidden_size
        elif weight.name in KV and heads < tp:
            kv_rows = 2 * (tp - heads) * shape.attention.num_layers * shape.attention.head_size
            assert together - weight.count == kv_rows * (shape.hidden_size if weight.name == "k and v" else 1)
        else:
            assert together == weight.count
    whole, part = plan_memory(shape), plan_memory(shape, tp=tp)
    assert part.token_bytes * tp == whole.token_bytes * max(heads, tp) // heads
    assert part.parameters == whole.parameters == whole.rank_parameters


@given(shapes(), st.sampled_from([1, 2, 4, 8]), st.integers(0, 200 << 30), st.integers(1, 9999))
def test_what_is_said_to_fit_does_and_one_more_does_not(shape: ModelShape, tp: int, memory: int, context: int) -> None:
    plan = plan_memory(shape, tp=tp, context=min(context, shape.max_position_embeddings))
    fit = plan.fit(memory)
    fixed = plan.weight_bytes + GPU_WORKSPACE
    if fit.sequences:
        assert fixed + fit.sequences * plan.sequence_bytes <= memory * GPU_SHARE
    assert fixed + (fit.sequences + 1) * plan.sequence_bytes > int(memory * GPU_SHARE)
    assert fit.tokens >= fit.sequences * plan.context


def test_a_gpu_has_less_than_its_name_says() -> None:
    for name, most in {"h200": 141, "h100": 80, "a100-80": 80, "a100-40": 40, "l40s": 48, "l4": 24}.items():
        assert 0.9 * most < GPUS[name] / (1 << 30) < most

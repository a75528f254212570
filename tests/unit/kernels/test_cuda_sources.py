"""What the CUDA sources compute, without a GPU: the cases of tests/gpu, on kernels compiled for the CPU."""

import ctypes

import pytest
import torch

from ...emulation import library as emulation
from ...gpu import (
    test_activation,
    test_block_copy,
    test_exact_attention,
    test_norm,
    test_paged_attention,
    test_prefill_attention,
    test_rotary_write,
    test_sampling_kernels,
    test_skinny_linear,
    test_write_kv,
)
from ...gpu.test_skinny_linear import kernel

__all__ = ["kernel"]  # a fixture

# Cases that are too large, or of the GPU alone.
NOT_HERE = {
    "test_long_contexts",
    "test_many_sequences_of_many_lengths",
    "test_all_lengths_up_to_three_hundred",
    "test_a_pool_past_two_to_the_31_elements",
    "test_blocks_past_two_and_four_gigabytes_are_found",
    "test_a_copy_follows_the_work_of_its_stream",
    "test_a_captured_step_reads_rows_and_positions_of_its_replay",
    "test_a_captured_launch_reads_the_tables_of_its_replay",
    "test_a_captured_launch_follows_the_tables_of_its_replay",
    "test_a_long_prompt_in_one_chunk",
    "test_chunks_in_a_pool_past_two_to_the_31_elements",
    "test_chunks_of_all_lengths_up_to_three_hundred",
    "test_few_tokens_after_very_long_prefixes",
    "test_nothing_waits_for_the_gpu",
    "test_a_captured_launch_reads_the_rows_of_its_replay",
    "test_the_shapes_of_a_model",
    "test_a_captured_rotation_reads_slots_and_positions_of_its_replay",
    "test_a_sequence_s_answer_does_not_depend_on_its_batch",  # true only while there is a multiprocessor for each tile
}

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=f"emulation: {emulation.missing()}")

for _module in (
    test_activation,
    test_block_copy,
    test_exact_attention,
    test_norm,
    test_paged_attention,
    test_prefill_attention,
    test_rotary_write,
    test_sampling_kernels,
    test_skinny_linear,
    test_write_kv,
):
    for _name, _case in vars(_module).items():
        if _name.startswith("test_") and _name not in NOT_HERE and callable(_case):
            globals()[f"{_module.__name__.rsplit('.', 1)[-1]}__{_name.removeprefix('test_')}"] = _case


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    return emulation.compile_for_cpu()


@pytest.fixture
def gpu(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    emulation.use(library, monkeypatch)
    return torch.device("cpu")


@pytest.fixture
def random(gpu: torch.device) -> torch.Generator:
    generator = torch.Generator(gpu)
    print(f"seed {generator.seed()}")
    return generator

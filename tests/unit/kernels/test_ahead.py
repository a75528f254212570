"""What is asked for ahead lies within the weight. Emulation looks at the first and the last byte of it."""

import pytest
import torch

from baton.kernels import ahead

from ...emulation import library as emulation


@pytest.mark.parametrize("shape", [(3072, 4096), (64128, 4096), (5, 8), (4096, 2048)])
@pytest.mark.parametrize("most", [0, 1 << 20, 16 << 20, 1 << 30])
def test_no_more_than_is_wanted_and_no_more_than_there_is(shape: tuple[int, int], most: int) -> None:
    row_bytes = 2 * shape[1]
    each = min(row_bytes, most // shape[0] // 128 * 128)
    rows, columns = shape
    assert ahead.asked(torch.empty(rows, columns, dtype=torch.bfloat16), most)[1:] == (row_bytes, rows, each)
    assert each * rows <= min(most, rows * row_bytes)


def test_a_weight_that_is_no_run_of_vectors_is_left_alone() -> None:
    for weight in (None, torch.empty(4, 16).t(), torch.empty(8, 3), torch.empty(2, 8, 8)):
        assert ahead.asked(weight, 1 << 20) == (None, 0, 0, 0)


@pytest.mark.skipif(emulation.missing() is not None, reason=f"emulation: {emulation.missing()}")
def test_a_kernel_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    emulation.use(emulation.compile_for_cpu(), monkeypatch)
    asked: list[tuple[object, ...]] = []
    library = ahead.cuda_library(torch.device("cpu"))
    assert library is not None

    class Watched:
        def fetch_ahead(self, *arguments: object) -> None:
            asked.append(arguments)
            library.fetch_ahead(*arguments)

    monkeypatch.setattr(ahead, "cuda_library", lambda device: Watched())
    weights = [torch.zeros(rows, columns, dtype=torch.bfloat16) for rows, columns in ((1, 8), (70, 64), (5000, 16))]
    for most in (0, 1 << 20):
        monkeypatch.setattr(ahead, "ATTENTION_BYTES", most)
        for weight in weights:
            ahead.fetch_ahead(weight, 1)
            ahead.fetch_ahead(weight, 1000)
    assert [call[0] for call in asked] == [weight.data_ptr() for weight in weights]

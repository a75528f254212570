"""Arrays reach the device as they are, and stay."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.staging import HostCopy, Staging

CPU = torch.device("cpu")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from(["f4", "f8", "i8"]), st.integers(1, 3), st.integers(0, 2000)),
            min_size=1,
            max_size=6,
        ),
        min_size=1,
        max_size=5,
    )
)
def test_what_was_sent_is_there_after_any_later_call(calls: list[list[tuple[str, int, int]]]) -> None:
    staging, dice, kept = Staging(CPU), np.random.default_rng(0), []
    for shapes in calls:
        arrays = [(dice.random((height, width)) * 1e6).astype(kind) for kind, height, width in shapes]
        kept.append((arrays, staging.send([*arrays])))
        for array in arrays[:1]:
            array.setflags(write=False)  # a view of another's memory may be sent too
    for arrays, tensors in kept:
        for array, tensor in zip(arrays, tensors, strict=True):
            assert tensor.numpy().dtype == array.dtype
            assert np.array_equal(tensor.numpy(), array)


def test_a_column_of_a_larger_array_arrives_whole() -> None:
    table = np.arange(12, dtype=np.int64).reshape(3, 4)
    (sent,) = Staging(CPU).send([table[:, 1]])
    assert sent.tolist() == [1, 5, 9]


def test_on_a_cpu_a_copy_to_the_host_is_there_at_once() -> None:
    copy = HostCopy([torch.arange(3), torch.ones(2)])
    assert copy.ready()
    assert [part.tolist() for part in copy.wait()] == [[0, 1, 2], [1.0, 1.0]]

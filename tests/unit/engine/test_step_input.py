"""A step's input on its way between ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.step_input import StepInput

from .parallel.steps import a_step

FIELDS = StepInput.__dataclass_fields__


@given(lengths=st.lists(st.integers(0, 7), min_size=len(FIELDS), max_size=len(FIELDS)), seed=st.integers(0, 99))
def test_every_field_comes_back_as_it_was(lengths: list[int], seed: int) -> None:
    random, like = np.random.default_rng(seed), a_step(0)
    fields = {
        name: random.integers(-(2**31), 2**31, length).astype(getattr(like, name).dtype)
        for name, length in zip(FIELDS, lengths, strict=True)
    }
    found = StepInput.from_bytes(StepInput(**fields).to_bytes())
    for name, array in fields.items():
        assert getattr(found, name).dtype == array.dtype
        np.testing.assert_array_equal(getattr(found, name), array)


def test_what_was_received_cannot_be_written_to() -> None:
    found = StepInput.from_bytes(a_step(3).to_bytes())
    with pytest.raises(ValueError, match="read-only"):
        found.wanted[0] = 1

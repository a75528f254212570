"""The cases on emulated kernels are many: some of each are run, the same each time, or all where EVERY_CASE is set."""

import os

import pytest

from ...some_cases import keep_some

_SOME = 4


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not os.environ.get("EVERY_CASE"):
        keep_some(config, items, _SOME, lambda item: item.path.name == "test_cuda_sources.py")

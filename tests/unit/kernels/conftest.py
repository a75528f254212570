"""The cases on emulated kernels are many: some of each are run, the same each time, or all where EVERY_CASE is set."""

import os
import random
from collections import defaultdict

import pytest

_SOME = 4


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("EVERY_CASE"):
        return
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.path.name == "test_cuda_sources.py":
            cases[item.name.split("[")[0]].append(item)
    left_out = [
        item
        for name, ways in cases.items()
        if len(ways) > _SOME
        for item in random.Random(name).sample(ways, len(ways) - _SOME)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]

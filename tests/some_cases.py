"""A few of each test's cases, where all of them take too long."""

import random
from collections import defaultdict
from collections.abc import Callable

import pytest


def keep_some(config: pytest.Config, items: list[pytest.Item], some: int, among: Callable[[pytest.Item], bool]) -> None:
    """Of the tests `among` them so many cases of each stay, the same each time; of others all."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if among(item):
            cases[item.nodeid.split("[")[0]].append(item)
    left_out = {
        item
        for name, ways in cases.items()
        if len(ways) > some
        for item in random.Random(name.split("::")[-1]).sample(ways, len(ways) - some)
    }
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]

from __future__ import annotations

import pytest

from fastldm.testing import poisoned_memory


@pytest.fixture(autouse=True)
def unwritten_memory():
    """An output element that a backend forgets to write is NaN and fails the comparison."""
    with poisoned_memory():
        yield

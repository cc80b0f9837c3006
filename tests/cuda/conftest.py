"""The launcher of kernels under the shim, and what is written at the end where lines are counted."""

from __future__ import annotations

import math

import pytest
import torch

from fastldm.native import build_cuda
from tests.cuda import shim as shim_module

_loaded = []


@pytest.fixture(scope="session")
def shim():
    """shim("selftest") -> the functions of that driver: see shim.py."""

    def load(driver):
        found = shim_module.load(driver)
        if found not in _loaded:
            _loaded.append(found)
        return found

    return load


@pytest.fixture
def broken_shim(tmp_path):
    """broken_shim("selftest", {"cuda/selftest.cuh": (old, new)}) -> the same of changed sources."""
    return lambda driver, changes: shim_module.broken(driver, tmp_path / "broken", changes)


@pytest.fixture
def unwritten():
    """unwritten(2, 3, dtype=...) -> a tensor that holds NaN, or the least integer, until a kernel writes."""

    def make(*shape, dtype=torch.float32):
        value = math.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        return torch.full(shape, value, dtype=dtype)

    return make


def pytest_collection_modifyitems(config, items):
    """Where lines are counted, changed sources have no part in it: their tests are for another run."""
    for item in items:
        if "broken_shim" in getattr(item, "fixturenames", ()):
            item.add_marker("changed_source")
        if item.get_closest_marker("nvcc") and (missing := build_cuda.missing()) is not None:
            item.add_marker(pytest.mark.skip(reason=f"CUDA cannot be compiled here: {missing}"))
    if shim_module.counting():
        changed = [item for item in items if item.get_closest_marker("changed_source")]
        config.hook.pytest_deselected(items=changed)
        items[:] = [item for item in items if item not in changed]


def pytest_sessionfinish(session):
    if shim_module.counting():
        for loaded in _loaded:
            loaded.write_coverage()

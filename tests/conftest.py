"""Shared by all tests: quiet, offline, seeded, and one thread per worker when pytest-xdist runs several.

Without a GPU the Triton kernels run under Triton's interpreter, which has to be asked for before they are
imported.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="where tests/ops run the operations: cpu, cuda, or copy (see there)"
    )


def pytest_collection_modifyitems(config, items):
    """Deselects, rather than skips, what needs a GPU where there is none, and backends that do not run on the
    device asked for."""
    device = config.getoption("--device").replace("copy", "cpu")
    chosen = {True: [], False: []}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        chosen[_can_run(item, parameters.get("backend"), device)].append(item)
    if chosen[False]:
        config.hook.pytest_deselected(items=chosen[False])
        items[:] = chosen[True]


def _can_run(item, backend: str | None, device: str) -> bool:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return False
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    devices = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cpu",) if interpreted else ("cuda",)}
    return device in devices.get(backend, (device,))

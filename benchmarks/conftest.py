"""`pytest benchmarks --benchmark-only`: offline, and with the suite's way with freed memory."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest

from benchmarks import memory


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pytest-benchmark is not installed; install fastldm[bench]")
    memory.reuse()

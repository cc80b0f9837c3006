"""Paths of the Triton kernels of attention."""

from __future__ import annotations

import importlib
from contextlib import ExitStack

import pytest


@pytest.fixture
def take(monkeypatch):
    """take(path): calls of attention take it, whatever their shape, in tiles of 16 or 32."""
    configs, wide = (
        importlib.import_module(f"fastldm.kernels.attention.{name}") for name in ("configs", "wide")
    )
    tables = importlib.import_module("fastldm.kernels.common.tables")
    with ExitStack() as stack:

        def force(**chosen):
            for name, config in chosen.items():
                stack.enter_context(tables.forcing("attention", name.replace("_", "-"), config))

        def take(path):
            monkeypatch.setattr(configs, "is_wide", lambda problem: path == "wide")
            monkeypatch.setattr(configs, "is_short", lambda problem, direction, target: path == "short")
            monkeypatch.setattr(configs, "splits", lambda *_: 3 if path == "split" else 1)
            monkeypatch.setattr(configs, "chunks", lambda *arguments: -(-arguments[-1] // 2))
            # Parts of 32 queries.
            monkeypatch.setattr(wide, "WORKSPACE", 1)
            monkeypatch.setattr(wide, "PAD", 32)
            force(
                forward=configs.TileConfig(32, 16, 4, 1),
                backward_statistics=configs.TileConfig(32, 32, 4, 1),
                backward_keys=configs.TileConfig(16, 32, 4, 1),
                backward_queries=configs.TileConfig(32, 16, 4, 1),
                short_forward=configs.ShortConfig(16, 4, 1),
                short_backward=configs.ShortConfig(16, 4, 1),
                wide_weights=configs.WideConfig(16, 32, 16, 4, 1),
                wide_values=configs.WideConfig(32, 16, 16, 4, 1),
                wide_gradients=configs.WideConfig(32, 16, 16, 4, 1),
                wide_product=configs.WideConfig(16, 32, 32, 4, 1),
                wide_transposed=configs.WideConfig(32, 16, 16, 4, 1),
            )

        yield take

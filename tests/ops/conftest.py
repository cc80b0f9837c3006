"""With `--device cuda` the same tests run the operations on a GPU.

Inputs are moved there as they lie in memory, strides and gaps included; results and gradients come back.
`--device copy` does the same on the CPU, to test that.

What the `cuda` backend refuses by contract is skipped with its reason, any other refusal is a failure.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastldm import ops
from fastldm.errors import UnsupportedError
from fastldm.testing import poisoned_memory
from tests.cuda.contract import refused_by_contract

_OPERATIONS = ("attention", "group_norm", "vq_ema_update", "vq_nearest", "vq_quantize")


@pytest.fixture(autouse=True)
def unwritten_memory():
    """An output element that a backend forgets to write is NaN and fails the comparison."""
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def on_device(request, monkeypatch) -> Callable[[Callable], Callable]:
    """Makes of a function one that computes on the device; the public operations are such already."""
    wanted = request.config.getoption("--device")
    device = "cpu" if wanted == "copy" else wanted

    def moved(function: Callable) -> Callable:
        def call(*args, **kwargs):
            args, kwargs = tree_map_only(Tensor, there, (args, kwargs))
            return tree_map_only(Tensor, lambda x: _Move.apply(x, "cpu"), function(*args, **kwargs))

        return call

    def there(x: Tensor) -> Tensor:
        return x if x.device.type == "meta" else _Move.apply(x, device)

    if wanted == "cpu":
        return lambda function: function
    for name in _OPERATIONS:
        monkeypatch.setattr(ops, name, moved(getattr(ops, name)))
    return moved


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except UnsupportedError as error:
        reason = refused_by_contract(str(error))
        if reason is None:
            raise
        pytest.skip(f"the cuda backend {reason}")


class _Move(torch.autograd.Function):
    """A tensor on another device, at the same place of the same storage."""

    @staticmethod
    def forward(ctx, x: Tensor, device: str) -> Tensor:
        ctx.device = x.device
        return _copy(x, device)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _copy(grad, ctx.device), None


def _copy(x: Tensor, device) -> Tensor:
    length = x.untyped_storage().nbytes() // x.element_size()
    whole = x.detach().as_strided((length,), (1,), 0)
    return whole.to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())

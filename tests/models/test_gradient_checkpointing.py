"""Gradient checkpointing and the dispatcher; what it does inside a network is tested with that network."""

from __future__ import annotations

import threading

import torch
from torch import nn

import fastldm
from fastldm import ops
from fastldm.nn import checkpointing


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return ops.group_norm(ops.attention(x, x, x), 2, self.weight, activation="silu")


def inputs():
    return torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


def ran(recorder):
    return sorted((call.op, call.direction, call.backend) for call in recorder.calls)


def test_recomputation_runs_under_the_policy_of_its_forward():
    """Also from another thread, after the context has ended, more than once, and with the same recorders."""
    block, x = Block(), inputs()
    with fastldm.use_backend("reference"), fastldm.record() as rec:
        loss = checkpointing.run(block, x, enabled=True).square().sum()
    forward = [("attention", "forward", "reference"), ("group_norm", "forward", "reference")]
    backward = [("attention", "backward", "reference"), ("group_norm", "backward", "reference")]
    assert ran(rec) == forward
    for times in (1, 2):
        thread = threading.Thread(target=loss.backward, kwargs={"retain_graph": True})
        thread.start()
        thread.join()
        assert ran(rec) == sorted(forward + times * (forward + backward))


def test_the_state_of_the_backward_comes_back():
    block, x = Block(), inputs()
    with fastldm.use_backend("reference"):
        loss = checkpointing.run(block, x, enabled=True).square().sum()
    with fastldm.use_backend("torch"), fastldm.record() as rec:
        loss.backward()
        ops.group_norm(x.detach(), 2)
    assert ran(rec) == [("group_norm", "forward", "torch")]


def test_a_compiled_model_is_one_graph_whatever_the_policy():
    block, x = Block(), inputs()

    def function(x):
        return checkpointing.run(block, x, enabled=True).square().sum()

    expected = torch.autograd.grad(function(x), x)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for policy in ("reference", "torch"):
            with fastldm.use_backend(policy), fastldm.record() as rec:
                (grad,) = torch.autograd.grad(compiled(x), x)
            assert {call.backend for call in rec.calls} == {policy}
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)

"""What every operation owes PyTorch: schema, fakes, autograd, autocast, compile, inference mode."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fastldm
from fastldm import ops
from fastldm.errors import UnsupportedError
from fastldm.testing import live_backends

OPS = torch.ops.fastldm
BACKENDS = live_backends("attention")
# In which attention is asked of a backend: cuda has no float32.
DTYPES = dict.fromkeys(BACKENDS, torch.float32) | {"cuda": torch.bfloat16}


@pytest.fixture
def unwritten_memory():
    """Tracing cannot see through the patched functions."""


@pytest.fixture
def here(request):
    """Where tests of single backends compute."""
    return torch.device(request.config.getoption("--device").replace("copy", "cpu"))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaf(x):
    return x.detach().requires_grad_()


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "slice": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_attention(layout, backend, here):
    place = {"device": here, "dtype": DTYPES[backend]}
    q, k, v = (leaf(LAYOUTS[layout](normal(2, 3, s, 16).to(**place))) for s in (7, 5, 5))
    queries = 1 if backend == "cuda" else 7
    for mask in (None, normal(2, 1, queries, 5).to(here) > 0):
        opcheck(OPS.attention.default, (q, k, v, mask, False, None, True, backend))
    opcheck(OPS.attention.default, (q.detach(), k.detach(), v.detach(), None, True, 0.5, False, backend))
    out, lse = OPS.attention(q.detach(), k.detach(), v.detach(), None, False, None, True, backend)
    arguments = (
        torch.ones_like(out),
        q.detach(),
        k.detach(),
        v.detach(),
        out,
        lse,
        None,
        False,
        None,
        backend,
    )
    opcheck(OPS.attention_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_group_norm(layout, backend, here):
    x = leaf(LAYOUTS[layout](normal(2, 8, 3, 5).to(here)))
    c, nc = leaf(normal(8).to(here)), leaf(normal(2, 8).to(here))
    opcheck(OPS.group_norm.default, (x, 4, c, c.clone(), 1e-5, "silu", nc, nc.clone(), nc.clone(), backend))
    opcheck(OPS.group_norm.default, (x, 4, None, None, 1e-5, None, None, None, None, backend))
    y, mean, rstd = OPS.group_norm(x.detach(), 4, None, c.detach(), 1e-5, None, None, None, None, backend)
    needed = [True, False, True, False, False, False]
    arguments = (x.detach(), mean, rstd, 4, None, c.detach(), 1e-5, None, None, None, None, needed, backend)
    opcheck(OPS.group_norm_backward.default, (y, *arguments))
    # Gradients of parameters are contiguous, whatever the parameters are.
    scale = normal(8, 2).to(here).t()
    needed = [True, False, False, False, True, False]
    arguments = (x.detach(), mean, rstd, 4, None, None, 1e-5, None, None, scale, None, needed, backend)
    opcheck(OPS.group_norm_backward.default, (y, *arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_vq(layout, backend, here):
    z, codebook = LAYOUTS[layout](normal(2, 6, 10, 4).to(here)), normal(20, 4, seed=1).to(here)
    opcheck(OPS.vq_nearest.default, (z, codebook, backend))
    opcheck(OPS.vq_quantize.default, (leaf(z), codebook, backend))
    indices = torch.arange(120, device=here).view(2, 6, 10) % 20
    opcheck(OPS.vq_ema_update.default, (z, indices, 20, backend))


def everything(q, k, x, weight, z, codebook):
    y = ops.group_norm(x, 4, weight, activation="silu")
    z_q, indices = ops.vq_quantize(z, codebook)
    counts, sums = ops.vq_ema_update(z, indices, codebook.shape[0])
    out = ops.attention(q, k, k, is_causal=True)
    return out.square().sum() + y.square().sum() + (z_q * z).sum() + counts.sum() + sums.sum() * 0


def arguments(batch=2, length=6):
    q, k = leaf(normal(batch, 2, length, 8)), leaf(normal(batch, 2, length + 3, 8, seed=1))
    x, weight = leaf(normal(batch, 8, length, 3)), leaf(normal(8))
    return q, k, x, weight, leaf(normal(batch, length, 4)), normal(20, 4, seed=2)


def gradients(function, inputs):
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs[:-1])]


class Seen(TorchDispatchMode):
    """The fastldm operations that PyTorch's dispatcher was given."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastldm":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_plain_calls_skip_the_dispatcher_and_give_the_same():
    with fastldm.use_backend("torch"):
        plain = gradients(everything, arguments())
        with Seen() as seen:
            dispatched = gradients(everything, arguments())
    assert set(seen.names) == {
        "group_norm",
        "vq_quantize",
        "vq_ema_update",
        "attention",
        "group_norm_backward",
        "attention_backward",
    }
    for have, expected in zip(plain, dispatched, strict=True):
        assert torch.equal(have, expected)


def test_lazily_negated_tensors():
    q = torch.complex(normal(1, 2, 4, 8), normal(1, 2, 4, 8, seed=1)).conj().imag
    x = q.view(2, 4, 8)
    assert q.is_neg()
    assert x.is_neg()
    assert torch.equal(ops.attention(q, q, q), ops.attention(*(q.resolve_neg(),) * 3))
    assert torch.equal(ops.group_norm(x, 2), ops.group_norm(x.resolve_neg(), 2))
    assert torch.equal(ops.vq_nearest(q, q[0, 0]), ops.vq_nearest(q.resolve_neg(), q[0, 0].resolve_neg()))


def test_tracing_keeps_the_operation_whole():
    traced = make_fx(lambda q, x: (ops.attention(q, q, q), ops.group_norm(x, 2)))(
        normal(1, 2, 4, 8), normal(2, 4, 3)
    )
    targets = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert {OPS.attention.default, OPS.group_norm.default} <= targets


def test_flipping_the_policy_does_not_recompile():
    compiled = torch.compile(everything, fullgraph=True)
    inputs = arguments()
    gradients(compiled, inputs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for policy in ("reference", "torch", "auto"):
            with fastldm.use_backend(policy), fastldm.record() as rec:
                results = gradients(compiled, inputs)
            ran = rec.backends()
            assert list(ran) == ["attention", "group_norm", "vq_ema_update", "vq_nearest"]
            assert policy == "auto" or all(backends == [policy] for backends in ran.values())
            assert sorted(c.op for c in rec.calls if c.direction == "backward") == ["attention", "group_norm"]
            for result, eager in zip(results, gradients(everything, inputs)):
                torch.testing.assert_close(result, eager, rtol=1e-4, atol=1e-4)


def test_compiled_backward_runs_under_the_policy_of_its_forward():
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    with fastldm.use_backend("reference"), fastldm.record() as rec:
        value = compiled(*arguments())
    value.backward()
    assert [c.backend for c in rec.calls if c.direction == "backward"] == ["reference", "reference"]


def test_dynamic_shapes():
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    gradients(compiled, arguments(5, 9))  # no two sizes alike, or they are taken to be one
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((3, 5), (2, 11), (5, 7)):
            inputs = arguments(batch, length)
            for result, eager in zip(gradients(compiled, inputs), gradients(everything, inputs)):
                torch.testing.assert_close(result, eager, rtol=1e-4, atol=1e-4)


def test_compiled_masks_and_extras():
    def function(q, mask, x, nc):
        out = ops.attention(q, q, q, mask)
        return out.sum() + ops.group_norm(x, 2, channel_bias=nc, scale=nc, shift=nc).square().sum()

    q, x, nc = leaf(normal(2, 2, 5, 8)), leaf(normal(2, 4, 3, 3)), leaf(normal(2, 4))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mask in (normal(2, 2, 5, 5) > 0, normal(5, 5), torch.arange(5) < torch.tensor([[2], [5]])):
        results, eager = (torch.autograd.grad(f(q, mask, x, nc), (q, x, nc)) for f in (compiled, function))
        for result, expected in zip(results, eager):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, here):
    q, x, z = (leaf(normal(*shape).to(here)) for shape in ((1, 2, 4, 8), (2, 8, 3, 3), (5, 4)))
    codebook = normal(9, 4, seed=1).to(here)
    with torch.autocast(here.type, torch.bfloat16):
        out = ops.attention(q, q.bfloat16(), q, backend=backend)
        y = ops.group_norm(x, 4, activation="silu", backend=backend)
        half = ops.group_norm(x.bfloat16(), 4, torch.ones(8, device=here), backend=backend)
        z_q, indices = ops.vq_quantize(z, codebook, backend=backend)
        (out.float().sum() + y.square().sum() + z_q.sum()).backward()
    assert out.dtype == torch.bfloat16
    cast = ops.attention(*(q.bfloat16(),) * 3, backend=backend)
    assert torch.equal(out, cast)
    assert y.dtype == torch.float32
    assert torch.equal(y, ops.group_norm(x, 4, activation="silu", backend=backend))
    assert half.dtype == torch.bfloat16
    assert z_q.dtype == torch.float32
    assert torch.equal(indices, ops.vq_nearest(z, codebook, backend=backend))
    assert q.grad.dtype == x.grad.dtype == torch.float32
    plain = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4)).square().sum()
    torch.testing.assert_close(x.grad, torch.autograd.grad(plain, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_float64_stays_under_autocast(backend):
    q = normal(1, 2, 4, 8).double()
    expected = ops.attention(q, q, q, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(q, q, q, backend=backend)
    assert out.dtype == torch.float64
    assert torch.equal(out, expected)


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_float64_among_other_dtypes_under_autocast(wide):
    inputs = [normal(1, 2, 4, 8) for _ in range(3)]
    inputs[wide] = inputs[wide].double()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"one dtype.*float64"):
        ops.attention(*inputs)
    inputs = [normal(1, 2, 4, 8), normal(1, 2, 4, 8).long(), normal(1, 2, 4, 8)]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="floating point"):
        ops.attention(*inputs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.attention(x, x, x),
        lambda x: ops.group_norm(x, 2),
        lambda x: ops.group_norm(x.detach(), 2, x[0, :, 0, 0]),
        lambda x: ops.vq_quantize(x, torch.eye(8))[0],
    ],
    ids=["attention", "group_norm", "group_norm-weight", "vq_quantize"],
)
def test_forward_mode_is_refused(function):
    x = normal(1, 2, 4, 8)
    with pytest.raises(UnsupportedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        function(x)
        with pytest.raises(UnsupportedError, match="no forward-mode derivative"):
            function(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=["grad", "jacrev"])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.attention(x, x, x).sum(),
        lambda x: ops.group_norm(x, 2).sum(),
        lambda x: ops.vq_quantize(x, torch.eye(8))[0].sum(),
    ],
    ids=["attention", "group_norm", "vq_quantize"],
)
def test_functional_differentiation_is_refused(function, transform):
    """In one line that says what to do; PyTorch's own is about autograd.Function. Also around and in vmap."""
    x = normal(3, 1, 2, 4, 8)
    calls = (
        lambda: transform(function)(x[0]),
        lambda: transform(lambda x: torch.func.vmap(function)(x).sum())(x),
        lambda: torch.func.vmap(transform(function))(x),
    )
    for call in calls:
        with pytest.raises(UnsupportedError, match=r"is not differentiated by torch\.func"):
            call()
    torch.func.vmap(function)(x)


def test_compiled_under_autocast():
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), fastldm.record() as rec:
        value = compiled(*arguments())
    value.backward()
    dtypes = {(call.op, call.dtype) for call in rec.calls}
    assert ("attention", torch.bfloat16) in dtypes
    assert ("group_norm", torch.float32) in dtypes


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode_and_no_grad(backend, here):
    inputs = [x.to(here) for x in arguments()]
    expected = everything(*inputs)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), fastldm.use_backend(backend):
            value = everything(*inputs)
        assert not value.requires_grad
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend, here):
    def block(q, x):
        attended = ops.attention(q, q, q, backend=backend).sum()
        return attended + ops.group_norm(x, 2, activation="silu", backend=backend).square().sum()

    q, x = leaf(normal(2, 2, 4, 8).to(here, DTYPES[backend])), leaf(normal(2, 4, 3, 3).to(here))
    expected = torch.autograd.grad(block(q, x), (q, x))
    checkpointed = torch.utils.checkpoint.checkpoint(block, q, x, use_reentrant=False)
    for result, eager in zip(torch.autograd.grad(checkpointed, (q, x)), expected):
        assert torch.equal(result, eager)


def test_second_derivatives_are_refused():
    q, x = leaf(normal(1, 1, 3, 8)), leaf(normal(1, 4, 2, 2))
    with fastldm.use_backend("torch"):
        values = (ops.attention(q, q, q).square().sum(), q), (ops.group_norm(x, 2).square().sum(), x)
    for value, wrt in values:
        (first,) = torch.autograd.grad(value, wrt, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            first.sum().backward()


def test_fake_tensors_on_a_device_that_is_not_here():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 16, 4, 8, device="cuda").transpose(1, 2)
        out = ops.attention(q, q, q)
        assert (out.device.type, out.stride()) == ("cuda", q.stride())
        x = torch.empty(2, 8, 4, 4, device="cuda").to(memory_format=torch.channels_last)
        assert ops.group_norm(x, 2).stride() == x.stride()
        assert ops.vq_nearest(torch.empty(5, 4, device="cuda"), torch.empty(7, 4, device="cuda")).shape == (
            5,
        )


class Wrapped(torch.Tensor):
    """A tensor that holds another one, and lists what PyTorch's dispatcher is asked to do with it."""

    calls: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(str(function))
        args = torch.utils._pytree.tree_map_only(cls, lambda x: x.inner, args)
        return function(*args, **(kwargs or {}))


def test_a_tensor_that_wants_to_see_the_operation_sees_it():
    """Only plain tensors go past the dispatcher."""
    Wrapped.calls.clear()
    q = normal(1, 1, 4, 8)
    out = ops.attention(*(Wrapped(q),) * 3, backend="torch")
    assert "fastldm.attention.default" in Wrapped.calls
    assert torch.equal(out, ops.attention(q, q, q, backend="torch"))

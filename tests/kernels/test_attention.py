"""The Triton kernels of attention: what is special to their tiles, pieces, paths and launches.

The contract itself is checked for every backend in tests/ops/test_attention.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools

import pytest
import torch
import torch.nn.functional as F

from fastldm import dispatch, ops, reference
from fastldm.errors import UnsupportedError
from fastldm.ops.attention import HEAD_DIMS
from fastldm.testing import assert_as_accurate, live_backends, plain_attention, poisoned_memory
from fastldm.testing.inputs import ATTENTION_LAYOUTS, MASKS, attention_inputs, attention_mask
from fastldm.testing.shapes import ATTENTION_LAYERS, AttentionShape

pytestmark = pytest.mark.skipif(
    "triton" not in live_backends("attention"), reason="neither a GPU nor Triton's interpreter"
)

if "triton" in live_backends("attention"):
    kernels = importlib.import_module("fastldm.kernels.attention")
    configs, plans, problem, wide = (
        importlib.import_module(f"fastldm.kernels.attention.{name}")
        for name in ("configs", "plans", "problem", "wide")
    )
    target = importlib.import_module("fastldm.kernels.common.target")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = ("short", "long", "split", "wide")
# Head dims: one tight piece; for the wide path two steps.
WIDTH = {"short": 16, "long": 16, "split": 16, "wide": 32}


def run(function, inputs, **arguments):
    """Output and gradients of q, k, v."""
    q, k, v, grad = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, **arguments)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def ours(inputs, attn_mask=None, **arguments):
    """Output and gradients on the CPU, of the inputs on the device where kernels run."""
    inputs = [x.to(DEVICE) for x in inputs]
    attn_mask = None if attn_mask is None else attn_mask.to(DEVICE)
    with poisoned_memory():
        results = run(ops.attention, inputs, attn_mask=attn_mask, backend="triton", **arguments)
    return tuple(x.cpu() for x in results)


def check(inputs, mask=None, **arguments):
    """Output and gradients by the error rule, against float64 autograd."""
    results = ours(inputs, attn_mask=mask, **arguments)
    q, k = inputs[:2]
    plain_mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    plain = run(plain_attention, inputs, attn_mask=plain_mask, **arguments)
    truth = run(plain_attention, [x.double() for x in inputs], attn_mask=mask, **arguments)
    terms = max(q.shape[2], k.shape[2]) + q.shape[3]
    for name, result, exact, rough in zip(("out", "dq", "dk", "dv"), results, truth, plain):
        assert result.dtype == q.dtype
        assert_as_accurate(result, exact, rough, name, terms=terms)
    return results


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_a_tile(dtype, path, take):
    take(path)
    sizes = ((1, 5), (15, 17), (16, 16), (17, 15), (31, 33), (32, 32), (33, 47))
    for queries, keys in sizes if dtype == torch.float32 else sizes[-1:]:
        check(attention_inputs(AttentionShape(1, 1, queries, keys, WIDTH[path]), dtype))
    if path == "wide":  # three parts of the queries
        check(attention_inputs(AttentionShape(1, 2, 70, 33, WIDTH[path]), dtype))
    if path == "split":
        check(attention_inputs(AttentionShape(1, 2, 20, 100, WIDTH[path]), dtype))


@pytest.mark.parametrize("path", ["short", "long"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS[:-1])
def test_every_head_dim(head_dim, path, take):
    """Every set of pieces."""
    dtype = DTYPES[head_dim // 8 % 3]
    take(path)
    check(attention_inputs(AttentionShape(1, 1, 20, 35, head_dim), dtype))


@pytest.mark.parametrize("head_dim", [8, 40, 72, 104, 160, 256, 512])
def test_as_chosen(head_dim):
    """What the heuristic takes, at sizes that are no multiple of its tiles."""
    for keys in (40, 140):
        dtype = DTYPES[(head_dim + keys) // 8 % 3]
        check(attention_inputs(AttentionShape(1, 1, 20, keys, head_dim), dtype))


@pytest.mark.parametrize("keys", [1, 16, 17, 24, 33, 48, 64, 65, 77, 80, 81, 97, 112, 127, 128])
def test_numbers_of_keys_that_are_held(keys):
    """One tile of keys, two tiles, either with a part past the end."""
    shape = AttentionShape(1, 1, 40, keys, 24)
    check(attention_inputs(shape, torch.float16), is_causal=keys % 2 == 0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, is_causal, path, take):
    """Over several tiles, with tiles above the diagonal, splits without an open key, rows without one."""
    take(path)
    batch = 2 if kind == "padding" else 1
    shape = AttentionShape(batch, 1, *((70, 40) if is_causal else (40, 70)), WIDTH[path])
    mask = attention_mask(shape, kind)
    out, dq, _, _ = check(attention_inputs(shape, torch.float32), mask, is_causal=is_causal)
    if kind not in ("none", "float32-row"):
        dead = (0,) if kind == "padding" else (..., shape.queries // 2, slice(None))
        assert (out[dead] == 0).all()
        assert (dq[dead] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_masks_of_any_strides(path, take):
    take(path)
    inputs = attention_inputs(AttentionShape(2, 2, 10, 20, WIDTH[path]), torch.float32)
    full = torch.randn(2, 2, 10, 20)
    masks = (
        full.transpose(2, 3).contiguous().transpose(2, 3),
        torch.randn(2, 2, 10, 40)[..., ::2],
        full[:1, :, :1].expand(2, 2, 10, 20),
        full[:, :1, :, :1],
        full[0, 0, 0, 0].expand(2, 2, 10, 20),
        full.double(),
        full.double()[:1, :, :1].expand(2, 2, 10, 20),
        full.half(),
        full.bfloat16(),
        full.to(torch.float8_e5m2),
        full.to(torch.float8_e4m3fn),
        full > 0.0,
        (full > 0.0)[:, :, :1, :1],
        (full > 0.0).transpose(0, 1)[:1],
    )
    for mask in masks if path == "long" else masks[:3]:
        check(inputs, mask)


def test_an_expanded_mask_of_another_dtype_is_not_written_out():
    """Its 2^45 numbers would not fit."""
    q = torch.zeros(1, 1, 1, 40).expand(1 << 10, 1 << 10, 1 << 20, 40)
    mask = torch.zeros(1, 1, 1, 40, dtype=torch.float64).expand_as(q)
    read = problem.problem_of(q, q[:, :, :40], mask, False, None).mask
    assert (read.shape, read.dtype) == ((1, 1, 1, 40), torch.float32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "layout", ["different", *ATTENTION_LAYOUTS, "odd strides", "expanded", "last dimension strided"]
)
def test_layouts(layout, path, take):
    take(path)
    shape = AttentionShape(2, 2, 20, 35, 32 if path == "wide" else 24)
    if layout in ATTENTION_LAYOUTS:
        inputs = attention_inputs(shape, torch.float16, layout=layout)
    else:
        q, k, v, grad = inputs = attention_inputs(shape, torch.float16)
        if layout == "odd strides":  # and a start that is not aligned
            inputs = [torch.cat([x[..., :5], x, x[..., :6]], -1)[..., 5:-6] for x in inputs]
            assert inputs[0].stride(2) == shape.head_dim + 11
        elif layout == "different":  # q, grad and dq; k and v, and so dk and dv
            q, grad = (F.pad(x, (0, more))[..., : shape.head_dim] for x, more in ((q, 8), (grad, 16)))
            inputs = q, k, v.transpose(1, 2).contiguous().transpose(1, 2), grad
        elif layout == "expanded":
            inputs = q, k[:, :1].expand_as(k), v[:1].expand_as(v), grad[:, :, :1].expand_as(grad)
        else:
            inputs = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]
    results = check(inputs)
    for result, like in zip(results, (inputs[0], *inputs[:3])):
        assert result.stride() == torch.empty_like(like).stride()


@pytest.mark.parametrize("path", PATHS)
def test_scales(path, take):
    take(path)
    shape = AttentionShape(1, 1, 33, 40, WIDTH[path])
    q, k, v, grad = inputs = attention_inputs(shape, torch.float32)
    for kind, scale in (("none", -0.3), ("bool", 0.0), ("float", -0.3), ("float", 0.0), ("bool", -1e-32)):
        check(inputs, attention_mask(shape, kind), scale=scale)
    for is_causal in (False, True):
        check((6.0 * q, 6.0 * k, v, grad), is_causal=is_causal)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores(dtype, path, take):
    """Rows whose log-sum-exp has no bits left for exp(score - lse), beside ordinary ones and closed ones."""
    take(path)
    shape = AttentionShape(1, 1, 40, 40, WIDTH[path])
    q, k, v, grad = attention_inputs(shape, dtype)
    q[:, :, 2] = 0.0
    mask = torch.zeros(1, 1, shape.queries, shape.keys)
    mask[:, :, 2], mask[:, :, 3] = -1e9, -torch.inf
    mask[:, :, 20] = 1e5
    q[:, :, 20] = 0.0
    mask[:, :, 21] = torch.linspace(100.0, 105.0, shape.keys)  # the largest score comes last
    mask[:, :, 22, -3:] = 200.0  # exp(200) is infinite
    lowest = torch.zeros_like(mask)
    lowest[:, :, 2] = torch.finfo(torch.float32).min
    for bias in (mask, lowest):
        results = ours((q, k, v, grad), bias)
        truth = run(plain_attention, [x.double() for x in (q, k, v, grad)], attn_mask=bias)
        plain = run(plain_attention, [x.float() for x in (q, k, v, grad)], attn_mask=bias)
        for name, result, exact, rough in zip(("out", "dq", "dk", "dv"), results, truth, plain):
            assert_as_accurate(result, exact, rough.to(dtype), name, terms=66)
    # Without a bias, from q and k that agree.
    q[:, :, 5], k[:] = 300.0, 300.0
    results = ours((q, k, v, grad))
    truth = run(plain_attention, [x.double() for x in (q, k, v, grad)])
    plain = run(plain_attention, [x.float() for x in (q, k, v, grad)])
    for name, result, exact, rough in zip(("out", "dq", "dk", "dv"), results, truth, plain):
        if name == "dq":  # 0 by cancellation
            lengths = v.double().norm(dim=-1).max() * grad.double().norm(dim=-1).max()
            eps = torch.finfo(torch.float32 if dtype == torch.float16 and path != "wide" else dtype).eps
            assert result.double().abs().max() <= 0.25 * 300.0 * 2 * 66 * eps * lengths
        else:
            assert_as_accurate(result, exact, rough.to(dtype), name, terms=66)


@pytest.mark.parametrize("path", ["short", "long"])
def test_huge_keys_that_cancel(path, take):
    """dq is 0; in float16 neither the rounding of dS nor that of the output may show in it."""
    take(path)
    q, k, v, grad = attention_inputs(AttentionShape(1, 1, 40, 3, 16), torch.float16)
    q, k, v = q.abs() + 1.0, torch.full_like(k, 300.0), v + 4.0
    dq = ours((q, k, v, grad))[1]
    lengths = v.double().norm(dim=-1).max() * grad.double().norm(dim=-1).max()
    assert dq.double().abs().max() <= 0.25 * 300.0 * 2 * 19 * torch.finfo(torch.float32).eps * lengths


@pytest.mark.parametrize("path", PATHS)
def test_closed_keys_may_hold_the_largest_numbers(path, take):
    """Even where their products overflow to infinity and infinity minus infinity."""
    take(path)
    for dtype, additive in itertools.product(DTYPES, (False, True)):
        q, k, v, grad = attention_inputs(AttentionShape(1, 1, 20, 50, WIDTH[path]), dtype)
        q[:, :, ::2] *= 100.0  # rows whose sums the backward finds anew
        closed = torch.arange(50) % 3 == 0
        mask = ~closed[None, None, None]
        if additive:
            mask = torch.zeros(1, 1, 20, 50).masked_fill(closed, -torch.inf)
        clean = ours((q, k, v, grad), attn_mask=mask)
        largest = torch.finfo(dtype).max
        k[:, :, closed], v[:, :, closed] = largest, largest
        k[:, :, closed, ::2], v[:, :, closed, ::2] = -largest, -largest
        for a, b in zip(clean, ours((q, k, v, grad), attn_mask=mask)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("path", PATHS)
def test_keys_past_the_last_query_may_hold_the_largest_numbers(path, take):
    """No query sees them where is_causal; their tile is one that queries see."""
    take(path)
    for dtype in DTYPES:
        q, k, v, grad = attention_inputs(AttentionShape(1, 1, 20, 50, WIDTH[path]), dtype)
        clean = ours((q, k, v, grad), is_causal=True)
        largest = torch.finfo(dtype).max
        k[:, :, 20:], v[:, :, 20:] = largest, largest
        k[:, :, 20:, ::2], v[:, :, 20:, ::2] = -largest, -largest
        for a, b in zip(clean, ours((q, k, v, grad), is_causal=True)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_row(path, take):
    take(path)
    q, k, v, grad = attention_inputs(AttentionShape(1, 2, 40, 50, WIDTH[path]), torch.float32)
    clean = ours((q, k, v, grad))
    q[0, 1, 5, 3] = torch.nan
    out, dq, dk, dv = ours((q, k, v, grad))
    assert out[0, 1, 5].isnan().all()
    assert dq[0, 1, 5].isnan().all()
    assert dk[0, 1].isnan().all()
    out[0, 1, 5], dq[0, 1, 5] = clean[0][0, 1, 5], clean[1][0, 1, 5]
    assert torch.equal(out, clean[0])
    assert torch.equal(dq, clean[1])
    assert torch.equal(dk[0, 0], clean[2][0, 0])
    assert torch.equal(dv[0, 0], clean[3][0, 0])


@pytest.mark.parametrize("path", PATHS)
def test_log_sum_exp(path, take):
    take(path)
    shape = AttentionShape(2, 2, 40, 50, WIDTH[path])
    q, k, v, _ = (x.to(DEVICE) for x in attention_inputs(shape, torch.float32))
    for kind in ("bool", "float", "padding", "none"):
        mask = attention_mask(shape, kind)
        mask = None if mask is None else mask.to(DEVICE)
        with poisoned_memory():
            _, lse = torch.ops.fastldm.attention(q, k, v, mask, False, -0.2, True, "triton")
            _, absent = torch.ops.fastldm.attention(q, k, v, mask, False, -0.2, False, "triton")
        _, truth = reference.attention(q.double(), k.double(), v.double(), mask, scale=-0.2)
        assert lse.shape == (2, 2, 40)
        assert lse.is_contiguous()
        assert absent.shape == (0,)
        torch.testing.assert_close(lse.double(), truth, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_runs_are_bit_equal(path, take):
    take(path)
    inputs = attention_inputs(AttentionShape(1, 2, 70, 50, 32), torch.bfloat16)
    first, second = ours(inputs, is_causal=True), ours(inputs, is_causal=True)
    for a, b in zip(first, second):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", ["short", "long"])
def test_heads_do_not_depend_on_each_other(path, take):
    take(path)
    inputs = attention_inputs(AttentionShape(2, 3, 50, 40, 16), torch.bfloat16)
    whole = ours(inputs)
    one = ours([x[1:, 2:] for x in inputs])
    for a, b in zip(one, whole):
        assert torch.equal(a, b[1:, 2:])


def test_pieces_are_tight():
    assert problem.pieces(40) == (32, 16, 0)
    assert problem.pieces(104) == (64, 32, 16)
    for head_dim in range(8, 257, 8):
        found = [d for d in problem.pieces(head_dim) if d]
        assert all(d >= 16 and d & (d - 1) == 0 for d in found)
        assert sum(found[:-1]) < head_dim <= sum(found)
        # Four pieces are not to be had: 240 = 128 + 64 + 32 + 16.
        assert sum(found) - head_dim < 16 or head_dim > 224


def plan(shape, dtype=torch.bfloat16, capability=90):
    q, k = (
        torch.empty(shape.batch, shape.heads, length, shape.head_dim, dtype=dtype, device="meta")
        for length in (shape.queries, shape.keys)
    )
    call = problem.problem_of(q, k, None, False, None)
    return plans.plan_forward(q, k, k, call, True, target.KNOWN[capability])[0], call


def test_few_queries_and_many_keys_are_split():
    launches, _ = plan(AttentionShape(1, 1, 64, 16384, 64))
    assert len(launches) == 2
    assert launches[0].grid[0] > 1
    launches, _ = plan(AttentionShape(2, 8, 4096, 4096, 64))
    assert len(launches) == 1


def test_weights_of_a_wide_head_stay_within_the_workspace():
    launches, _ = plan(AttentionShape(1, 1, 16384, 16384, 512))
    weights = launches[0].arguments["weights_ptr"]
    assert weights.numel() * weights.element_size() <= wide.WORKSPACE
    assert len(launches) == 8


def test_refusals():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(UnsupportedError, match="float64"):
        ops.attention(q.double(), q.double(), q.double(), backend="triton")
    meta = q.to("meta")
    arguments = (meta, meta, meta, None, False, None, False)
    with pytest.raises(UnsupportedError, match="not on meta"):
        dispatch.run("attention", "forward", "triton", arguments, dispatch.current_state())


# A kernel that is wrong must fail the error rule: module, what the source says, what it says then, path.
MUTATIONS = {
    "sum not rescaled": ("forward", "total = total * shrink +", "total = total +", "long"),
    "accumulator not rescaled": (
        "forward",
        "scale_rows(shrink, acc0",
        "scale_rows(shrink * 0.0 + 1.0, acc0",
        "long",
    ),
    "last tile dropped": (
        "forward",
        "tl.range(tl.maximum(first, whole), last,",
        "tl.range(last, last,",
        "long",
    ),
    "diagonal open": (
        "forward",
        "NEGATE, MASK, BIAS, CAUSAL, True,\n        )",
        "NEGATE, MASK, BIAS, False, True,\n        )",
        "long",
    ),
    "split out of step": ("forward", "weight * part_total", "part_total", "split"),
    "keys past the end count": (
        "short",
        "NEGATE, MASK, BIAS, CAUSAL, True,",
        "NEGATE, MASK, BIAS, CAUSAL, False,",
        "short",
    ),
    "second tile of keys dropped": (
        "short",
        "outer(rounded_to(r, vb0.dtype)",
        "outer(rounded_to(r * 0.0, vb0.dtype)",
        "short",
    ),
    "no delta, few keys": ("short", "(dp - tl.sum(p * dp, 0)[None, :])", "dp", "short"),
    "a chunk dropped": ("short", "for chunk in range(chunks):", "for chunk in range(chunks - 1):", "short"),
    "no delta": ("backward", "ds = p * (dp - delta)", "ds = p * dp", "long"),
    "dk not scaled": (
        "backward",
        "tl.zeros([BLOCK_N], tl.float32) + grad_scale",
        "tl.zeros([BLOCK_N], tl.float32) + 1.0",
        "long",
    ),
    "lse trusted where it is huge": (
        "statistics",
        "factor = tl.where(large, 1.0 / total, factor)",
        "factor = factor",
        "long",
    ),
    "first queries of a key tile dropped": (
        "backward",
        "for start in tl.range(diagonal, first,",
        "for start in tl.range(first, first,",
        "long",
    ),
    "tiles not brought together": (
        "wide_forward",
        "p = tl.load(weights + start).to(tl.float32) * factor[:, None]",
        "p = tl.load(weights + start).to(tl.float32)",
        "wide",
    ),
    "parts not added": (
        "wide_backward",
        "        acc = tl.load(sums + places)",
        "        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)",
        "wide",
    ),
}


def mutant(tmp_path, name, old, new):
    """The module `name` of kernels/attention with `old` replaced in its source."""
    original = importlib.import_module(f"fastldm.kernels.attention.{name}")
    with open(original.__file__, encoding="utf-8") as file:
        source = file.read()
    assert old in source, "the source that the mutation is about has changed"
    path = tmp_path / f"{name}_mutant.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"fastldm.kernels.attention.{name}_mutant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def probe_mutations(path):
    """Calls that together notice every mutation."""
    shape = AttentionShape(1, 1, 50, 77, WIDTH[path])
    q, k, v, grad = attention_inputs(shape, torch.float32)
    check((3.0 * q, 3.0 * k, v, grad))
    check((q, k, v, grad), is_causal=True)
    bias = torch.zeros(1, 1, shape.queries, shape.keys)
    bias[:, :, 2] = -1e9
    q[:, :, 2] = 0.0
    check((q, k, v, grad), bias)


@pytest.mark.parametrize("path", PATHS)
def test_the_mutation_calls_pass(path, take):
    take(path)
    probe_mutations(path)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_fails(name, take, tmp_path, monkeypatch):
    module, old, new, path = MUTATIONS[name]
    take(path)
    broken = mutant(tmp_path, module, old, new)
    for user in ("plans", "backward", "wide_backward"):
        user = importlib.import_module(f"fastldm.kernels.attention.{user}")
        for planned in (name for name in vars(broken) if name.startswith("plan_") and hasattr(user, name)):
            monkeypatch.setattr(user, planned, getattr(broken, planned))
    with pytest.raises(AssertionError, match=r"max error|elements are"):
        probe_mutations(path)


# What only a GPU can show.


def on_gpu(shape, dtype, mask=None, **arguments):
    """`check` with the truth in float32 on the GPU, for layers at their own size."""
    inputs = [x.cuda() for x in attention_inputs(shape, dtype)]
    with poisoned_memory():
        results = run(ops.attention, inputs, attn_mask=mask, backend="triton", **arguments)
    plain = run(plain_attention, inputs, attn_mask=mask, **arguments)
    truth = run(plain_attention, [x.double() for x in inputs], attn_mask=mask, **arguments)
    terms = max(shape.queries, shape.keys) + shape.head_dim
    for name, result, exact, rough in zip(("out", "dq", "dk", "dv"), results, truth, plain):
        assert_as_accurate(result, exact, rough, name, terms=terms)
    return inputs, results


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTION_LAYERS)
def test_layers_at_their_own_size(name, dtype):
    shape = ATTENTION_LAYERS[name]
    if shape.queries * shape.keys > 2**22:  # one head of float64 scores is 128 MB
        shape = shape._replace(batch=1, heads=2 if shape.heads > 1 else 1)
    inputs, results = on_gpu(shape, dtype)
    for a, b in zip(results, run(ops.attention, inputs, backend="triton")):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_compiled_kernels_of_every_head_dim(head_dim):
    for keys, is_causal in itertools.product((77, 300), (False, True)):
        shape = AttentionShape(1, 2, 260, keys, head_dim)
        dtype = DTYPES[(head_dim // 8 + keys) % 3]
        on_gpu(shape, dtype, is_causal=is_causal)
        on_gpu(shape, dtype, attention_mask(shape, "bool").cuda(), is_causal=is_causal)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [77, 512])
@pytest.mark.parametrize("head_dim", [40, 512])
def test_streams_and_graphs(head_dim, keys):
    shape = AttentionShape(2, 2, 512, keys, head_dim)
    inputs = [x.cuda() for x in attention_inputs(shape, torch.bfloat16)]
    mask = attention_mask(shape, "padding").cuda()

    def step():
        return run(ops.attention, inputs, attn_mask=mask, backend="triton")

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        inputs[2].add_(0.0)
        elsewhere = step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(expected, elsewhere, captured):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    inputs = attention_inputs(AttentionShape(1, 2, 70, 90, 40), torch.bfloat16)
    first, second = (
        run(ops.attention, [x.to(device) for x in inputs], backend="triton")
        for device in ("cuda:0", "cuda:1")
    )
    for a, b in zip(first, second):
        assert b.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [77, 1024])
def test_more_than_2_31_elements(keys):
    """The last head of many, with the same head alone beside it."""
    shape = AttentionShape(1100, 32, 1024, keys, 64)  # 2.3e9 elements of q
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GB")
    q, k, v, grad = (
        torch.randn(shape.batch, shape.heads, n, 64, dtype=torch.bfloat16, device="cuda")
        for n in (shape.queries, keys, keys, shape.queries)
    )
    whole = run(ops.attention, (q, k, v, grad), backend="triton")
    alone = run(ops.attention, [x[-1:, -1:].contiguous() for x in (q, k, v, grad)], backend="triton")
    for a, b in zip(alone, whole):
        torch.testing.assert_close(a, b[-1:, -1:], rtol=2e-2, atol=2e-2)

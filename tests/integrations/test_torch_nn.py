"""`fastldm.apply` on modules of torch.nn: the results, the gradients and the calls that PyTorch keeps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd import forward_ad

import fastldm
from fastldm.errors import UnsupportedError
from fastldm.testing import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@torch.no_grad()
def both(module: nn.Module, *inputs, **named) -> tuple:
    """Results of a module as it is, after apply, and (in float64) the truth."""
    plain = module(*inputs, **named)
    double = {key: x.double() if is_float(x) else x for key, x in named.items()}
    truth = copy.deepcopy(module).double()(*(x.double() if is_float(x) else x for x in inputs), **double)
    with fastldm.record() as calls:
        fastldm.apply(module)
        result = module(*inputs, **named)
    return result, truth, plain, calls


def is_float(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 6, 5), (1, 8, 2, 3, 4)])
def test_group_norm(shape, affine, dtype):
    x = torch.randn(shape).to(dtype)
    result, truth, plain, calls = both(nn.GroupNorm(2, 8, affine=affine).to(dtype), x)
    assert [call.op for call in calls.calls] == ["group_norm"]
    assert_as_accurate(result, truth, plain, terms=x[0].numel())


def test_group_norm_keeps_the_layout():
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    norm = nn.GroupNorm(2, 8)
    fastldm.apply(norm)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)


def test_group_norm_of_six_dimensions_is_left_to_pytorch():
    x, norm = torch.randn(2, 8, 2, 2, 2, 2), nn.GroupNorm(2, 8)
    plain = norm(x)
    fastldm.apply(norm)
    with fastldm.record() as calls:
        assert torch.equal(norm(x), plain)
    assert [(call.op, call.backend) for call in calls.calls] == [("group_norm", "torch")]
    assert "6 dimensions" in calls.calls[0].fallback


def test_sequential_folds_the_silu_in():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.GroupNorm(4, 8), nn.ReLU(), nn.SiLU()
    )
    x = torch.randn(2, 3, 9, 7)
    plain, truth = model(x), copy.deepcopy(model).double()(x.double())
    report = fastldm.apply(model)
    assert [(entry.path, entry.was) for entry in report.entries] == [("", "Sequential"), ("3", "GroupNorm")]
    silu_calls = []
    model[2].register_forward_hook(lambda *args: silu_calls.append(1))
    handle = model[2]._forward_hooks
    model(x)
    assert silu_calls == [1], "a SiLU with a hook is called"
    handle.clear()
    with fastldm.record() as calls:
        result = model(x)
    assert [call.op for call in calls.calls] == ["group_norm", "group_norm"]
    assert_as_accurate(result, truth, plain, terms=100)


def test_a_hook_on_the_norm_of_a_sequential_still_runs():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    fastldm.apply(model)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 8, 4)
    torch.testing.assert_close(model(x), F.silu(seen[0]))


def test_gradients_through_a_sequential():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv1d(8, 4, 3))
    fused, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fastldm.apply(fused)
    x = torch.randn(2, 8, 300)
    for net, given in ((model, x), (fused, x), (exact, x.double())):
        net(given).square().sum().backward()
    for ours, truth, plain in zip(fused.parameters(), exact.parameters(), model.parameters()):
        assert_as_accurate(ours.grad, truth.grad, plain.grad, terms=2 * 300 * 8)


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3])},
    "bool": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(1)},
    "float": {"attn_mask": torch.linspace(-3, 3, 35).reshape(5, 7)},
    "per head": {"attn_mask": (torch.arange(2 * 4 * 5 * 7).reshape(8, 5, 7) % 3) == 1},
    "two": {
        "attn_mask": torch.linspace(-3, 3, 35).reshape(5, 7),
        "key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3]),
    },
    "two bool": {
        "attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3]),
    },
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", ["batch first", "sequence first", "other widths", "no bias"])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_multihead_attention(kind, masks):
    widths = {"kdim": 12, "vdim": 20} if kind == "other widths" else {}
    first = kind != "sequence first"
    attention = nn.MultiheadAttention(32, 4, batch_first=first, bias=kind != "no bias", **widths).eval()
    if kind != "no bias":
        nn.init.normal_(attention.in_proj_bias)
    query = torch.randn(2, 5, 32)
    key, value = torch.randn(2, 7, widths.get("kdim", 32)), torch.randn(2, 7, widths.get("vdim", 32))
    if not first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    (result, weights), (truth, _), (plain, _), calls = both(
        attention, query, key, value, need_weights=False, **masks
    )
    assert weights is None
    assert [call.op for call in calls.calls] == ["attention"]
    assert calls.calls[0].fallback is None
    assert_as_accurate(result, truth, plain, terms=32 * 7)


def test_self_attention_with_gradients():
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    fused, exact = copy.deepcopy(attention), copy.deepcopy(attention).double()
    fastldm.apply(fused)
    x = torch.randn(2, 6, 32)
    for net, given in ((attention, x), (fused, x), (exact, x.double())):
        net(given, given, given, need_weights=False)[0].square().sum().backward()
    for ours, truth, plain in zip(fused.parameters(), exact.parameters(), attention.parameters()):
        assert_as_accurate(ours.grad, truth.grad, plain.grad, terms=2 * 6 * 32)


@pytest.mark.parametrize(
    ("reason", "options", "inputs", "named"),
    [
        ("need_weights", {}, (2, 5, 32), {}),
        ("dropout", {"dropout": 0.5}, (2, 5, 32), {"need_weights": False}),
        ("batch", {}, (5, 32), {"need_weights": False}),
        ("need_weights", {}, (2, 5, 32), {"average_attn_weights": False}),
    ],
)
def test_what_multihead_attention_leaves_to_pytorch(reason, options, inputs, named):
    attention, x = nn.MultiheadAttention(32, 4, batch_first=True, **options), torch.randn(inputs)
    torch.manual_seed(0)
    plain = attention(x, x, x, **named)
    fastldm.apply(attention)
    torch.manual_seed(0)
    with fastldm.record() as calls:
        result = attention(x, x, x, **named)
    torch.testing.assert_close(result, plain, rtol=0, atol=0)
    assert reason in calls.calls[0].fallback
    fastldm.apply(attention, backend="reference")
    with pytest.raises(UnsupportedError, match=reason):
        attention(x, x, x, **named)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_multihead_attention_with_keys_of_its_own_is_skipped(option):
    report = fastldm.apply(nn.MultiheadAttention(32, 4, **{option: True}))
    assert [entry.skipped for entry in report.entries] == [
        "it adds keys of its own (add_bias_kv, add_zero_attn)"
    ]


class Attends(nn.Module):
    """A class of a user's own, with PyTorch's attention behind a global name."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.proj = nn.Linear(24, 24)

    def forward(self, q, k=None, v=None):
        k, v = q if k is None else k, q if v is None else v
        return F.scaled_dot_product_attention(self.proj(q), k, v, **self.options)


class AttendsByTorch(Attends):
    def forward(self, q):
        return torch.nn.functional.scaled_dot_product_attention(self.proj(q), q, q)


@pytest.mark.parametrize("cls", [Attends, AttendsByTorch])
def test_a_class_of_ones_own(cls):
    module, x = cls(), torch.randn(2, 3, 10, 24)
    (entry,) = fastldm.apply(module).entries
    assert "attention_classes" in entry.skipped
    plain, truth = module(x), copy.deepcopy(module).double()(x.double())
    fastldm.apply(module, attention_classes=[cls])
    with fastldm.record() as calls:
        result = module(x)
    assert calls.backends().keys() == {"attention"}
    assert_as_accurate(result, truth, plain, terms=24 * 10)


SHAPES = {
    "head dim of no kernel": ((2, 3, 10, 20), (2, 3, 7, 20), {}),
    "scale and a head dim of no kernel": ((2, 3, 10, 20), (2, 3, 7, 20), {"scale": 0.3}),
    "mask of two dimensions for three": ((6, 10, 24), (6, 7, 24), {"attn_mask": torch.rand(10, 7) > 0.3}),
    "three dimensions": ((6, 10, 24), (6, 7, 24), {"attn_mask": torch.rand(6, 10, 7) > 0.3}),
    "grouped queries": ((2, 6, 10, 24), (2, 2, 7, 24), {"enable_gqa": True}),
    "mask of two dimensions": ((7, 3, 7, 24), (7, 3, 7, 24), {"attn_mask": torch.rand(7, 7) > 0.3}),
    "causal": ((2, 3, 10, 24), (2, 3, 7, 24), {"is_causal": True}),
    "scale": ((2, 3, 10, 24), (2, 3, 7, 24), {"scale": 0.3}),
}


@pytest.mark.parametrize(("q_shape", "k_shape", "options"), SHAPES.values(), ids=SHAPES)
def test_shapes_and_options_of_sdpa(q_shape, k_shape, options):
    module = Attends(**options)
    module.proj = nn.Identity()
    q, k, v = torch.randn(q_shape), torch.randn(k_shape), torch.randn(k_shape)
    plain = module(q, k, v)
    truth = copy.deepcopy(module)(q.double(), k.double(), v.double())
    fastldm.apply(module, attention_classes=[Attends])
    with fastldm.record() as calls:
        result = module(q, k, v)
    assert [call.fallback for call in calls.calls] == [None]
    assert_as_accurate(result, truth, plain, terms=24 * 7)


LEFT = {
    "dropout": ((2, 3, 10, 24), (2, 3, 10, 24), {"dropout_p": 0.5}),
    "dimensions": ((1, 2, 3, 10, 24), (1, 2, 3, 10, 24), {}),
    "different shapes": ((2, 3, 10, 24), (2, 3, 10, 24), {}),
    "broadcast": ((2, 3, 10, 24), (1, 3, 10, 24), {}),
    "head dim of 0": ((2, 3, 10, 0), (2, 3, 10, 0), {}),
    "head dim": ((2, 3, 10, 520), (2, 3, 10, 520), {}),
    "requires grad": ((2, 3, 10, 24), (2, 3, 10, 24), {"attn_mask": torch.zeros(10, 10, requires_grad=True)}),
}


@pytest.mark.parametrize(("q_shape", "k_shape", "options"), LEFT.values(), ids=LEFT)
def test_what_sdpa_keeps(request, q_shape, k_shape, options):
    module = Attends(**options)
    module.proj = nn.Identity()
    q, k = torch.randn(q_shape), torch.randn(k_shape)
    v = k[..., :16] if request.node.callspec.id == "different shapes" else k
    torch.manual_seed(0)
    plain = module(q, k, v)
    fastldm.apply(module, attention_classes=[Attends])
    torch.manual_seed(0)
    with fastldm.record() as calls:
        assert torch.equal(module(q, k, v), plain)
    assert calls.calls[0].backend == "torch"
    assert request.node.callspec.id in calls.calls[0].fallback
    fastldm.apply(module, attention_classes=[Attends], backend="reference")
    with pytest.raises(UnsupportedError, match=request.node.callspec.id):
        module(q, k, v)


def test_multihead_attention_sequence_first_can_be_viewed():
    attention, x = nn.MultiheadAttention(32, 4), torch.randn(5, 2, 32)
    strides = attention(x, x, x, need_weights=False)[0].stride()
    fastldm.apply(attention)
    assert attention(x, x, x, need_weights=False)[0].stride() == strides


@pytest.mark.parametrize("padded", [False, True])
def test_is_causal_of_multihead_attention(padded):
    """It stands for the mask, whatever that holds, where it is the only one."""
    attention, x = nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 5, 32)
    named = {"need_weights": False, "is_causal": True, "attn_mask": torch.randn(5, 5)}
    if padded:
        named["key_padding_mask"] = torch.tensor([[0.0] * 5, [0.0] * 3 + [-torch.inf] * 2])
    (result, _), (truth, _), (plain, _), calls = both(attention, x, x, x, **named)
    assert calls.calls[0].fallback is None
    assert_as_accurate(result, truth, plain, terms=32 * 5)


UNFIT = {
    "causal without a mask": ((2, 6, 32), (2, 6, 32), {"is_causal": True}),
    "lengths": ((2, 6, 32), (2, 5, 32), {}),
    "batches": ((1, 6, 32), (1, 6, 32), {}),
    "mask of one query": ((2, 6, 32), (2, 6, 32), {"attn_mask": torch.zeros(1, 6)}),
    "mask of one head": ((2, 6, 32), (2, 6, 32), {"attn_mask": torch.zeros(1, 4, 6)}),
    "mask of numbers": ((2, 6, 32), (2, 6, 32), {"attn_mask": torch.ones(4, 6, dtype=torch.int64)}),
    "padding": ((2, 6, 32), (2, 6, 32), {"key_padding_mask": torch.zeros(1, 6, dtype=torch.bool)}),
}


@pytest.mark.parametrize(("k_shape", "v_shape", "named"), UNFIT.values(), ids=UNFIT)
def test_multihead_attention_refuses_what_pytorch_refuses(k_shape, v_shape, named):
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    inputs = torch.randn(2, 4, 32), torch.randn(k_shape), torch.randn(v_shape)
    messages = []
    for change in (lambda module: None, fastldm.apply):
        change(attention)
        with pytest.raises((RuntimeError, AssertionError)) as raised:
            attention(*inputs, need_weights=False, **named)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def attend_to_oneself(module, x):
    return module(x, x, x, need_weights=False)[0]


def call(module, x):
    return module(x)


MODULES = {
    "norm": (lambda: nn.GroupNorm(2, 8), (2, 8, 5), call),
    "sequential": (
        lambda: nn.Sequential(nn.Conv1d(8, 8, 1), nn.GroupNorm(2, 8), nn.SiLU()),
        (2, 8, 5),
        call,
    ),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (2, 5, 8), attend_to_oneself),
    "own class": (AttendsByTorch, (2, 3, 10, 24), call),
}


def grad_of_weights(module, x, run):
    def loss(weights, x):
        with torch.nn.utils.stateless._reparametrize_module(module, weights):
            return run(module, x).square().sum()

    return list(torch.func.grad(loss)(dict(module.named_parameters()), x).values())


def per_sample(module, x, run):
    return [torch.func.vmap(torch.func.grad(lambda x: run(module, x[None]).square().sum()))(x)]


def jvp(module, x, run):
    return list(torch.func.jvp(lambda x: run(module, x), (x,), (x.cos(),)))


def dual(module, x, run):
    with forward_ad.dual_level():
        return list(forward_ad.unpack_dual(run(module, forward_ad.make_dual(x, x.cos()))))


@pytest.mark.parametrize("differentiate", [grad_of_weights, per_sample, jvp, dual])
@pytest.mark.parametrize("name", MODULES)
def test_torch_func_is_left_to_pytorch(name, differentiate):
    make, shape, run = MODULES[name]
    module, x = make(), torch.randn(shape)

    def results():
        # Of PyTorch's attentions one has a forward mode.
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return differentiate(module, x, run)

    plain = results()
    fastldm.apply(module, attention_classes=[AttendsByTorch])
    with fastldm.record() as calls:
        found = results()
    assert all("torch.func" in one.fallback for one in calls.calls)
    assert calls.calls
    assert len(found) == len(plain) > 0
    for ours, theirs in zip(found, plain):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    fastldm.apply(module, attention_classes=[AttendsByTorch], backend="reference")
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        results()


@pytest.mark.parametrize("name", ["norm", "sequential", "own class"])
def test_fx_traces_as_before(name):
    make, shape, _ = MODULES[name]
    module, x = make(), torch.randn(shape)
    plain = module(x)
    fastldm.apply(module, attention_classes=[AttendsByTorch])
    with fastldm.record():
        traced = fx.symbolic_trace(module)
    torch.testing.assert_close(traced(x), plain)


@pytest.mark.parametrize("name", ["norm", "sequential", "attention"])
def test_torchscript_compiles_the_originals(name):
    make, shape, run = MODULES[name]
    module, x = make(), torch.randn(shape)
    plain = run(module, x)
    fastldm.apply(module)
    scripted = torch.jit.script(module)
    assert torch.equal(run(scripted, x), plain)
    assert list(scripted.state_dict()) == list(module.state_dict())
    with fastldm.record() as calls:
        run(module, x)
    assert calls.calls


@pytest.mark.parametrize("width", [20, 7])
def test_the_result_of_a_padded_head_dim_can_be_viewed(width):
    module = Attends()
    module.proj = nn.Identity()
    x = torch.randn(2, 10, 3, width)
    inputs = (x.transpose(1, 2).contiguous(), x.transpose(1, 2))
    plain = [module(x).stride() for x in inputs]
    fastldm.apply(module, attention_classes=[Attends])
    assert [module(x).stride() for x in inputs] == plain


class ImportsItself(nn.Module):
    def forward(self, x):
        from torch.nn import functional

        return functional.scaled_dot_product_attention(torch.nn.functional.silu(x), x, x)


class HasItsOwn(nn.Module):
    def scaled_dot_product_attention(self, x):
        return x

    def forward(self, x):
        return F.silu(self.scaled_dot_product_attention(x))


@pytest.mark.parametrize("cls", [ImportsItself, HasItsOwn])
def test_what_does_not_call_attention_by_a_global_name(cls):
    assert fastldm.apply(cls()).entries == []
    with pytest.raises(ValueError, match="by a global name"):
        fastldm.apply(cls(), attention_classes=[cls])


@pytest.mark.parametrize("same", ["query and key", "key and value", "query and value"])
def test_two_of_query_key_value_are_one(same):
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x, y = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    inputs = {"query and key": (x, x, y), "key and value": (x, y, y), "query and value": (x, y, x)}[same]
    (result, _), (truth, _), (plain, _), _ = both(attention, *inputs, need_weights=False)
    assert_as_accurate(result, truth, plain, terms=32 * 5)


def test_multihead_attention_in_eval_mode_has_no_dropout():
    attention, x = nn.MultiheadAttention(32, 4, dropout=0.5).eval(), torch.randn(2, 5, 32)
    fastldm.apply(attention)
    with fastldm.record() as calls:
        attention(x, x, x, need_weights=False)
    assert calls.calls[0].fallback is None


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_left_to_pytorch():
    attention, own = nn.MultiheadAttention(8, 2, batch_first=True).eval(), AttendsByTorch()
    own.proj = nn.Identity()
    rows = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    heads = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)])
    plain = [attend_to_oneself(attention, rows), own(heads)]
    fastldm.apply(attention)
    fastldm.apply(own, attention_classes=[AttendsByTorch])
    for ours, theirs in zip([attend_to_oneself(attention, rows), own(heads)], plain):
        assert torch.equal(ours.to_padded_tensor(0.0), theirs.to_padded_tensor(0.0))


@pytest.mark.parametrize("width", [20, 24])
def test_attention_under_autocast(width):
    module = AttendsByTorch()
    module.proj = nn.Identity()
    x = torch.randn(2, 3, 10, width)
    with torch.autocast("cpu", torch.bfloat16):
        plain = module(x)
        fastldm.apply(module, attention_classes=[AttendsByTorch])
        result = module(x)
    assert result.dtype == plain.dtype == torch.bfloat16
    assert_as_accurate(result, AttendsByTorch.forward(module, x.double()), plain, terms=width * 10)


class AttendsInside(nn.Module):
    def forward(self, x):
        return (lambda q: F.scaled_dot_product_attention(q, q, q))(x)


def test_a_call_in_an_inner_function():
    module = AttendsInside()
    fastldm.apply(module, attention_classes=[AttendsInside])
    with fastldm.record() as calls:
        module(torch.randn(2, 3, 10, 24))
    assert [call.op for call in calls.calls] == ["attention"]


def test_a_call_behind_many_names():
    """Whose numbers in the code take two bytes."""
    names = "\n".join(f"    x.a{i} = 0" for i in range(300))
    scope = {"nn": nn}
    exec(
        f"def forward(self, x):\n{names}\n    return nn.functional.scaled_dot_product_attention(x, x, x)",
        scope,
    )
    cls = type("Many", (nn.Module,), {"forward": scope["forward"]})
    assert len(fastldm.apply(cls(), attention_classes=[cls]).replaced) == 1


def test_a_mask_that_is_causal_too_is_pytorchs_to_judge():
    """Some versions take both, others refuse them."""
    module = Attends(is_causal=True, attn_mask=torch.zeros(10, 10))
    q = torch.randn(2, 3, 10, 24)

    def outcome():
        try:
            return module(q).tolist()
        except RuntimeError as error:
            return str(error)

    plain = outcome()
    fastldm.apply(module, attention_classes=[Attends])
    with fastldm.record() as calls:
        assert outcome() == plain
    assert "causal too" in calls.calls[0].fallback


PADDING = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])


@pytest.mark.parametrize("masks", [{}, {"src_key_padding_mask": PADDING}], ids=["plain", "padding"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_past_the_fast_path_of_pytorch(norm_first, masks):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first).eval()
    x = torch.randn(2, 6, 32)
    result, truth, plain, calls = both(layer, x, **masks)
    assert [call.op for call in calls.calls] == ["attention"]
    assert fastldm.verify(layer, x, **masks)
    assert_as_accurate(result, truth, plain, terms=2 * 64)
    (entry,) = fastldm.apply(layer, backend="reference").entries
    assert entry.was == "TransformerEncoderLayer"
    with torch.no_grad(), fastldm.record() as calls:
        layer(x, **masks)
    assert calls.backends() == {"attention": ["reference"]}


def test_gradients_through_an_encoder_layer():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    fused, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()
    fastldm.apply(fused)
    x = torch.randn(2, 6, 32)
    for net, given in ((layer, x), (fused, x), (exact, x.double())):
        net(given).pow(3).sum().backward()
    for ours, truth, plain in zip(fused.parameters(), exact.parameters(), layer.parameters()):
        assert_as_accurate(ours.grad, truth.grad, plain.grad, terms=2 * 6 * 64)


def test_nested_tensors_go_to_pytorch():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        plain = encoder(x, src_key_padding_mask=PADDING)
        fastldm.apply(encoder)
        with fastldm.record() as calls:
            result = encoder(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(result, plain)
    assert len(calls.calls) == 2


class Derived(nn.GroupNorm):
    pass


def test_a_class_derived_from_group_norm_is_listed():
    (entry,) = fastldm.apply(nn.ModuleDict({"norm": Derived(2, 8)})).entries
    assert (entry.path, entry.was) == ("norm", "Derived")
    assert "derived from nn.GroupNorm" in entry.skipped


class Inherits(Attends):
    pass


def test_a_forward_that_is_inherited_counts():
    module, x = Inherits(), torch.randn(2, 3, 10, 24)
    assert "attention_classes" in fastldm.apply(module).entries[0].skipped
    fastldm.apply(module, attention_classes=Inherits)
    with torch.no_grad(), fastldm.record() as calls:
        module(x)
    assert calls.backends().keys() == {"attention"}


def test_layers_of_fastldm_are_not_listed():
    model = nn.ModuleList([fastldm.nn.GroupNorm(2, 8), fastldm.nn.Attention(16, heads=2, dim_head=8)])
    assert fastldm.apply(model).entries == []

"""`fastldm.apply`, `revert`, `applied`, `verify`, `warmup`: what they touch, report and refuse."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastldm
from fastldm.errors import InputError, InputTypeError, UnsupportedError
from fastldm.integrations import swapping


class Attends(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.to_q = nn.Linear(width, width)

    def forward(self, x):
        q = self.to_q(x).unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class Net(nn.Module):
    """Every rule of torch.nn once; `attends` is known only where its class is named."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU())
        self.norm = nn.GroupNorm(2, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.attends = Attends()

    def forward(self, x):
        x = self.norm(self.block(x)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.attends(x).transpose(1, 2)


REPLACED = [
    ("block", "group_norm"),
    ("norm", "group_norm"),
    ("attention", "attention"),
    ("attends", "attention"),
]


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(2, 16, 12)


def ops_of(net, x) -> list[str]:
    with torch.no_grad(), fastldm.record() as calls:
        net(x)
    return [call.op for call in calls.calls]


def apply(net, **options):
    return fastldm.apply(net, attention_classes=[Attends], **options)


def test_report(net, x):
    assert ops_of(net, x) == []
    report = apply(net)
    assert [(entry.path, entry.op) for entry in report.entries] == REPLACED
    assert report.skipped == []
    entry = report.to_dict()["entries"][0]
    assert entry == {
        "path": "block",
        "op": "group_norm",
        "was": "Sequential",
        "now": "group norm + SiLU (1+2)",
        "backend": "auto",
        "skipped": None,
    }
    assert "replaced: 2 attention, 2 group_norm; skipped: 0" in str(report)
    assert ops_of(net, x) == [op for _, op in REPLACED]


def test_an_unknown_class_is_listed(net, x):
    report = fastldm.apply(net)
    (skipped,) = report.skipped
    assert (skipped.path, skipped.op, skipped.was, skipped.now) == ("attends", "attention", "Attends", None)
    assert "attention_classes" in skipped.skipped
    assert ops_of(net, x) == ["group_norm", "group_norm", "attention"]
    with pytest.raises(UnsupportedError, match="'attends'"):
        fastldm.apply(Net(), strict=True)


def test_strict_changes_nothing_where_it_raises(net, x):
    with pytest.raises(UnsupportedError):
        fastldm.apply(net, strict=True)
    assert ops_of(net, x) == []
    assert apply(net, strict=True).skipped == []


@torch.no_grad()
def test_revert_is_bit_identical_and_may_be_called_twice(net, x):
    before, classes = net(x), [type(module) for module in net.modules()]
    apply(net)
    fastldm.revert(net)
    fastldm.revert(net)
    assert torch.equal(net(x), before)
    assert [type(module) for module in net.modules()] == classes
    assert ops_of(net, x) == []


def test_what_survives(net):
    keys, classes = list(net.state_dict()), [type(module) for module in net.modules()]
    tensors = {name: parameter for name, parameter in net.named_parameters()}
    apply(net)
    assert list(net.state_dict()) == keys
    assert all(parameter is tensors[name] for name, parameter in net.named_parameters())
    for module, cls in zip(net.modules(), classes):
        assert isinstance(module, cls)
        assert type(module).__name__ == cls.__name__
        assert type(module).__module__ == cls.__module__


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": lambda net: _saved(net),
}


def _saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_stay_applied_and_revert(net, x, copied):
    before = net(x)
    apply(net, backend="reference")
    result = net(x)
    other = copied(net)
    assert torch.equal(other(x), result)
    assert ops_of(other, x) == [op for _, op in REPLACED]
    fastldm.revert(other)
    assert torch.equal(other(x), before)
    assert ops_of(net, x) == [op for _, op in REPLACED]


def test_other_instances_of_the_classes_stay_as_they_are(net, x):
    apply(net)
    assert ops_of(Net().eval(), x) == []
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


@pytest.mark.parametrize("op", ["attention", "group_norm"])
def test_ops(net, x, op):
    report = apply(net, ops=[op])
    assert {entry.op for entry in report.entries} == {op}
    assert set(ops_of(net, x)) == {op}


def test_filter_sees_paths_and_modules(net, x):
    seen = []

    def keep(path, module):
        seen.append((path, type(module)))
        return path not in ("block", "attention")

    report = apply(net, filter=keep)
    assert ("block.0", nn.Conv1d) in seen
    # Without its Sequential a norm is replaced by itself.
    assert [entry.path for entry in report.entries] == ["block.1", "norm", "attends"]
    assert ops_of(net, x) == ["group_norm", "group_norm", "attention"]


def test_backend_is_a_requirement(net, x):
    apply(net, backend="reference")
    with torch.no_grad(), fastldm.record() as calls:
        net(x)
    assert calls.backends() == {"attention": ["reference"], "group_norm": ["reference"]}


def test_a_backend_that_is_not_there(net, x):
    with pytest.raises(UnsupportedError, match="backend 'cuda' cannot run attention: "):
        apply(net, backend="cuda")
    assert ops_of(net, x) == []


def test_a_second_apply_replaces_the_first(net, x):
    apply(net, backend="torch")
    report = apply(net, backend="reference")
    assert [entry.was for entry in report.entries] == [
        "Sequential",
        "GroupNorm",
        "MultiheadAttention",
        "Attends",
    ]
    with torch.no_grad(), fastldm.record() as calls:
        net(x)
    assert {call.backend for call in calls.calls} == {"reference"}


def test_applied_ends_with_its_block(net, x):
    def fail():
        with fastldm.applied(net, attention_classes=[Attends]) as report:
            assert len(report.replaced) == 4
            assert len(ops_of(net, x)) == 4
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert ops_of(net, x) == []


def test_applied_inside_apply_goes_back_to_it(net, x):
    apply(net, backend="torch", ops="group_norm")
    with fastldm.applied(net, backend="reference", attention_classes=[Attends]):
        assert len(ops_of(net, x)) == 4
    with torch.no_grad(), fastldm.record() as calls:
        net(x)
    assert [(call.op, call.backend) for call in calls.calls] == [("group_norm", "torch")] * 2


def test_apply_inside_applied_ends_with_it(net, x):
    with fastldm.applied(net, backend="torch"):
        apply(net, backend="reference", ops="group_norm")
        assert len(ops_of(net, x)) == 3
    assert ops_of(net, x) == []


def test_applied_may_end_in_any_order(net, x):
    first, second = fastldm.applied(net, backend="torch"), fastldm.applied(net, backend="reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert ops_of(net, x) == []


def test_revert_inside_applied(net, x):
    with fastldm.applied(net):
        fastldm.revert(net)
    assert ops_of(net, x) == []


def test_a_forward_replaced_on_the_instance_is_skipped(net, x):
    net.norm.forward = lambda input: input
    (skipped,) = apply(net).skipped
    assert skipped.path == "norm"
    assert "replaced on the instance" in skipped.skipped


def test_modules_that_stand_twice_are_swapped_once(x):
    shared = nn.GroupNorm(4, 16)
    net = nn.ModuleDict({"a": shared, "b": shared})
    assert [entry.path for entry in fastldm.apply(net).entries] == ["a"]
    fastldm.revert(net)
    assert type(shared) is nn.GroupNorm


class Pipeline:
    """What of a pipeline of diffusers counts here."""

    def __init__(self):
        self.components = {
            "unet": Net().eval(),
            "vae": nn.GroupNorm(2, 16),
            "tokenizer": object(),
            "none": None,
        }

    def __call__(self, prompt, height=16, width=16, num_inference_steps=50):
        assert (prompt, num_inference_steps) == ("", 1)
        return self.components["unet"](torch.randn(1, 16, height))


def test_pipelines():
    pipe = Pipeline()
    report = apply(pipe)
    assert [entry.path for entry in report.entries] == [*(f"unet.{path}" for path, _ in REPLACED), "vae"]
    fastldm.revert(pipe)
    assert type(pipe.components["vae"]) is nn.GroupNorm


@pytest.mark.parametrize("model", [3, None, nn.Module, type("Empty", (), {"components": {}})()])
def test_what_is_no_model(model):
    for function in (fastldm.apply, fastldm.revert, fastldm.verify, fastldm.pack_weights):
        with pytest.raises(InputTypeError, match="or one pipeline with modules, an instance, got"):
            function(model)


WRONG = [
    (TypeError, {"ops": None}, "ops must be some of attention, group_norm, vq_nearest, got None"),
    (TypeError, {"ops": [["attention"]]}, "ops must be some of"),
    (TypeError, {"ops": torch.ones(2)}, r"ops must be some of .*, got float32 \(2,\)"),
    (ValueError, {"ops": ["silu"]}, "unknown operation 'silu'; use some of: attention, group_norm"),
    (ValueError, {"ops": "triton"}, "did you mean backend='triton'"),
    (ValueError, {"ops": []}, "ops is empty"),
    (ValueError, {"backend": "tritn"}, "unknown backend 'tritn'"),
    (TypeError, {"backend": None}, "backend must be a name, got None"),
    (TypeError, {"backend": ["cpu"]}, "backend must be a name"),
    (TypeError, {"filter": "norm"}, "filter must be a function"),
    (TypeError, {"attention_classes": None}, "attention_classes must be classes of modules, got None"),
    (TypeError, {"attention_classes": "Attends"}, "attention_classes must be classes"),
    (TypeError, {"attention_classes": [Attends()]}, "attention_classes must be classes"),
    (ValueError, {"attention_classes": [nn.Linear]}, "the forward of Linear calls no scaled_dot"),
]


@pytest.mark.parametrize(("error", "options", "message"), WRONG, ids=str)
def test_wrong_arguments(net, error, options, message):
    with pytest.raises(error, match=message) as raised:
        fastldm.apply(net, **options)
    assert isinstance(raised.value, InputError)
    assert type(net.norm) is nn.GroupNorm


def test_nothing_known():
    report = fastldm.apply(nn.Linear(2, 2))
    assert report.entries == []
    assert str(report).startswith("nothing to replace")


def test_verify(net, x):
    nothing = fastldm.verify(net, x)
    assert not nothing
    assert "call fastldm.apply first" in str(nothing)
    apply(net)
    result = fastldm.verify(net, x)
    assert result
    assert [(one.path, one.was, one.calls) for one in result.modules] == [
        ("block", "Sequential", 1),
        ("norm", "GroupNorm", 1),
        ("attention", "MultiheadAttention", 1),
        ("attends", "Attends", 1),
    ]
    assert all(0 < one.error <= one.limit for one in result.modules)
    assert not any(module._forward_hooks for module in net.modules())


def test_verify_sees_what_is_not_finite(net, x, monkeypatch):
    apply(net)
    right = fastldm.ops.group_norm

    def wrong(*args, **named):
        y = right(*args, **named)
        y[0, 0, 0] = torch.nan
        return y

    monkeypatch.setattr(fastldm.ops, "group_norm", wrong)
    assert not fastldm.verify(net, x).modules[0].ok


def test_verify_sees_a_wrong_kernel(net, x, monkeypatch):
    apply(net)
    right = fastldm.ops.group_norm
    monkeypatch.setattr(fastldm.ops, "group_norm", lambda *args, **named: right(*args, **named) * 1.001)
    result = fastldm.verify(net, x)
    assert not result
    assert [one.path for one in result.modules if not one.ok] == ["block", "norm"]
    assert str(result).count("WRONG") == 2


def test_verify_tells_what_was_not_called(net):
    apply(net)
    result = fastldm.verify(net.block, torch.randn(2, 16, 12))
    assert result.ok
    net.forward = lambda x: net.block(x)
    result = fastldm.verify(net, torch.randn(2, 16, 12))
    assert [one.calls for one in result.modules] == [1, 0, 0, 0]
    assert str(result).count("not called") == 3


def test_verify_is_not_ok_where_nothing_could_be_compared(net):
    """Neither results without a finite number nor empty ones say anything of a kernel."""
    apply(net)
    for x in (torch.full((2, 16, 12), torch.nan), torch.empty(0, 16, 12)):
        result = fastldm.verify(net.block, x)
        assert not result
        assert [(one.calls, one.compared) for one in result.modules] == [(1, False)]
        assert "not compared: no finite number" in str(result)


def test_wrong_arguments_of_a_call_name_the_class(net, x):
    """As before `apply`, not by a function inside fastldm."""
    plain = copy.deepcopy(net.block)
    apply(net)
    for call in (net.block, functools.partial(fastldm.verify, net.block), plain):
        with pytest.raises(
            TypeError, match=r"^Sequential\.forward\(\) got an unexpected keyword argument 'x'"
        ):
            call(x=x)


def test_what_torch_jit_compiled_is_left_alone(x):
    net = nn.Sequential(nn.GroupNorm(4, 16), nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU()), nn.Identity())
    expected = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is
        net[1], net[2] = torch.jit.script(net[1]), torch.jit.trace(nn.Identity(), x)
        layer = torch.jit.script(nn.TransformerEncoderLayer(8, 2, batch_first=True))
    report = fastldm.apply(net)
    assert [(entry.path, entry.op, entry.was) for entry in report.skipped] == [
        ("1", "group_norm", "Sequential")
    ]
    assert "torch.jit has compiled it" in report.skipped[0].skipped
    assert [entry.path for entry in report.replaced] == ["0"]
    torch.testing.assert_close(net(x), expected)
    assert fastldm.verify(net, x)
    fastldm.revert(net)
    assert type(net[0]) is nn.GroupNorm
    assert [entry.op for entry in fastldm.apply(layer).skipped] == ["attention"]
    with pytest.raises(UnsupportedError, match=r"torch\.jit has compiled it"):
        fastldm.apply(layer, strict=True)


def test_warmup_of_a_module(net, x):
    apply(net)
    calls = fastldm.warmup(net, x=x)
    assert calls.backends().keys() == {"attention", "group_norm"}
    assert fastldm.warmup(net, x).calls == calls.calls
    with pytest.raises(InputTypeError, match="model must be a module or a pipeline"):
        fastldm.warmup(None)
    with pytest.raises(InputError, match="sizes must be pairs"):
        fastldm.warmup(net, sizes=(8, 8), x=x)
    with pytest.raises(InputTypeError, match="Net takes no 'y'; it takes: x"):
        fastldm.warmup(net, y=x)
    with pytest.raises(InputTypeError, match="sizes: Net takes no height and width"):
        fastldm.warmup(net, sizes=[(8, 8)], x=x)


def test_warmup_of_a_pipeline_runs_every_size():
    pipe = Pipeline()
    apply(pipe)
    calls = fastldm.warmup(pipe, sizes=[(8, 8), (24, 8)])
    assert [call.shapes[0][-1] for call in calls.calls if call.op == "group_norm"] == [8, 8, 24, 24]


def test_a_rebound_function_keeps_its_signature():
    def function(a, b=2, *, c=3):
        """Says so."""
        return torch.add(a, b) + c

    other = swapping.rebound(function, {"torch": swapping.like_module(torch, add=lambda a, b: a * b)})
    assert other(torch.tensor(5.0)) == 13
    assert function(torch.tensor(5.0)) == 10
    assert (other.__doc__, other.__name__, other.__kwdefaults__) == ("Says so.", "function", {"c": 3})


def test_without_diffusers_and_transformers():
    code = """
import sys
sys.modules.update(diffusers=None, transformers=None, peft=None, accelerate=None)
import torch, fastldm
model = torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.SiLU())
assert len(fastldm.apply(model).replaced) == 1
assert fastldm.verify(model, torch.randn(2, 8, 4))
fastldm.revert(model)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_apply_imports_no_library_that_is_not_there_yet():
    apply = "import sys, torch, fastldm; fastldm.apply(torch.nn.GroupNorm(2, 8))"
    code = f"{apply}; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

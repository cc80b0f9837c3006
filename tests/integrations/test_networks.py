"""`fastldm.apply` on whole networks of diffusers: backends, dtypes, layouts, threads, files."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

import fastldm
from fastldm.errors import UnsupportedError


def test_a_vae(vae: AutoencoderKL, assert_right):
    plain = copy.deepcopy(vae)
    report = fastldm.apply(vae)
    assert {entry.op for entry in report.replaced} == {"attention", "group_norm"}
    assert_right(vae, plain, {"sample": torch.randn(2, 3, 16, 24)})


def test_verify_looks_at_the_fused_calls(unet, inputs):
    fastldm.apply(unet)
    result = fastldm.verify(unet, **inputs)
    assert result, result
    assert all(one.calls for one in result.modules)
    assert not any(one.path.endswith(("norm1", "norm2")) for one in result.modules)


def test_two_threads(unet, inputs, run):
    fastldm.apply(unet)
    found = {}

    def work(backend: str) -> None:
        with fastldm.use_backend(backend), fastldm.record() as calls:
            found[backend] = [run(unet, inputs) for _ in range(3)], calls.backends()

    for backend in ("reference", "torch"):
        work(backend)
    alone = dict(found)
    threads = [threading.Thread(target=work, args=(backend,)) for backend in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for backend, (outputs, backends) in found.items():
        assert backends == {"attention": [backend], "group_norm": [backend]}
        for (output,), (wanted,) in zip(outputs, alone[backend][0]):
            torch.testing.assert_close(output, wanted)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_a_named_backend(unet, inputs, backend, run):
    with fastldm.applied(unet, backend=backend):
        with fastldm.record() as calls:
            run(unet, inputs)
        fastldm.apply(unet, backend="reference")
        with fastldm.record() as others:
            run(unet, inputs)
    assert calls.backends() == {"attention": [backend], "group_norm": [backend]}
    assert others.backends() == {"attention": ["reference"], "group_norm": ["reference"]}


class Attends(nn.Module):
    """With dropout in training."""

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)


def test_a_call_that_fastldm_does_not_take():
    model, heads = Attends(), torch.randn(3, 2, 4, 5, 8)
    fastldm.apply(model, backend="cpu", attention_classes=[Attends])
    with fastldm.record() as calls:
        model.eval()(*heads)
    assert calls.backends() == {"attention": ["cpu"]}
    with pytest.raises(UnsupportedError, match="backend 'cpu' cannot run attention here: dropout"):
        model.train()(*heads)
    fastldm.apply(model, attention_classes=[Attends])
    with fastldm.record() as calls:
        model(*heads)
    assert [(call.backend, call.fallback) for call in calls.calls] == [
        ("torch", "dropout on the attention weights")
    ]


def test_exceptions_inside_nested_applied(unet, inputs, run):
    before = run(unet, inputs)
    processors = unet.attn_processors

    def fail():
        with fastldm.applied(unet, backend="reference", ops="attention"):
            with pytest.raises(KeyError), fastldm.applied(unet, backend="torch"):
                raise KeyError
            with fastldm.record() as calls:
                run(unet, inputs)
            assert calls.backends() == {"attention": ["reference"]}
            raise RuntimeError("of the block")

    with pytest.raises(RuntimeError, match="of the block"):
        fail()
    assert torch.equal(*run(unet, inputs), *before)
    assert unet.attn_processors == processors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_and_layouts(unet, inputs, dtype, layout, assert_right):
    unet = unet.to(dtype).to(memory_format=layout)
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    inputs["sample"] = inputs["sample"].contiguous(memory_format=layout)
    plain = copy.deepcopy(unet)
    fastldm.apply(unet)
    assert_right(unet, plain, inputs)


@torch.no_grad()
def test_saving_and_loading(unet, inputs, tmp_path, run):
    unet.save_pretrained(tmp_path / "plain")
    fastldm.apply(unet, backend="reference")
    unet.save_pretrained(tmp_path / "applied")
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("plain", "applied")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "applied" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "applied")
    with fastldm.record() as calls:
        run(loaded, inputs)
    assert not calls.calls
    loaded.load_state_dict(unet.state_dict())
    fastldm.revert(unet)
    assert torch.equal(*run(loaded, inputs), *run(unet, inputs))


def _saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved_and_loaded,
}


@torch.no_grad()
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies(unet, inputs, copied, assert_right, run):
    plain = copy.deepcopy(unet)
    fastldm.apply(unet, backend="reference")
    other = copied(unet)
    assert torch.equal(*run(other, inputs), *run(unet, inputs))
    assert_right(other, plain, inputs)
    with fastldm.record() as calls:
        run(unet, inputs)
    assert calls.backends() == {"attention": ["reference"], "group_norm": ["reference"]}

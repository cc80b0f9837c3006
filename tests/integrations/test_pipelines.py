"""`fastldm.apply` on whole pipelines of diffusers: what is replaced, that it runs, that it is as accurate.

The truth is the untouched pipeline in float64. Where diffusers itself computes in float32 there (rotary
embeddings, the conversion to numpy), that is the same for both sides of the comparison.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastldm
from fastldm import dispatch
from fastldm.errors import UnsupportedError
from fastldm.implementation import Implementation
from fastldm.testing.tolerances import assert_as_accurate

# The folders of tests are no packages.
_SPEC = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)
one_thread = tiny.one_thread

GELU = "its activation is GELU, not SiLU"


@dataclass(frozen=True)
class Case:
    """What there is to replace in a pipeline, and the part of it that its call leaves idle."""

    make: Callable
    denoiser: str
    attention: int
    group_norm: int
    vq_nearest: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    idle: str | None = "vae.encoder."

    @property
    def replaced(self) -> dict[str, int]:
        counts = {
            "attention": self.attention,
            "group_norm": self.group_norm,
            "vq_nearest": self.vq_nearest,
        }
        return {op: count for op, count in counts.items() if count}


# A first stage of two widths has 6 norms and 1 attention in its encoder, 8 and 1 in its decoder.
STAGE_NORMS, STAGE_ATTENTION = 6 + 8, 2
# 8 residual blocks, 4 norms before transformers of 2 attentions each, the norm of the output.
UNET_NORMS, UNET_ATTENTION = 8 + 4 + 1, 4 * 2

CASES = {
    "stable_diffusion": Case(
        tiny.stable_diffusion, "unet", UNET_ATTENTION + STAGE_ATTENTION, UNET_NORMS + STAGE_NORMS
    ),
    "stable_diffusion_img2img": Case(
        tiny.stable_diffusion_img2img,
        "unet",
        UNET_ATTENTION + STAGE_ATTENTION,
        UNET_NORMS + STAGE_NORMS,
        idle=None,
    ),
    "stable_diffusion_controlnet": Case(
        tiny.stable_diffusion_controlnet,
        "unet",
        UNET_ATTENTION + STAGE_ATTENTION + 2 * 2,
        UNET_NORMS + STAGE_NORMS + 4 + 2,
    ),
    # Transformers of 2 layers each.
    "stable_diffusion_xl": Case(
        tiny.stable_diffusion_xl, "unet", 2 * UNET_ATTENTION + STAGE_ATTENTION, UNET_NORMS + STAGE_NORMS
    ),
    # A first stage of four widths.
    "ldm_text_to_image": Case(
        tiny.ldm_text_to_image,
        "unet",
        UNET_ATTENTION + STAGE_ATTENTION,
        UNET_NORMS + 8 + 12,
        vq_nearest=1,
        idle="vqvae.encoder.",
    ),
    # Its attention has no cross-attention beside it.
    "ldm_unconditional": Case(
        tiny.ldm_unconditional,
        "unet",
        4 + STAGE_ATTENTION,
        UNET_NORMS + STAGE_NORMS,
        vq_nearest=1,
        idle="vqvae.encoder.",
    ),
    # The prior 1 attention, the decoder 4 with a norm each, the two UNets of super-resolution 1 each.
    "unclip": Case(tiny.unclip, "decoder", 1 + 4 + 2, 10 + 4 + 1 + 2 * (10 + 1 + 1), idle=None),
    # Of 10 residual blocks with GELU the 2 norms each; 4 attentions with a norm of their own and one of the
    # context.
    "deepfloyd_if": Case(tiny.deepfloyd_if, "unet", 4, 10 * 2 + 4 * 2 + 1, skipped={GELU: 10}, idle=None),
    "dit": Case(tiny.dit, "transformer", 2 + STAGE_ATTENTION, STAGE_NORMS),
    # A spatial block with cross-attention and a temporal one without.
    "latte": Case(tiny.latte, "transformer", 2 + 1 + STAGE_ATTENTION, STAGE_NORMS),
    # One of the two blocks has two attentions.
    "stable_diffusion_3": Case(tiny.stable_diffusion_3, "transformer", 2 + 1 + STAGE_ATTENTION, STAGE_NORMS),
    "flux": Case(tiny.flux, "transformer", 1 + 2 + STAGE_ATTENTION, STAGE_NORMS),
}


def named_backend(*ops: str) -> str:
    """The C++ kernels where they are built, else the reference: a backend with no way out to PyTorch."""
    built = all(isinstance(dispatch.find("cpu", op), Implementation) for op in ops)
    return "cpu" if built else "reference"


def generate(pipe, call: dict, dtype: torch.dtype) -> Tensor:
    call = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in call.items()}
    # CLIP's mask of transformers 4 has the least number of the model's dtype in the default dtype.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(dtype, default))
    try:
        with tiny.Noise(dtype):
            result = pipe(**call, generator=torch.Generator().manual_seed(3), return_dict=False)[0]
    finally:
        torch.set_default_dtype(default)
    return torch.as_tensor(result)


def modules(pipe) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def module_at(pipe, path: str) -> nn.Module:
    component, _, rest = path.removesuffix(".processor").partition(".")
    return modules(pipe)[component].get_submodule(rest)


def state(pipe) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name, part in modules(pipe).items()
        for key, tensor in part.state_dict().items()
    }


@contextmanager
def counted(places: dict[str, nn.Module], entries) -> Iterator[tuple[fastldm.dispatch.Recorder, dict]]:
    """What ran, and {(path, op): the number of calls of the operation in each run of the module there}."""
    ran = {(entry.path, entry.op): [] for entry in entries}
    handles, starts = [], []
    with fastldm.record() as record:

        def begin(module, inputs):
            starts.append(len(record.calls))

        def end(path: str, op: str) -> Callable:
            def hook(module, inputs, output):
                ran[path, op].append(sum(call.op == op for call in record.calls[starts.pop() :]))

            return hook

        for path, op in ran:
            # Inside out: the hook that began last ends first.
            handles.append(places[path].register_forward_pre_hook(begin))
            handles.append(places[path].register_forward_hook(end(path, op)))
        try:
            yield record, ran
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class Untouched:
    """A pipeline, what it generates in float32, and the truth."""

    case: Case
    pipe: object
    call: dict
    plain: Tensor
    truth: Tensor
    state: dict[str, Tensor]


@pytest.fixture(scope="module", params=list(CASES))
def untouched(request, tmp_path_factory) -> Untouched:
    case = CASES[request.param]
    pipe, call = case.make(tmp_path_factory.mktemp(request.param))
    pipe.set_progress_bar_config(disable=True)
    before = state(pipe)
    pipe.to(torch.float64)
    truth = generate(pipe, call, torch.float64)
    pipe.to(torch.float32)
    return Untouched(case, pipe, call, generate(pipe, call, torch.float32), truth, before)


@pytest.fixture
def untouched_again(untouched) -> Iterator[Untouched]:
    """`untouched`, reverted after a test that failed."""
    yield untouched
    fastldm.revert(untouched.pipe)


def test_every_norm_attention_and_codebook_is_in_the_report(untouched_again):
    case, pipe = untouched_again.case, untouched_again.pipe
    report = fastldm.apply(pipe)
    assert Counter(entry.op for entry in report.replaced) == case.replaced
    # Early versions of transformers 4 call PyTorch's attention from classes of their own, which are listed.
    of_diffusers = [entry for entry in report.skipped if not entry.path.startswith("text_encoder")]
    assert Counter(entry.skipped for entry in of_diffusers) == case.skipped

    replaced = {(entry.path, entry.op) for entry in report.replaced}
    assert len(replaced) == len(report.replaced)
    found = set()
    for name, part in modules(pipe).items():
        for path, module in part.named_modules(prefix=name):
            parent = module_at(pipe, path.rpartition(".")[0]) if "." in path else None
            if type(module).__name__ == "GroupNorm" and type(parent).__name__ != "ResnetBlock2D":
                found.add((path, "group_norm"))
            elif type(module).__name__ == "ResnetBlock2D":
                silu = isinstance(module.nonlinearity, nn.SiLU)
                norms = [path] if silu else [f"{path}.norm1", f"{path}.norm2"]
                found.update((norm, "group_norm") for norm in norms)
            elif type(module).__name__ == "VectorQuantizer":
                found.add((path, "vq_nearest"))
            if hasattr(module, "processor"):
                found.add((f"{path}.processor", "attention"))
    assert replaced == found


@pytest.mark.parametrize("backend", ["auto", "named"])
def test_replaced_parts_run_and_are_as_accurate(untouched_again, backend):
    case, pipe, call = untouched_again.case, untouched_again.pipe, untouched_again.call
    backend = named_backend(*case.replaced) if backend == "named" else backend
    report = fastldm.apply(pipe, backend=backend)
    places = {entry.path: module_at(pipe, entry.path) for entry in report.replaced}
    with counted(places, report.replaced) as (record, ran):
        result = generate(pipe, call, torch.float32)

    assert_as_accurate(
        result, untouched_again.truth, untouched_again.plain, terms=untouched_again.truth[0].numel()
    )
    for entry in report.replaced:
        calls = ran[entry.path, entry.op]
        if case.idle is not None and entry.path.startswith(case.idle):
            assert calls == [], entry
        else:
            assert calls, entry
            assert set(calls) == {2 if entry.was == "ResnetBlock2D" else 1}, entry
    # Nothing ran outside the places that the report names.
    counts = Counter(call.op for call in record.calls)
    assert counts == {op: sum(sum(n) for (_, o), n in ran.items() if o == op) for op in case.replaced}
    if backend != "auto":
        assert record.backends() == {op: [backend] for op in sorted(case.replaced)}


def test_revert_leaves_nothing_behind(untouched_again):
    pipe = untouched_again.pipe
    fastldm.apply(pipe)
    during = state(pipe)
    fastldm.revert(pipe)
    after = state(pipe)
    for found in (during, after):
        assert list(found) == list(untouched_again.state)
        assert all(torch.equal(found[key], tensor) for key, tensor in untouched_again.state.items())
    assert torch.equal(generate(pipe, untouched_again.call, torch.float32), untouched_again.plain)
    with fastldm.record() as record:
        generate(pipe, untouched_again.call, torch.float32)
    assert record.calls == []


def test_the_denoiser_verifies(untouched_again):
    case, pipe, call = untouched_again.case, untouched_again.pipe, untouched_again.call
    denoiser = getattr(pipe, case.denoiser)
    report = fastldm.apply(denoiser, backend=named_backend("attention", "group_norm"))
    given = []
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    generate(pipe, call, torch.float32)
    handle.remove()
    args, kwargs = given[0]
    checked = fastldm.verify(denoiser, *args, **kwargs)
    assert checked.ok, checked
    assert len(checked.modules) == len(report.replaced)
    assert all(module.calls for module in checked.modules), checked


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_in_bfloat16(name, tmp_path):
    pipe, call = CASES[name].make(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.bfloat16)
    plain = generate(pipe, call, torch.bfloat16)
    pipe.to(torch.float32)
    truth = generate(pipe, call, torch.float32)
    pipe.to(torch.bfloat16)
    fastldm.apply(pipe, backend=named_backend("attention", "group_norm"))
    with fastldm.record() as record:
        result = generate(pipe, call, torch.bfloat16)
    assert result.dtype == torch.bfloat16
    assert {call.dtype for call in record.calls} == {torch.bfloat16}
    assert_as_accurate(result, truth, plain, terms=truth[0].numel())


def test_strict_names_what_is_skipped(tmp_path):
    pipe, _ = tiny.deepfloyd_if(tmp_path)
    with pytest.raises(UnsupportedError, match="GELU"):
        fastldm.apply(pipe, strict=True)
    fastldm.apply(pipe, ["attention"], strict=True)

"""Whole networks: a denoising step of a UNet and a VAE decode, against diffusers with the same weights."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import resources

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastldm
import fastldm.models
from benchmarks.providers import compiled, installed, packs_here
from benchmarks.registry import Case, Function, Judge, Op, Problem, Provider, Verdict, Work
from fastldm.errors import InputError
from fastldm.models.weights import SkipInit
from fastldm.nn import pack_weights
from fastldm.testing import assert_as_accurate

_PARITY = 1e-5  # of float32 networks, as in the tests against diffusers

_SD15_UNET = {"cross_attention_dim": 768, "sample_size": 64}
_SD15_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 512,
}


@dataclass(frozen=True)
class Size:
    """A configuration of diffusers and the shapes of what goes in, batch first."""

    config: dict
    sample: tuple[int, ...]
    context: tuple[int, ...] | None = None


def _shipped(part: str) -> dict:
    folder = resources.files("fastldm") / "assets" / "shapes" / part
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if not key.startswith("_")}


UNETS = {
    "demo": Size(_shipped("unet"), (2, 4, 8, 8), (2, 24, 128)),
    "sd15": Size(_SD15_UNET, (2, 4, 64, 64), (2, 77, 768)),
}
VAES = {
    "demo": Size(_shipped("vqvae"), (1, 4, 8, 8)),
    "sd15": Size(_SD15_VAE, (1, 4, 64, 64)),
}


class Networks:
    """diffusers' network and ours on the same tensors, in both memory layouts, made when first asked for."""

    def __init__(self, name: str, config: dict, dtype: torch.dtype, device: str):
        if importlib.util.find_spec("diffusers") is None:
            raise InputError("models are measured against diffusers; install fastldm[diffusers]")
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        torch.manual_seed(0)
        self.name = name
        self.peer = (
            getattr(diffusers, name).from_config(config).to(device, dtype).eval().requires_grad_(False)
        )

    @cached_property
    def peer_channels_last(self) -> nn.Module:
        return copy.deepcopy(self.peer).to(memory_format=torch.channels_last)

    def rival(self, channels_last: bool) -> nn.Module:
        return self.peer_channels_last if channels_last else self.peer

    def ours(self, channels_last: bool) -> nn.Module:
        peer = self.rival(channels_last)
        with SkipInit():
            network = getattr(fastldm.models, self.name).from_config(dict(peer.config))
        network.load_state_dict(peer.state_dict(), assign=True)
        return network.eval().requires_grad_(False)

    def applied(self, channels_last: bool) -> nn.Module:
        """diffusers' network with fastldm applied."""
        peer = self.rival(channels_last)
        with SkipInit():
            network = type(peer).from_config(peer.config)
        network.load_state_dict(peer.state_dict(), assign=True)
        fastldm.apply(network)
        return network.eval().requires_grad_(False)

    def exact(self) -> nn.Module:
        return copy.deepcopy(self.peer).float()


def _call(network: nn.Module, channels_last: bool = False) -> Function:
    """The network as a function of `problem.inputs`: (sample, timestep, context) or (latents,)."""
    forward = getattr(network, "decode", network)

    def function(sample: Tensor, *rest: Tensor) -> Tensor:
        if channels_last:
            sample = sample.contiguous(memory_format=torch.channels_last)
        return forward(sample, *rest, return_dict=False)[0]

    return function


def _unet_problem(case: Case) -> Problem:
    size = UNETS[case.shape]
    generator = torch.Generator().manual_seed(0)
    sample, context = (
        torch.randn(shape, generator=generator).to(case.device, case.torch_dtype)
        for shape in (size.sample, size.context)
    )
    inputs = (sample, torch.tensor([500], device=case.device), context)
    networks = Networks("UNet2DConditionModel", size.config, case.torch_dtype, case.device)
    return Problem(case, ("sample", "timestep", "context"), inputs, networks=networks)


def _vae_problem(case: Case) -> Problem:
    size = VAES[case.shape]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(size.sample, generator=generator).to(case.device, case.torch_dtype)
    networks = Networks("AutoencoderKL", size.config, case.torch_dtype, case.device)
    return Problem(case, ("latents",), (latents,), networks=networks)


def _judge(problem: Problem) -> Judge:
    """Against diffusers in float32: float32 within the tests' parity, less by the error rule."""
    dtype = problem.case.torch_dtype
    plain = _call(problem.networks.peer)(*problem.inputs)
    exact = plain
    if dtype != torch.float32:
        floats = (x.float() if x.is_floating_point() else x for x in problem.inputs)
        exact = _call(problem.networks.exact())(*floats)

    def judge(results: Sequence[Tensor]) -> Verdict:
        (result,) = results
        if result.shape != exact.shape or result.dtype != dtype:
            return Verdict(None, f"{tuple(result.shape)} {result.dtype}, {tuple(exact.shape)} {dtype} is due")
        if not result.isfinite().all():
            return Verdict(None, f"{int((~result.isfinite()).sum())} elements are NaN or infinite")
        error = (result.float() - exact).abs().max().item()
        if dtype == torch.float32:
            limit = _PARITY * max(1.0, exact.abs().max().item())
            return Verdict(
                error, None if error <= limit else f"{error:.1e} from diffusers, {limit:.1e} allowed"
            )
        try:
            assert_as_accurate(result, exact, plain, terms=1)
        except AssertionError as fault:
            return Verdict(error, str(fault))
        return Verdict(error)

    return judge


def _attention_flops(q: Sequence[int], k: Sequence[int], *rest, **named) -> int:
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def products(function: Function, inputs: Sequence[Tensor]) -> Work:
    """The products of convolutions, linear layers and attention, counted in a run of `function`."""
    uncounted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        function(*inputs)
    return Work("matmul", float(counter.get_total_flops()))


def _work(problem: Problem) -> Work:
    return products(_call(problem.networks.peer), problem.inputs)


def _ours(channels_last: bool, problem: Problem) -> Function:
    return _call(problem.networks.ours(channels_last), channels_last)


def _packed(problem: Problem) -> Function:
    return _call(pack_weights(problem.networks.ours(channels_last=True)), channels_last=True)


def _applied(channels_last: bool, problem: Problem) -> Function:
    return _call(problem.networks.applied(channels_last), channels_last)


def _applied_packed(problem: Problem) -> Function:
    return _call(pack_weights(problem.networks.applied(channels_last=True)), channels_last=True)


def _diffusers(channels_last: bool, problem: Problem) -> Function:
    return _call(problem.networks.rival(channels_last), channels_last)


def _compiled(problem: Problem) -> Function:
    """In one layout: inductor lays convolutions out by itself, and each compilation takes minutes."""
    return compiled(_diffusers(False, problem))


_PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class _Traced(nn.Module):
    """What OpenVINO converts: tensors in, one tensor out."""

    def __init__(self, function: Callable, network: nn.Module):
        super().__init__()
        self.network = network
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _openvino(problem: Problem) -> Function:
    """float32 in and out, its inner precision by its hint, as its users run it."""
    import openvino

    def floats(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x.float() if x.is_floating_point() else x for x in inputs)

    network = problem.networks.exact()
    graph = openvino.convert_model(_Traced(_call(network), network), example_input=floats(problem.inputs))
    settings = {
        "INFERENCE_PRECISION_HINT": _PRECISION[problem.case.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()

    def function(*inputs: Tensor) -> Tensor:
        arrays = [x.numpy() for x in floats(inputs)]
        (result,) = request.infer(arrays, share_inputs=True).values()
        return torch.from_numpy(result).to(problem.case.torch_dtype)

    return function


def _openvino_refuses(case: Case) -> str | None:
    return installed("openvino")(case) if case.device == "cpu" else "is measured on the CPU only"


def _providers() -> list[Provider]:
    both = (("", False), ("-channels-last", True))
    return [
        *(Provider(f"fastldm{end}", partial(_ours, last), ours=True) for end, last in both),
        Provider("fastldm-packed", _packed, ours=True, refuse=packs_here),
        *(Provider(f"applied{end}", partial(_applied, last), ours=True) for end, last in both),
        Provider("applied-packed", _applied_packed, ours=True, refuse=packs_here),
        *(Provider(f"diffusers{end}", partial(_diffusers, last)) for end, last in both),
        Provider("compile", _compiled),
        Provider("openvino", _openvino, refuse=_openvino_refuses),
    ]


OPS = (
    Op(
        "unet-step",
        shapes=UNETS,
        full=tuple(UNETS),
        dtypes=("float32", "bfloat16"),
        problem=_unet_problem,
        judge=_judge,
        work=_work,
        providers=_providers,
        torch="diffusers",
    ),
    Op(
        "vae-decode",
        shapes=VAES,
        full=tuple(VAES),
        dtypes=("float32", "bfloat16"),
        problem=_vae_problem,
        judge=_judge,
        work=_work,
        providers=_providers,
        torch="diffusers",
    ),
)

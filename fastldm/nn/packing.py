"""Weights in the layout that oneDNN computes with: inference on the CPU.

PyTorch brings the weight of a convolution into oneDNN's layout on every call. On 2 cores with AMX that is
over half of the time of the deepest convolutions of Stable Diffusion's UNet (1280 channels at 8x8 take 1.9
instead of 4.6 ms in bfloat16, 13.5 instead of 28 in float32); linear layers go through MKL in float32, which
reaches half of oneDNN's rate on AMD. A packed layer keeps its weight in that layout too and computes
channels-last, so that nothing is laid out anew between convolutions and group norms.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastldm.nn.hooks import only_computes
from fastldm.nn.roots import roots
from fastldm.nn.transformer import GEGLU

_onednn = torch.ops.mkldnn
M = TypeVar("M")


def pack_weights(module: M) -> M:
    """Lets the linear layers, 2-D convolutions and GEGLUs in `module` compute with packed weights, in place.

    `module` may be a pipeline too, as for `fastldm.apply`.

    Parameters, state_dict and training stay as they are: the packed weight is made at the first call without
    gradient on the CPU in float32 or bfloat16, made anew when the weight has changed, and is not saved.
    Results differ from those of the plain layers by rounding. The packed weights take as much memory as the
    plain ones, and those of convolutions are made for one size of input: another size makes them anew.

    Which changes of a weight are seen: another parameter in its place, another tensor in its `.data`, and all
    that PyTorch counts in the tensor's version (in-place operations, `load_state_dict`, optimizers) always.
    **Writes past the version** - `weight.data.mul_(2)`, `weight.data += delta`, `weight.data.copy_(other)`,
    through NumPy - are looked for in a sample: about 512 elements, evenly spread and all of a smaller weight,
    are compared bit for bit at every call. A write to the whole weight is seen unless it leaves each of these
    as it was, which one that changes 1% of the elements at random does in 0.6% of the cases; a write to a
    single row, column or element can go unseen, and the layer then computes with the old weight. **After such
    writes call `pack_weights(module)` again: it drops every packed weight in `module`.**

    Everything else runs as before, on the plain layer: gradients (also forward-mode and `torch.func`),
    autocast, torch.compile, tracing, other devices, dtypes and shapes that do not fit, weights that are not a
    contiguous or channels-last `nn.Parameter` of the layer (parametrized, pruned, given to `functional_call`
    as tensors) or were made in inference mode, a GEGLU whose `proj` has hooks or is no plain linear layer,
    and all calls under a torch function or dispatch mode (`FlopCounterMode`, `with torch.device(...)`).

    Only layers that are exactly `nn.Linear`, `nn.Conv2d` (zero padding, given in numbers) or
    `fastldm.nn.GEGLU` are packed. Where PyTorch has no oneDNN, nothing is.

    Returns:
        `module`.

    Raises:
        InputTypeError: `module` is neither a module nor a pipeline with one.
    """
    layers = _layers(module)
    if torch.backends.mkldnn.is_available():
        for layer in layers:
            if isinstance(layer, _Packed):
                layer._forget()
            elif type(layer) in _PACKED and not (isinstance(layer, nn.Conv2d) and not _plain_geometry(layer)):
                layer.__class__ = _PACKED[type(layer)]
    return module


def unpack_weights(module: M) -> M:
    """Undoes `pack_weights`, in place, and frees the packed weights. Returns `module`."""
    for layer in _layers(module):
        if isinstance(layer, _Packed):
            layer._forget()
            # A parametrized layer has a class of its own, made by PyTorch. It stays: it computes as before.
            layer.__class__ = _PLAIN.get(type(layer), type(layer))
    return module


def _layers(model: object) -> list[nn.Module]:
    return [layer for root in roots(model).values() for layer in root.modules()]


def _plain_geometry(layer: nn.Conv2d) -> bool:
    numbers = type(layer.stride) is type(layer.padding) is type(layer.dilation) is tuple
    return layer.padding_mode == "zeros" and numbers


class _Packed:
    """What the packed layers share; stands before the plain layer among the base classes.

    `_packed` in the layer's `__dict__` is what `_packed_weights` keeps: a weak reference to the weight, its
    state, the sample as a view of it and as a copy, and what `_pack` made.
    """

    def _packed_weights(self, weight: nn.Parameter, geometry: tuple = ()) -> tuple | Tensor:
        """What `_pack` makes of `weight`, kept until that or the geometry changes."""
        state = (weight._version, weight.dtype, weight.shape, weight.stride(), geometry)
        known = self.__dict__.get("_packed")
        if known is not None:
            owner, known_state, live, sample, packed = known
            # The view keeps its memory alive, so an equal address is the same memory, never a reused one.
            if (
                owner() is weight
                and known_state == state
                and live.data_ptr() == weight.data_ptr()
                and torch.equal(live, sample)
            ):
                return packed
        with torch.no_grad():
            live = _sample(weight.data)
            entry = (weakref.ref(weight, _forgetter(self)), state, live, live.clone())
            packed = self._pack(weight.data, *geometry)
        self.__dict__["_packed"] = (*entry, packed)
        return packed

    def _bias(self) -> Tensor | None:
        bias = self._parameters.get("bias")  # past `nn.Module.__getattr__`, which takes 0.7 microseconds
        return bias if bias is not None or "bias" in self._parameters else self.bias

    def _forget(self) -> None:
        self.__dict__.pop("_packed", None)

    def _apply(self, *args, **kwargs) -> nn.Module:
        self._forget()  # on the way to another device or dtype; its memory is free at once
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


def _forgetter(layer: _Packed) -> Callable[[object], None]:
    """Drops what `layer` has packed when the weight has gone, and with it the memory of both."""
    layer = weakref.ref(layer)

    def forget(_: object) -> None:
        alive = layer()
        if alive is not None:
            alive._forget()

    return forget


_SAMPLE = 512


def _sample(weight: Tensor) -> Tensor:
    """About `_SAMPLE` elements of a dense `weight`, evenly spread in its memory, as a view of their bits."""
    row = weight[0].numel()
    step = max(1, weight.numel() // _SAMPLE)
    while math.gcd(step, row) != 1:  # with a common factor only some of the columns would be looked at
        step -= 1
    bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    return weight.as_strided(((weight.numel() - 1) // step + 1,), (step,)).view(bits)


def _usable(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    # The types come first: a tracer's stand-ins must not be asked for more.
    return (
        type(x) is Tensor
        and type(weight) is nn.Parameter
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch._C._is_any_autocast_enabled()
        and not _watched()
        and x.dtype is weight.dtype
        and _computes_in(x.dtype)
        and x.is_cpu  # 0.4 microseconds less than the name of the device
        and weight.is_cpu
        and x.layout is weight.layout is torch.strided
        and not x.is_nested
        and x.numel() > 0
        and weight.numel() > 0
        and not weight.is_inference()  # its changes are not counted
        and (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last))
        and (bias is None or _usable_bias(bias, weight))
        and torch.backends.mkldnn.enabled
    )


def _usable_bias(bias: Tensor, weight: Tensor) -> bool:
    # oneDNN reads as many numbers as there are outputs, one after the other, whatever the bias is.
    return (
        type(bias) in (nn.Parameter, Tensor)
        and not (torch.is_grad_enabled() and bias.requires_grad)
        and bias.dtype is weight.dtype
        and bias.is_cpu
        and bias.layout is torch.strided
        and bias.dim() == 1
        and bias.numel() == weight.shape[0]
        and bias.is_contiguous()
    )


def _watched() -> bool:
    """Whether the caller wants to see, or differentiates, PyTorch's own operations."""
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def _computes_in(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 or (dtype is torch.bfloat16 and _has_bfloat16())


@functools.cache
def _has_bfloat16() -> bool:
    return _onednn._is_mkldnn_bf16_supported()


# In float32 oneDNN's call costs 10 microseconds over MKL's; so many products take about 100 on a core.
_SMALL_LINEAR = 1 << 23


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn._linear_pointwise(x, packed, bias, "none", [], "")


def _fits_linear(x: Tensor, weight: Tensor) -> bool:
    return weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]


class PackedLinear(_Packed, nn.Linear):
    """`nn.Linear` made by `pack_weights`."""

    def _pack(self, weight: Tensor) -> Tensor:
        return _onednn._reorder_linear_weight(weight.contiguous())

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # where sizes are tensors, and comparing them warns
            return super().forward(input)
        small = input.dtype is torch.float32 and input.numel() * self.out_features < _SMALL_LINEAR
        weight, bias = self._parameters.get("weight"), self._bias()
        if small or not (_usable(input, weight, bias) and _fits_linear(input, weight)):
            return super().forward(input)
        return _linear(input, self._packed_weights(weight), bias)


class PackedConv2d(_Packed, nn.Conv2d):
    """`nn.Conv2d` made by `pack_weights`; the output is channels-last."""

    def _is_linear(self, weight: Tensor) -> bool:
        geometry = (*weight.shape[2:], *self.stride, self.groups, *self.padding)
        return geometry == (1, 1, 1, 1, 1, 0, 0)

    def _fits(self, x: Tensor, weight: Tensor) -> bool:
        if not (x.dim() == weight.dim() == 4 and x.shape[1] == weight.shape[1] * self.groups):
            return False
        spans = (step * (size - 1) for step, size in zip(self.dilation, weight.shape[2:], strict=True))
        padded = (size + 2 * pad for size, pad in zip(x.shape[2:], self.padding, strict=True))
        return all(span < size for span, size in zip(spans, padded, strict=True))

    def _pack(self, weight: Tensor, *geometry: tuple[int, ...] | int) -> Tensor:
        if not geometry:
            return _onednn._reorder_linear_weight(weight.flatten(1).contiguous())
        # The layout that oneDNN takes depends on the input's size, and another costs up to 20 times as long.
        return _onednn._reorder_convolution_weight(weight, *geometry)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._parameters.get("weight"), self._bias()
        if not (_usable(input, weight, bias) and _plain_geometry(self) and self._fits(input, weight)):
            return super().forward(input)
        x = input.contiguous(memory_format=torch.channels_last)
        if self._is_linear(weight):
            return _linear(x.permute(0, 2, 3, 1), self._packed_weights(weight), bias).permute(0, 3, 1, 2)
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        packed = self._packed_weights(weight, (*geometry, tuple(x.shape)))
        return _onednn._convolution_pointwise(x, packed, bias, *geometry, "none", [], "")


class PackedGEGLU(_Packed, GEGLU):
    """`GEGLU` made by `pack_weights`: the GELU of the gate is taken while its results are in registers."""

    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        value, gate = weight.chunk(2)
        return tuple(_onednn._reorder_linear_weight(half.contiguous()) for half in (value, gate))

    def _fits(self, x: Tensor, weight: Tensor) -> bool:
        return _fits_linear(x, weight) and weight.shape[0] % 2 == 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        proj = self.proj
        if type(proj) is not PackedLinear or not only_computes(proj):
            return super().forward(hidden_states)
        weight, bias = proj._parameters.get("weight"), proj._bias()
        if not (_usable(hidden_states, weight, bias) and self._fits(hidden_states, weight)):
            return super().forward(hidden_states)
        value, gate = self._packed_weights(weight)
        value_bias, gate_bias = (None, None) if bias is None else bias.chunk(2)
        gate = _onednn._linear_pointwise(hidden_states, gate, gate_bias, "gelu", [], "none")
        # oneDNN can multiply as well, but together with a bias that takes 1.5 ms more (PyTorch 2.13).
        return _linear(hidden_states, value, value_bias).mul_(gate)


_PACKED = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d, GEGLU: PackedGEGLU}
_PLAIN = {packed: plain for plain, packed in _PACKED.items()}

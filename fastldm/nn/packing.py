"""Weights in the layout that oneDNN computes with: inference on the CPU.

PyTorch brings the weight of a convolution into oneDNN's layout on every call. On 2 cores with AMX that is
over half of the time of the deepest convolutions of Stable Diffusion's UNet (1280 channels at 8x8 take 1.9
instead of 4.6 ms in bfloat16, 13.5 instead of 28 in float32); linear layers go through MKL in float32, which
reaches half of oneDNN's rate on AMD. A packed layer keeps its weight in that layout too and computes
channels-last, so that nothing is laid out anew between convolutions and group norms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastldm.nn.transformer import GEGLU

_onednn = torch.ops.mkldnn


def pack_weights(module: nn.Module) -> nn.Module:
    """Lets the linear layers, 2-D convolutions and GEGLUs in `module` compute with packed weights, in place.

    Parameters, state_dict and training stay as they are: the packed weight is made at the first call without
    gradient on the CPU in float32 or bfloat16, made anew when the weight has changed, and is not saved. All
    other calls (gradients, autocast, torch.compile, other devices and dtypes) run as before. Results differ
    from those of the plain layers by rounding. The packed weights take as much memory as the plain ones, and
    those of convolutions are made for one size of input: another size makes them anew.

    Only layers that are exactly `nn.Linear`, `nn.Conv2d` (zero padding, given in numbers) or
    `fastldm.nn.GEGLU` are packed. Where PyTorch has no oneDNN, nothing is.

    Returns:
        `module`.
    """
    if torch.backends.mkldnn.is_available():
        for layer in module.modules():
            if type(layer) in _PACKED and not (isinstance(layer, nn.Conv2d) and not _plain_padding(layer)):
                layer.__class__ = _PACKED[type(layer)]
    return module


def unpack_weights(module: nn.Module) -> nn.Module:
    """Undoes `pack_weights`, in place, and frees the packed weights. Returns `module`."""
    for layer in module.modules():
        if isinstance(layer, _Packed):
            layer.__dict__.pop("_packed", None)
            layer.__class__ = type(layer).__mro__[2]
    return module


def _plain_padding(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


class _Packed:
    """What the packed layers share; stands before the plain layer among the base classes."""

    def _packed_weights(self, weight: Tensor, input_size: tuple[int, ...] = ()) -> tuple:
        """What `_pack` makes of `weight`, kept until that or the size of the input changes."""
        version = None if weight.is_inference() else weight._version
        state = (weight.data_ptr(), weight.dtype, version, input_size)
        known = self.__dict__.get("_packed")
        if known is None or known[0] != state:
            with torch.no_grad():
                known = self.__dict__["_packed"] = (state, self._pack(weight.detach(), *input_size))
        return known[1]

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


def _usable(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch._C._is_any_autocast_enabled()
        and type(x) is Tensor
        and x.dtype is weight.dtype
        and _computes_in(x.dtype)
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and torch.backends.mkldnn.enabled
    )


def _computes_in(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 or (dtype is torch.bfloat16 and _onednn._is_mkldnn_bf16_supported())


# In float32 oneDNN's call costs 10 microseconds over MKL's; so many products take about 100 on a core.
_SMALL_LINEAR = 1 << 23


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn._linear_pointwise(x, packed, bias, "none", [], "")


class PackedLinear(_Packed, nn.Linear):
    """`nn.Linear` made by `pack_weights`."""

    def _pack(self, weight: Tensor) -> Tensor:
        return _onednn._reorder_linear_weight(weight.contiguous())

    def forward(self, input: Tensor) -> Tensor:
        small = input.dtype is torch.float32 and input.numel() * self.out_features < _SMALL_LINEAR
        if small or not _usable(input, self.weight):
            return super().forward(input)
        return _linear(input, self._packed_weights(self.weight), self.bias)


class PackedConv2d(_Packed, nn.Conv2d):
    """`nn.Conv2d` made by `pack_weights`; the output is channels-last."""

    def _is_linear(self) -> bool:
        geometry = (*self.kernel_size, *self.stride, self.groups, *self.padding)
        return geometry == (1, 1, 1, 1, 1, 0, 0)

    def _pack(self, weight: Tensor, *input_size: int) -> Tensor:
        if self._is_linear():
            return _onednn._reorder_linear_weight(weight.flatten(1).contiguous())
        # The layout that oneDNN takes depends on the size, and another costs up to 20 times as long.
        return _onednn._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, input_size
        )

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4 or not _usable(input, self.weight):
            return super().forward(input)
        x = input.contiguous(memory_format=torch.channels_last)
        if self._is_linear():
            packed = self._packed_weights(self.weight)
            return _linear(x.permute(0, 2, 3, 1), packed, self.bias).permute(0, 3, 1, 2)
        packed = self._packed_weights(self.weight, tuple(x.shape))
        return _onednn._convolution_pointwise(
            x, packed, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )


class PackedGEGLU(_Packed, GEGLU):
    """`GEGLU` made by `pack_weights`: the GELU of the gate is taken while its results are in registers."""

    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        value, gate = weight.chunk(2)
        return tuple(_onednn._reorder_linear_weight(half.contiguous()) for half in (value, gate))

    def forward(self, hidden_states: Tensor) -> Tensor:
        proj = self.proj
        if not isinstance(proj, PackedLinear) or not _usable(hidden_states, proj.weight):
            return super().forward(hidden_states)
        value, gate = self._packed_weights(proj.weight)
        value_bias, gate_bias = (None, None) if proj.bias is None else proj.bias.chunk(2)
        gate = _onednn._linear_pointwise(hidden_states, gate, gate_bias, "gelu", [], "none")
        # oneDNN can multiply as well, but together with a bias that takes 1.5 ms more (PyTorch 2.13).
        return _linear(hidden_states, value, value_bias).mul_(gate)


_PACKED = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d, GEGLU: PackedGEGLU}

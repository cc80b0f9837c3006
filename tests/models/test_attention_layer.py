"""The attention layer against diffusers', in the forms models use it in and at widths that need padding."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention as PeerAttention

from fastldm.errors import ConfigError
from fastldm.nn import Attention


@pytest.mark.parametrize("dim_head", [8, 5, 40])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 9, 24)),
        ({"cross_attention_dim": 10, "bias": True}, (2, 9, 24)),
        ({"bias": True, "norm_num_groups": 4, "eps": 1e-3, "residual_connection": True}, (2, 24, 3, 5)),
        ({"bias": True, "norm_num_groups": 4, "eps": 1e-3, "residual_connection": True}, (2, 9, 24)),
    ],
    ids=["self", "cross", "feature_map", "normed_tokens"],
)
def test_matches_diffusers(options, shape, dim_head):
    torch.manual_seed(0)
    peer = PeerAttention(24, heads=3, dim_head=dim_head, **options)
    ours = Attention(24, heads=3, dim_head=dim_head, **options)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.4)
    ours.load_state_dict(peer.state_dict())
    hidden = torch.randn(shape)
    context = torch.randn(2, 7, 10) if "cross_attention_dim" in options else None
    mask = None
    if context is not None:
        mask = torch.tensor([[True] * 7, [False, True, True, False, True, False, False]])
    with torch.no_grad():
        bias = None if mask is None else torch.where(mask, 0.0, -torch.inf)[:, None, :]
        expected = peer(hidden, context, attention_mask=bias)
        output = ours(hidden, context, mask)
    assert expected.std() > 0.3
    assert (output - expected).abs().max() <= 1e-5


def test_a_row_without_any_key_gets_the_bias_alone():
    layer = Attention(16, heads=2, dim_head=8)
    hidden = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = layer(hidden, attention_mask=torch.zeros(1, 3, dtype=torch.bool))
    assert torch.equal(output, layer.to_out[0].bias.expand(1, 3, 16))


def test_too_wide_heads_are_refused():
    with pytest.raises(ConfigError, match="1024 are too wide"):
        Attention(16, heads=1, dim_head=1024)

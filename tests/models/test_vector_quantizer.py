from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer as PeerQuantizer

from fastldm.errors import InputError, TrainingError
from fastldm.nn import VectorQuantizer
from fastldm.nn.vector_quantizer import codebook_statistics

ROOT = Path(__file__).resolve().parents[2]
K, D = 11, 5


def spread_quantizer(**kwargs) -> VectorQuantizer:
    """A quantizer whose codes are about as far apart as the test's latents, so that many are in use."""
    quantizer = VectorQuantizer(K, D, **kwargs)
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def rows_of(z: torch.Tensor) -> torch.Tensor:
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def nearest(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Float64 argmin by direct differences."""
    return (rows_of(z).double()[:, None] - codebook.double()).square().sum(-1).argmin(1)


@pytest.mark.parametrize("legacy", [False, True])
def test_loss_and_gradients_against_the_formula_in_float64(legacy):
    quantizer = spread_quantizer(beta=0.25, legacy=legacy).double()
    z = torch.randn(2, D, 3, 4, dtype=torch.float64, requires_grad=True)
    _, loss, (_, _, indices) = quantizer(z)
    loss.backward()

    codebook = quantizer.embedding.weight.detach()
    difference = codebook[nearest(z, codebook)] - rows_of(z.detach())  # e - z
    error = difference.square().mean()
    commitment_weight, codebook_weight = (1.0, 0.25) if legacy else (0.25, 1.0)
    torch.testing.assert_close(loss, 1.25 * error, rtol=1e-12, atol=0)
    expected_z = commitment_weight * -2 * difference / difference.numel()
    torch.testing.assert_close(rows_of(z.grad), expected_z, rtol=1e-12, atol=1e-15)
    expected_codes = torch.zeros_like(codebook)
    expected_codes.index_add_(0, indices, codebook_weight * 2 * difference / difference.numel())
    torch.testing.assert_close(quantizer.embedding.weight.grad, expected_codes, rtol=1e-12, atol=1e-15)


def test_the_two_orders_differ():
    z = torch.randn(2, D, 3, 4)
    gradients = []
    for legacy in (False, True):
        torch.manual_seed(1)
        quantizer = spread_quantizer(legacy=legacy)
        quantizer(z)[1].backward()
        gradients.append(quantizer.embedding.weight.grad)
    torch.testing.assert_close(gradients[0], 4 * gradients[1])  # 1 against beta = 0.25


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("sane_index_shape", [False, True])
def test_same_as_diffusers(legacy, sane_index_shape):
    ours = spread_quantizer(beta=0.3, legacy=legacy, sane_index_shape=sane_index_shape)
    peer = PeerQuantizer(K, D, beta=0.3, legacy=legacy, sane_index_shape=sane_index_shape)
    peer.load_state_dict(ours.state_dict())
    z = torch.randn(2, D, 3, 4, requires_grad=True)
    other = z.detach().clone().requires_grad_()
    results = ours(z), peer(other)
    for quantizer_result in results:
        (quantizer_result[0].square().sum() + quantizer_result[1]).backward()
    (z_q, loss, (_, encodings, indices)), (peer_z_q, peer_loss, (_, _, peer_indices)) = results
    assert encodings is None
    assert torch.equal(indices, peer_indices)
    torch.testing.assert_close(z_q, peer_z_q, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, peer_loss)
    torch.testing.assert_close(z.grad, other.grad)
    torch.testing.assert_close(ours.embedding.weight.grad, peer.embedding.weight.grad)
    shape = (2, 3, 4, D)
    assert torch.equal(ours.get_codebook_entry(indices, shape), peer.get_codebook_entry(indices, shape))


@pytest.mark.parametrize("unknown_index", ["extra", 3])
def test_remap_same_as_diffusers(tmp_path, unknown_index):
    np.save(tmp_path / "used.npy", np.array([7, 2, 9, 0]))
    options = {"remap": tmp_path / "used.npy", "unknown_index": unknown_index}
    ours = spread_quantizer(beta=0.25, **options)
    peer = PeerQuantizer(K, D, beta=0.25, **options)
    peer.load_state_dict(ours.state_dict())
    z = torch.randn(2, D, 6, 6)
    indices, peer_indices = ours(z)[2][2], peer(z)[2][2]
    assert torch.equal(indices, peer_indices)
    assert indices.shape == (72, 1)
    shape = (2, 6, 6, D)
    # The peer changes the indices it is given.
    assert torch.equal(
        ours.get_codebook_entry(indices, shape), peer.get_codebook_entry(indices.clone(), shape)
    )


def test_remap_to_random_indices_in_use(tmp_path):
    np.save(tmp_path / "used.npy", np.array([7, 2]))
    quantizer = spread_quantizer(remap=tmp_path / "used.npy")
    full = torch.tensor([[7, 2, 0, 1, 3, 4, 5, 6, 8, 9, 10]])
    mapped = quantizer.remap_to_used(full)
    assert mapped[0, :2].tolist() == [0, 1]
    assert set(mapped[0, 2:].tolist()) <= {0, 1}
    assert quantizer.unmap_to_all(mapped)[0, :2].tolist() == [7, 2]


def test_remap_that_cannot_be_used_is_refused(tmp_path):
    np.save(tmp_path / "used.npy", np.array([1, K]))
    with pytest.raises(InputError, match=r"distinct indices in 0\.\.10"):
        VectorQuantizer(K, D, remap=tmp_path / "used.npy")


def test_output_is_exactly_the_code_and_its_gradient_passes_unchanged():
    quantizer = spread_quantizer()
    z = torch.randn(2, D, 3, 4, requires_grad=True)
    z_q, _, (_, _, indices) = quantizer(z)
    assert torch.equal(rows_of(z_q), quantizer.embedding.weight[indices])
    gradient = torch.randn_like(z_q)
    z_q.backward(gradient)
    assert torch.equal(z.grad, gradient)
    assert quantizer.embedding.weight.grad is None


def test_indices_are_shown_as_pictures_on_request():
    z = torch.randn(2, D, 3, 4)
    torch.manual_seed(1)
    flat = spread_quantizer()(z)[2][2]
    torch.manual_seed(1)
    square = spread_quantizer(sane_index_shape=True)(z)[2][2]
    assert torch.equal(flat.view(2, 3, 4), square)


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_half_precision_latents_are_looked_up_exactly(offset):
    # bfloat16 distances get most of these wrong: neighbouring codes are closer than their rounding.
    quantizer = VectorQuantizer(512, D)
    torch.nn.init.normal_(quantizer.embedding.weight, mean=offset)
    z = (offset + torch.randn(2, D, 8, 8)).bfloat16()
    expected = nearest(z, quantizer.embedding.weight)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, loss, (perplexity, _, indices) = quantizer(z)
    assert torch.equal(indices, expected)
    assert z_q.dtype == loss.dtype == perplexity.dtype == torch.float32
    assert torch.equal(rows_of(z_q), quantizer.embedding.weight[indices])
    half = VectorQuantizer(512, D).bfloat16()
    assert half(z)[0].dtype == torch.bfloat16
    assert half(z)[1].dtype == torch.float32


def test_codes_start_within_one_over_k():
    weight = VectorQuantizer(64, 128).embedding.weight.detach()
    assert weight.abs().max() <= 1 / 64
    assert weight.abs().max() > 0.99 / 64
    assert weight.std().item() == pytest.approx(1 / 64 / 3**0.5, rel=0.05)


def test_statistics():
    usage, perplexity = codebook_statistics(torch.tensor([[0, 0], [3, 3]]), 8)
    assert usage.item() == 0.25
    assert perplexity.item() == pytest.approx(2.0)
    usage, perplexity = codebook_statistics(torch.arange(8), 8)
    assert (usage.item(), perplexity.item()) == (1.0, pytest.approx(8.0))


def test_latents_of_another_width_are_refused():
    with pytest.raises(InputError, match=r"\(batch, 5, height, width\), got \(2, 4, 3, 3\)"):
        VectorQuantizer(K, D)(torch.randn(2, 4, 3, 3))


def test_ema_against_the_formula():
    decay, eps = 0.9, 1e-3
    quantizer = spread_quantizer()
    quantizer.enable_ema(decay, eps=eps)
    codebook = quantizer.embedding.weight.double().clone()
    count, total = torch.ones(K, dtype=torch.float64), codebook.clone()
    for step in range(3):
        z = torch.randn(2, D, 3, 4)
        one_hot = torch.nn.functional.one_hot(nearest(z, codebook), K).double()
        z_q, _, (_, _, indices) = quantizer(z)
        assert torch.equal(indices, one_hot.argmax(1)), step
        torch.testing.assert_close(
            rows_of(z_q).double(), codebook[indices], rtol=0, atol=1e-6
        )  # before the update
        count = decay * count + (1 - decay) * one_hot.sum(0)
        total = decay * total + (1 - decay) * one_hot.T @ rows_of(z).double()
        smoothed = (count + eps) / (count.sum() + K * eps) * count.sum()
        codebook = total / smoothed[:, None]
    torch.testing.assert_close(quantizer.ema_count.double(), count, rtol=1e-6, atol=0)
    torch.testing.assert_close(quantizer.ema_sum.double(), total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(quantizer.embedding.weight.double(), codebook, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("legacy", "weight"), [(False, 0.25), (True, 1.0)])
def test_ema_leaves_the_commitment_term_only(legacy, weight):
    quantizer = spread_quantizer(legacy=legacy)
    quantizer.enable_ema()
    z = torch.randn(2, D, 3, 4, requires_grad=True)
    codebook = quantizer.embedding.weight.clone()
    _, loss, (_, _, indices) = quantizer(z)
    loss.backward()
    torch.testing.assert_close(loss, weight * (codebook[indices] - rows_of(z)).square().mean())
    assert not quantizer.embedding.weight.requires_grad
    assert quantizer.embedding.weight.grad is None


def test_ema_moves_nothing_in_eval_mode():
    quantizer = spread_quantizer()
    quantizer.enable_ema(revive_below=1.0)
    quantizer.eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(2, D, 3, 4))
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_ema_refuses_half_precision():
    quantizer = spread_quantizer()
    quantizer.enable_ema()
    quantizer.bfloat16()
    with pytest.raises(TrainingError, match=r"kept in float32, this one is torch\.bfloat16"):
        quantizer(torch.randn(1, D, 2, 2).bfloat16())


def test_revival_moves_dead_codes_and_resets_both_averages():
    quantizer = spread_quantizer()
    dead = torch.tensor([1, 4])
    with torch.no_grad():
        quantizer.embedding.weight[dead] = 1e3  # nothing is near
    quantizer.enable_ema(decay=0.5, revive_below=0.4)
    with torch.no_grad():
        quantizer.ema_count[:] = 8.0
        quantizer.ema_count[dead] = 0.5
        quantizer.ema_sum.copy_(quantizer.embedding.weight * quantizer.ema_count[:, None])
    z = torch.randn(2, D, 6, 6)
    quantizer(z)
    weight = quantizer.embedding.weight
    for code in dead:
        assert (rows_of(z) == weight[code]).all(1).any()
    fair_count = 72 / K
    torch.testing.assert_close(quantizer.ema_count[dead], torch.full((2,), fair_count))
    torch.testing.assert_close(quantizer.ema_sum[dead], weight[dead] * fair_count)
    alive = torch.tensor([i for i in range(K) if i not in dead])
    assert quantizer.ema_count[alive].min() >= 4.0  # half of 8, plus what they caught
    assert not any((rows_of(z) == weight[code]).all(1).any() for code in alive)
    # The revived codes stay where the data is instead of being pulled back.
    for _ in range(5):
        quantizer(z)
    assert quantizer.embedding.weight[dead].abs().max() < 10


def cluster_batch() -> torch.Tensor:
    centres = 50 + torch.linspace(-20, 20, K)[:, None].expand(K, D)
    return (centres[torch.randint(K, (64,))] + 0.1 * torch.randn(64, D)).T.reshape(1, D, 8, 8)


def trained_usage(**ema) -> float:
    quantizer = VectorQuantizer(K, D)
    quantizer.enable_ema(decay=0.8, **ema)
    for _ in range(60):
        quantizer(cluster_batch())
    indices = torch.cat([quantizer.eval()(cluster_batch())[2][2] for _ in range(8)])
    return codebook_statistics(indices, K)[0].item()


def test_revival_prevents_the_collapse_that_happens_without_it():
    # All codes start near 0 and the K clusters of the data lie far to one side: the first codes to be drawn
    # there catch everything from then on.
    assert trained_usage() < 0.4
    assert trained_usage(revive_below=0.5) > 0.8


def test_codebook_starts_at_encoder_outputs():
    quantizer = VectorQuantizer(K, D)
    z = torch.randn(2, D, 3, 4)
    quantizer.initialize_codebook(z)
    weight = quantizer.embedding.weight
    assert (weight[:, None] == rows_of(z)).all(-1).any(1).all()
    assert len(weight.unique(dim=0)) == K
    assert codebook_statistics(quantizer(z)[2][2], K)[0] == 1.0


def test_codebook_start_with_fewer_vectors_than_codes_has_no_duplicates():
    quantizer = VectorQuantizer(K, D)
    quantizer.enable_ema()
    quantizer.initialize_codebook(torch.randn(1, D, 2, 2))
    assert len(quantizer.embedding.weight.unique(dim=0)) == K
    assert torch.equal(quantizer.ema_sum, quantizer.embedding.weight)
    assert torch.equal(quantizer.ema_count, torch.ones(K))


@pytest.mark.parametrize("ema", [False, True])
def test_compiles_into_one_graph(ema):
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        quantizer = spread_quantizer()
        if ema:
            quantizer.enable_ema()
        function = torch.compile(quantizer, fullgraph=True, backend="aot_eager") if compiled else quantizer
        z = torch.randn(2, D, 3, 4, requires_grad=True)
        z_q, loss, _ = function(z)
        (z_q.square().mean() + loss).backward()
        results.append((z_q, loss, z.grad, quantizer.embedding.weight))
    for eager, graph in zip(*results):
        torch.testing.assert_close(eager, graph)


WORKER = """
import sys
import torch
import torch.distributed as dist
from fastldm.nn import VectorQuantizer

rank, folder, revive_below = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(rank)
data = torch.load(f"{folder}/data.pt")
quantizer = VectorQuantizer(*data["codebook"].shape)
quantizer.initialize_codebook(data["z"][0][rank : rank + 1])
start = quantizer.embedding.weight.clone()
with torch.no_grad():
    quantizer.embedding.weight.copy_(data["codebook"])
quantizer.enable_ema(0.9, revive_below=revive_below)
for z in data["z"]:
    quantizer(z[rank : rank + 1])
torch.save({"start": start, **quantizer.state_dict()}, f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("revive_below", [0.0, 1.0])
def test_two_processes_train_one_codebook(tmp_path, revive_below):
    codebook = torch.randn(K, D)
    codebook[3] = 1e3
    data = {"codebook": codebook, "z": [torch.randn(2, D, 3, 4) for _ in range(3)]}
    torch.save(data, tmp_path / "data.pt")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path), str(revive_below)], cwd=ROOT
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name in ranks[0]:
        assert torch.equal(ranks[0][name], ranks[1][name]), name
    assert (ranks[0]["start"][:, None] == rows_of(data["z"][0][:1])).all(-1).any(1).all()
    if revive_below:
        assert ranks[0]["embedding.weight"][3].abs().max() < 10
        return
    single = VectorQuantizer(K, D)
    single.embedding.weight.data.copy_(codebook)
    single.enable_ema(0.9)
    for z in data["z"]:
        single(z)
    for name, value in single.state_dict().items():
        torch.testing.assert_close(ranks[0][name], value)

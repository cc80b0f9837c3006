"""Every claim runs from its training to its files, with models that have hardly trained."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastldm.cli import main
from fastldm.errors import ConfigError, InputError
from fastldm.reproduce import (
    CLAIMS,
    cfg_vs_clip,
    guidance,
    latent_vs_pixel,
    noised_clip,
    pairs,
    reproduce,
    text_vs_class,
    workspace,
)
from fastldm.reproduce.workspace import Workspace
from fastldm.training import config as configs

# accelerate fixes the precision of a process once, and the other tests of training have this one.
TINY = {
    "pairs-text": [
        "max_steps=2",
        "batch_size=4",
        "data.length=8",
        "mixed_precision=no",
        "unet.block_out_channels=[16, 16]",
    ],
    "pairs-clip": ["max_steps=2", "batch_size=4", "data.length=8", "mixed_precision=no"],
}


@pytest.fixture
def hardly_trained(monkeypatch):
    """Trains two steps and draws few pictures."""
    load = configs.load_config

    def tiny(cls, source, overrides=()):
        return load(cls, source, [*overrides, *TINY.get(str(source), [])])

    monkeypatch.setattr(workspace, "load_config", tiny)
    monkeypatch.setattr(pairs, "STEPS", 2)
    monkeypatch.setattr(text_vs_class, "_PICTURES", 21)
    for module in (guidance, noised_clip):
        monkeypatch.setattr(module, "MEASURED", 1)
        monkeypatch.setattr(module, "CLIP_SCALES", (1.0, 2.0))
    monkeypatch.setattr(guidance, "TRIED", 1)
    monkeypatch.setattr(cfg_vs_clip, "_FREE_SCALES", (2.0,))
    monkeypatch.setattr(latent_vs_pixel, "_TURNS", 2)
    monkeypatch.setattr(latent_vs_pixel, "_TURN_SECONDS", 0)
    monkeypatch.setattr(latent_vs_pixel, "_CALIBRATION_STEPS", 2)
    monkeypatch.setattr(latent_vs_pixel, "_PICTURES", 21)
    monkeypatch.setattr(latent_vs_pixel, "_ROUNDS", 2)
    monkeypatch.setattr(latent_vs_pixel, "_SAMPLED", 2)
    monkeypatch.setattr(noised_clip, "_READ", 3)
    small = ("data.length=4", "batch_size=2")
    monkeypatch.setattr(latent_vs_pixel, "_COMMON", (*latent_vs_pixel._COMMON, *small))


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_writes_what_it_found(claim, hardly_trained, tmp_path):
    finding = reproduce(claim, tmp_path, progress=False)
    assert finding.claim == claim
    # Models that have not learned anything support no claim about accuracy.
    assert finding.holds is not True
    gains = finding.select("difference")
    assert gains
    assert all(gain.interval[0] <= gain.value <= gain.interval[1] for gain in gains)
    written = json.loads((tmp_path / claim / "finding.json").read_text(), parse_constant=pytest.fail)
    assert written["verdict"] == finding.verdict
    assert written["versions"]["torch"]
    for name in ("plot.png", "pictures.png"):
        with Image.open(tmp_path / claim / name) as picture:
            assert min(picture.size) > 100


def test_what_claims_share_is_trained_once(hardly_trained, tmp_path, monkeypatch):
    reproduce("noised-clip", tmp_path, progress=False)
    monkeypatch.setattr(workspace, "train", lambda *a, **k: pytest.fail("trained again"))
    first = (tmp_path / "noised-clip" / "finding.json").read_text()
    reproduce("noised-clip", tmp_path, progress=False)
    assert (tmp_path / "noised-clip" / "finding.json").read_text() == first
    reproduce("cfg-vs-clip", tmp_path, progress=False)


def test_another_seed_is_another_experiment(hardly_trained, tmp_path):
    first = reproduce("text-vs-class", tmp_path / "0", progress=False)
    other = reproduce("text-vs-class", tmp_path / "1", seed=1, progress=False)
    assert (first.seed, other.seed) == (0, 1)
    weights = [
        load_file(tmp_path / seed / "runs/pairs-text/model/unet/diffusion_pytorch_model.safetensors")
        for seed in "01"
    ]
    assert not torch.equal(*(w["conv_in.weight"] for w in weights))
    pictures = [Image.open(tmp_path / seed / "text-vs-class/pictures.png").tobytes() for seed in "01"]
    assert pictures[0] != pictures[1]
    with pytest.raises(ConfigError, match="other values of seed"):
        reproduce("text-vs-class", tmp_path / "0", seed=1, progress=False)
    for seed in (-1, 1.0, True, "1"):
        with pytest.raises(InputError, match="give a whole number from 0"):
            reproduce("text-vs-class", tmp_path / "2", seed=seed)


def test_the_noise_of_seeds_is_never_shared():
    seeds = [Workspace(Path(), seed=seed).draw_seed(series) for seed in range(5) for series in range(3)]
    assert len(set(seeds)) == len(seeds)


def test_a_folder_with_other_models_is_refused(hardly_trained, tmp_path, monkeypatch):
    reproduce("text-vs-class", tmp_path, progress=False)
    monkeypatch.setitem(TINY, "pairs-text", [*TINY["pairs-text"], "optimizer.lr=0.5"])
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        reproduce("text-vs-class", tmp_path, progress=False)


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_shipped_findings_are_shown(claim, capsys):
    assert main(["reproduce", claim, "--shipped"]) == 0
    said = capsys.readouterr().out
    assert claim in said
    folder = Path(said.splitlines()[-1])
    assert all((folder / name).is_file() for name in ("finding.json", "plot.png", "pictures.png"))
    assert main(["reproduce", claim, "--shipped", "--out", "elsewhere"]) == 2
    assert main(["reproduce", claim, "--shipped", "--seed", "1"]) == 2

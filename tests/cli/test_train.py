"""`fastldm train`."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastldm.cli import main
from fastldm.cli.train import _KINDS, config_class
from fastldm.models.vq_model import VQModel
from fastldm.training.config import load_config, shipped_configs

ROOT = Path(__file__).resolve().parents[2]


def train(*arguments) -> int:
    return main(["train", *map(str, arguments)])


def test_train_prints_the_exported_folder_and_resumes(vq_file, tmp_path, capsys):
    assert train("vq", "--config", vq_file, "max_steps=2", "name=a", "batch_size=3") == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == tmp_path / "runs" / "a" / "model"
    VQModel.from_pretrained(folder)
    assert train("vq", "--config", vq_file, "name=a", "--resume", "batch_size=3", "max_steps=4") == 0
    assert (tmp_path / "runs" / "a" / "checkpoints" / "step-000004").is_dir()


def test_resume_says_where_it_begins(vq_file, capsys, tmp_path):
    def said(*arguments):
        assert train("vq", "--config", vq_file, "name=a", *arguments) == 0
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastldm: ")]

    run = tmp_path / "runs" / "a"
    absent = f"fastldm: no checkpoint in {run / 'checkpoints'}; starting at step 0"
    assert said("--resume", "max_steps=2") == [absent]
    (finished,) = said("--resume", "max_steps=2")
    assert finished.startswith(f"fastldm: {run} is already at step 2 of max_steps=2")
    assert said("--resume", "max_steps=3") == []
    assert said("name=b", "max_steps=1") == []


def test_show_prints_the_configuration_and_trains_nothing(vq_file, tmp_path, capsys):
    assert train("vq", "--config", vq_file, "--show", "optimizer.lr=0.5") == 0
    shown = capsys.readouterr().out
    assert "  # Side of the square training picture in pixels.\n  size: 32\n" in shown
    assert "\n  lr: 0.5\n" in shown
    assert not (tmp_path / "runs").exists()
    again = tmp_path / "shown.yaml"
    again.write_text(shown)
    assert train("vq", "--config", again, "--show") == 0
    assert capsys.readouterr().out == shown


def test_every_shipped_configuration_belongs_to_one_kind():
    shipped = [name for kind in _KINDS.values() for name in kind.shipped]
    assert sorted(shipped) == shipped_configs()
    for kind, about in _KINDS.items():
        for name in about.shipped:
            load_config(config_class(kind), name)


def test_a_shipped_configuration_of_another_kind_is_named(fails):
    said = "shapes-ldm is a configuration of `fastldm train ldm`; for `train clip` give shapes-clip or"
    assert said in fails("train", "clip", "--config", "shapes-ldm")


def test_what_is_wrong_with_a_configuration_is_named(vq_file, fails, tmp_path):
    assert "absent.yaml" in fails("train", "vq", "--config", tmp_path / "absent.yaml")
    assert "did you mean batch_size" in fails("train", "vq", "--config", vq_file, "batchsize=3")
    assert "optimizer.lr" in fails("train", "vq", "--config", vq_file, "optimizer.lr=fast")
    assert "weight_l1" in fails("train", "vq", "--config", vq_file, "loss.weight_l1=1")
    assert "'channels'" in fails("train", "vq", "--config", vq_file, "model.config.channels=3")
    overrides = ["first_stage.path=''", "mixed_precision=no"]
    assert "first_stage.path" in fails("train", "ldm", "--config", "shapes-ldm", *overrides)
    assert "fp16" in fails("train", "vq", "--config", vq_file, "mixed_precision=fp16", "name=half")


def test_pictures_that_are_missing_or_too_small_are_named(vq_file, fails, tmp_path):
    folder = tmp_path / "pictures"
    data = ["data.source=image_folder", f"data.path={folder}"]
    assert str(folder) in fails("train", "vq", "--config", vq_file, *data)
    folder.mkdir()
    Image.fromarray(np.zeros((20, 50, 3), np.uint8)).save(folder / "flat.png")
    line = fails("train", "vq", "--config", vq_file, *data)
    assert "flat.png" in line
    assert "20" in line


def test_a_folder_that_cannot_be_made_is_named_before_training(vq_file, fails, tmp_path, monkeypatch):
    monkeypatch.setattr("fastldm.training.first_stage_task.FirstStageTask.__init__", None)
    (tmp_path / "file").write_text("")
    line = fails("train", "vq", "--config", vq_file, f"output_dir={tmp_path / 'file'}")
    assert f"cannot make the folder {tmp_path / 'file' / 'vq'}" in line


def test_a_size_that_the_model_cannot_halve_is_refused(vq_file, fails):
    assert "33" in fails("train", "vq", "--config", vq_file, "data.size=33")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.config.in_channels=x", "no VQModel can be built"),
        ("loss.l1_weight=x", "'loss.l1_weight' takes"),
        ("seed=99999999999999999999999", "'seed' must be at least 0 and below"),
        ("data.path=pictures", "add data.source=image_folder"),
        ("data.random_flip=true", "add data.source=image_folder"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(vq_file, fails, override, said):
    assert said in fails("train", "vq", "--config", vq_file, override)


def test_a_codebook_setting_of_a_kl_autoencoder(vq_file, fails):
    overrides = ("model.kind=kl", "model.ema_codebook_decay=0.9")
    assert "are for model.kind=vq" in fails("train", "vq", "--config", vq_file, *overrides)


def test_a_picture_that_a_worker_cannot_read_is_one_short_line(vq_file, fails, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for name in ("1.png", "2.png"):
        Image.fromarray(noise).save(folder / name)
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    data = ("data.source=image_folder", f"data.path={folder}", "data.num_workers=1")
    line = fails("train", "vq", "--config", vq_file, *data)
    assert line.startswith(f"fastldm: error: {folder / '2.png'} ")
    assert "Traceback" not in line


def test_without_the_train_extra(vq_file, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "pip install 'fastldm[train]'" in fails("train", "vq", "--config", vq_file)


def test_a_loss_that_is_not_finite(vq_file, fails, tmp_path):
    overrides = ["optimizer.lr=1e30", "optimizer.max_grad_norm=null", "checkpoint_every=1", "log_every=1"]
    line = fails("train", "vq", "--config", vq_file, *overrides)
    assert "not finite" in line
    assert "checkpoint" in line


def test_a_disk_that_is_full_while_saving_keeps_the_old_checkpoint(vq_file, fails, tmp_path):
    assert train("vq", "--config", vq_file, "max_steps=2") == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        line = fails("train", "vq", "--config", vq_file, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write the checkpoint" in line
    assert "step-000002" in line
    checkpoints = tmp_path / "runs" / "vq" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]


def test_ctrl_c_saves_and_ends_with_one_line(vq_file, tmp_path):
    process = subprocess.Popen(
        [
            *[sys.executable, "-m", "fastldm", "train", "vq", "--config", str(vq_file)],
            *["max_steps=100000", "data.num_workers=1"],
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    checkpoints = tmp_path / "runs" / "vq" / "checkpoints"
    while process.poll() is None and not (checkpoints.is_dir() and any(checkpoints.glob("step-*"))):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the reading process gets it too
    errors = process.communicate()[1].splitlines()
    assert process.returncode == 130, errors
    last = [line for line in errors if not line.startswith("step ")]
    assert len(last) == 1, errors
    assert last[0].startswith("fastldm: stopped at step ")
    assert "--resume" in last[0]
    stopped = int(last[0].split("step ")[1].split()[0])
    assert (checkpoints / f"step-{stopped:06d}").is_dir()


@pytest.mark.parametrize("precision", ["bf16"])
def test_mixed_precision_trains_and_keeps_float32_weights(vq_file, tmp_path, precision):
    # In a process of its own: accelerate allows one precision per process.
    command = ["train", "vq", "--config", str(vq_file), f"mixed_precision={precision}"]
    result = subprocess.run(
        [sys.executable, "-m", "fastldm", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "step 4/4  loss" in result.stderr
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "runs" / "vq" / "checkpoints" / "step-000004" / "model.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}


@pytest.mark.parametrize(
    ("kind", "overrides", "said"),
    [
        ("classifier", ["data.kind=two"], "no single class; use data.kind=one"),
        ("classifier", ["data.kind=mixed"], "no single class; use data.kind=one"),
        ("classifier", ["model.chanel_mult=[1, 1]"], "'chanel_mult' .*; did you mean channel_mult"),
        ("classifier", ["schedule.beta_shedule=linear"], "beta_shedule; did you mean beta_schedule"),
        ("glide", ["unet.xf_heads=three"], "xf_heads takes int, got 'three'"),
        ("glide", ["unet.xf_head=3"], "'xf_head' .given 3.; did you mean xf_heads"),
        ("clip", ["model.text_config.hiden_size=3"], "'hiden_size' .*; did you mean hidden_size"),
        ("clip", ["model.vision_config.patch_size=two"], "patch_size takes int, got 'two'"),
    ],
)
def test_what_a_network_does_not_take_is_named(fails, tmp_path, kind, overrides, said):
    config = ["train", kind, "--config", f"shapes-{kind}", f"output_dir={tmp_path}", "mixed_precision=no"]
    assert re.search(said, fails(*config, "data.length=4", *overrides))
    assert not (tmp_path / f"shapes-{kind}" / "checkpoints").exists()

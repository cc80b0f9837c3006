"""The accuracy report: its counts, its intervals, its table, and what it depends on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import InputError
from fastldm.evaluation.accuracy import SETS, Score, evaluate
from fastldm.models.conditioners import ClassConditioner, TextConditioner
from fastldm.models.text_transformer import LDMBertModel
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet2DConditionModel
from fastldm.models.vq_model import VQModel
from fastldm.systems.latent_diffusion import ImagePipelineOutput, LatentDiffusionPipeline
from fastldm.training.datasets.shapes import all_captions, parse_caption, render, vocabulary


def tiny_parts(conditioner=None):
    tokenizer = Tokenizer.from_captions(vocabulary(), 16)
    text = LDMBertModel(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=16,
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=1,
        head_dim=8,
        d_model=8,
    )
    first_stage = VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=1,
        norm_num_groups=4,
    )
    schedule = NoiseSchedule.scaled_linear(100)
    return first_stage, conditioner or TextConditioner(text, tokenizer), unet, schedule


class Painter(LatentDiffusionPipeline):
    """Stands for a trained model: draws every caption with the dataset's own renderer, after `change`.

    Its first stage keeps pictures as they are, or loses all.
    """

    def __init__(self, change=lambda text: text, lossless=True):
        super().__init__(*tiny_parts(), defaults={"guidance_scale": 2.0, "num_inference_steps": 3})
        self.change = change
        self.lossless = lossless
        self.calls = []

    def encode(self, images, generator=None):
        return images

    def decode(self, latents):
        return latents if self.lossless else torch.zeros_like(latents)

    def __call__(self, prompt, *, num_inference_steps, guidance_scale, generator, output_type, progress):
        assert output_type == "np"
        assert progress is False
        self.calls.append((len(prompt), num_inference_steps, guidance_scale))
        pictures = []
        for text, source in zip(prompt, generator, strict=True):
            seed = int(torch.randint(2**31, (), generator=source))
            pictures.append(np.asarray(render(parse_caption(self.change(text)), seed), np.float32) / 255)
        return ImagePipelineOutput(np.stack(pictures))


def row_of(report, pictures, kind, split, scale=None):
    wanted = (pictures, kind, split, scale)
    (row,) = [r for r in report.rows if (r.pictures, r.kind, r.split, r.guidance_scale) == wanted]
    return row


def test_a_perfect_model_scores_everything():
    pipeline = Painter()
    report = evaluate(pipeline, num_captions=12, batch_size=5, progress=False)
    assert len(report.rows) == 3 * len(SETS)
    for kind, split in SETS:
        for pictures, scale in (("renders", None), ("reconstructions", None), ("samples", 2.0)):
            row = row_of(report, pictures, kind, split, scale)
            attributes = ("size", "place") if kind == "one" else ("relation",)
            assert list(row.scores) == ["count", "colour", "shape", *attributes, "all"]
            assert all(score == Score(12, 12) for score in row.scores.values())
    assert pipeline.calls == [(5, 3, 2.0), (5, 3, 2.0), (2, 3, 2.0)] * len(SETS)


def test_wrong_pictures_are_counted_where_they_are_wrong():
    def change(text):
        return text.replace("red", "blue").replace("left", "right")

    report = evaluate(
        Painter(change, lossless=False),
        num_captions=40,
        sets=[("one", "seen")],
        guidance_scales=[1, 4.5],
        progress=False,
    )
    for scale in (1, 4.5):
        scores = row_of(report, "samples", "one", "seen", scale).scores
        assert scores["count"] == scores["shape"] == scores["size"] == Score(40, 40)
        assert 0 < scores["colour"].accuracy < 1
        assert 0 < scores["place"].accuracy < 1
        assert scores["all"].right < min(scores["colour"].right, scores["place"].right)
    assert row_of(report, "reconstructions", "one", "seen").scores["all"].right == 0
    assert row_of(report, "renders", "one", "seen").scores["all"] == Score(40, 40)


def test_report_as_table_dictionary_and_picture(tmp_path):
    def change(text):
        return text.replace("circle", "star")

    report = evaluate(
        Painter(change),
        num_captions=20,
        sets=[("one", "seen"), ("two", "seen")],
        num_inference_steps=7,
        progress=False,
    )
    values = json.loads(json.dumps(report.to_dict()))
    assert (values["num_captions"], values["num_inference_steps"], values["seed"]) == (20, 7, 0)
    assert len(values["rows"]) == 6
    for row in values["rows"]:
        score = row["scores"]["all"]
        assert score["accuracy"] == score["right"] / score["total"]
        assert score["interval"][0] <= score["accuracy"] <= score["interval"][1]
    lines = str(report).splitlines()
    assert len(lines) == 2 + 6
    assert lines[0] == "20 captions each, 7 steps, seed 0; in %"
    assert "one, seen" in lines[2]
    shape = row_of(report, "samples", "one", "seen", 2.0).scores["shape"].accuracy
    assert f"{100 * shape:.1f}" in lines[4]
    assert len(report.examples) == 16
    wrong = {e.caption: e.wrong for e in report.examples[:8]}
    assert all(("shape" in names) == ("circle" in text) for text, names in wrong.items())
    report.save_examples(tmp_path / "examples.png")
    with Image.open(tmp_path / "examples.png") as picture:
        assert picture.width > 8 * 64
    assert [p.name for p in tmp_path.iterdir()] == ["examples.png"]


def test_same_seed_same_report_at_any_batch_size():
    pipeline = Painter(lambda text: text.replace("square", "circle"))
    arguments = {"num_captions": 12, "sets": [("two", "seen")], "progress": False}
    first, second = (evaluate(pipeline, batch_size=size, **arguments) for size in (5, 12))
    assert first.to_dict() == second.to_dict()
    for a, b in zip(first.examples, second.examples):
        assert (a.caption, a.picture.tobytes()) == (b.caption, b.picture.tobytes())
    other = evaluate(pipeline, seed=1, **arguments)
    assert [e.caption for e in other.examples] != [e.caption for e in first.examples]


def test_an_untrained_pipeline_scores_nothing():
    pipeline = LatentDiffusionPipeline(*tiny_parts())
    report = evaluate(
        pipeline,
        num_captions=4,
        sets=[("one", "held-out")],
        guidance_scales=[1.0, 3.0],
        num_inference_steps=2,
        progress=False,
    )
    assert [row.scores["all"].right for row in report.rows] == [4, 0, 0, 0]


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (1, 3), (486, 512)])
def test_wilson_interval(right, total):
    """The bounds are the true accuracies from which the found one is 1.96 standard deviations away."""
    score = Score(right, total)
    low, high = score.interval
    assert 0 <= low <= score.accuracy <= high <= 1
    for bound in {low, high} - {0.0, 1.0}:
        deviation = (bound * (1 - bound) / total) ** 0.5
        assert abs(score.accuracy - bound) == pytest.approx(1.95996398 * deviation, rel=1e-7)
    assert Score(0, 10).interval[1] == pytest.approx(3.841459 / (10 + 3.841459), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_captions": 0}, "num_captions must be at least 1, not 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, not -1"),
        ({"sets": [("one", "train")]}, "captions 'one, train' are not offered"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate(Painter(), progress=False, **arguments)


def test_a_model_without_captions_is_refused():
    pipeline = LatentDiffusionPipeline(*tiny_parts(ClassConditioner(3, 8)))
    with pytest.raises(InputError, match="ClassConditioner takes no captions"):
        evaluate(pipeline, num_captions=1, progress=False)


def test_every_caption_fits_a_tokenizer_of_the_vocabulary():
    tokenizer = Tokenizer.from_captions(vocabulary(), 16)
    assert tokenizer(all_captions()).shape == (2400, 16)

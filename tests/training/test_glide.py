"""Training GLIDE: the numbers of the loss, inpainting from a trained network, resuming, exports."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from fastldm.diffusion import NoiseSchedule, hybrid_loss, simple_loss
from fastldm.errors import ConfigError
from fastldm.models import GlideTokenizer, GlideUNet
from fastldm.models.unet import UNet2DConditionOutput
from fastldm.systems import GlidePipeline
from fastldm.systems.glide_stage import BASE_NOISE, UPSAMPLER_NOISE
from fastldm.training.config import GlideConfig, load_config
from fastldm.training.data import StreamSampler, batches
from fastldm.training.glide import GlideTask, glide_loss, random_regions, stacked
from fastldm.training.loop import TrainingInterrupted, train

CPU = torch.device("cpu")
GLIDE = {
    "max_steps": 4,
    "batch_size": 4,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 0,
    "data": {"size": 32, "length": 16, "kind": "one", "attributes": ["colour", "shape"]},
    "max_length": 6,
    "unet": {
        "model_channels": 32,
        "channel_mult": [1, 1],
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "num_head_channels": 32,
        "dropout": 0.0,
        "xf_width": 16,
        "xf_layers": 1,
        "xf_heads": 2,
    },
    "optimizer": {"lr": 1e-3, "warmup_steps": 2, "schedule": "cosine"},
    "sampling": {"num_images": 2, "num_inference_steps": 2, "sampler": "ddim"},
}
UPSAMPLER = ("low_res=16", "name=upsampler")


@pytest.fixture
def glide_config(tmp_path):
    """make(*overrides) -> GlideConfig that writes below tmp_path."""

    def make(*overrides: str) -> GlideConfig:
        values = {**copy.deepcopy(GLIDE), "output_dir": str(tmp_path / "runs")}
        return load_config(GlideConfig, values, overrides)

    return make


@pytest.fixture
def trained(glide_config, tmp_path):
    """Folder of a base network with weights of which none is zero, and the overrides that go on with it."""
    task = GlideTask(glide_config())
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator(1)))
    task.export(tmp_path / "base", torch.float32)
    return [f"start_from={tmp_path / 'base'}", "unet={}"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prepared(task, count=4):
    task.to(CPU)
    batch = next(batches(task.dataset, StreamSampler(len(task.dataset), count, seed=0)))
    return task.prepare(batch, generator())


class Recorder(torch.nn.Module):
    """A network that answers zeros and keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(xf_padding=True)
        self.calls = []

    def forward(self, x, t, tokens, mask, **pictures):
        self.calls.append({"x": x, "t": t, "tokens": tokens, "mask": mask, **pictures})
        return UNet2DConditionOutput(sample=x.new_zeros(len(x), 2 * x.shape[1], *x.shape[2:]))


def asked(count=4000, **options):
    """What the network was asked for `count` samples, and their texts."""
    tokenizer = GlideTokenizer.from_captions(["a red circle"], 4)
    texts = stacked(*tokenizer(["a red circle"])).expand(count, -1, -1)
    unet, images = Recorder(), torch.randn(count, 1, 4, 4, generator=generator(8))
    glide_loss(
        unet,
        NoiseSchedule(**BASE_NOISE),
        images,
        texts,
        stacked(*tokenizer("")),
        generator=generator(),
        **options,
    )
    return unet.calls[0], texts, images


def test_the_loss_is_the_hybrid_one_of_what_the_network_says(glide_config):
    for overrides, loss in (
        ((), hybrid_loss),
        (("schedule.variance_type=fixed_small",), simple_loss),
        (("unet.xf_padding=false",), hybrid_loss),
        (UPSAMPLER, hybrid_loss),
    ):
        task = GlideTask(glide_config("condition_dropout=0", *overrides))
        torch.nn.init.normal_(task.module.unet.out[2].weight, std=0.1)
        batch = prepared(task)
        found, _ = task.module(batch, step=0, generator=generator(5))
        source = generator(5)
        t = torch.randint(1000, (4,), generator=source)
        noise = torch.randn(4, 3, 32, 32, generator=source)
        alpha_bar = task.stage.schedule.alphas_cumprod[t][:, None, None, None]
        x = alpha_bar.sqrt() * batch["image"] + (1 - alpha_bar).sqrt() * noise
        tokens, mask = batch["text"].unbind(1)
        low_res = F.avg_pool2d(batch["image"], 2) if overrides == UPSAMPLER else None
        with torch.no_grad():
            mask = mask.bool() if task.module.unet.config.xf_padding else None
            output = task.module.unet(x, t, tokens, mask, low_res=low_res).sample
        wanted = loss(output, batch["image"], noise, t, task.stage.schedule).mean()
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert output.shape[1] == (6 if loss is hybrid_loss else 3)


def test_captions_are_emptied_with_the_given_probability():
    for probability, low, high in ((0.0, 0, 0), (0.2, 673, 927), (1.0, 4000, 4000)):
        call, texts, _ = asked(condition_dropout=probability)
        empty = ~call["mask"].any(dim=1)
        # 800 expected at 0.2, standard deviation sqrt(4000 * 0.16) = 25: five of them.
        assert low <= int(empty.sum()) <= high
        assert torch.equal(call["tokens"][~empty], texts[~empty, 0])
        assert torch.equal(call["mask"][~empty], texts[~empty, 1].bool())
        assert len(call["tokens"][empty].unique()) <= 1


def test_what_is_erased_is_a_rectangle_of_each_picture_and_some_are_erased_whole():
    regions = random_regions((4000, 3, 12, 8), generator(2))
    assert regions.shape == (4000, 1, 12, 8)
    rows, columns = regions.any(dim=3), regions.any(dim=2)
    assert torch.equal(regions, rows[..., None] & columns[..., None, :])
    for places, side in ((rows, 12), (columns, 8)):
        starts = (places[..., 1:] & ~places[..., :-1]).sum(-1) + places[..., 0].long()
        assert (starts == 1).all()
        assert places.sum(-1).min() == 1
        assert set(places.sum(-1).flatten().tolist()) == set(range(1, side + 1))
    whole = regions.flatten(1).all(dim=1).float().mean()
    # 1/8 and, of the rest, 1 in 12 * 8: 0.134, standard deviation 0.0054.
    assert 0.107 < whole < 0.161
    middle, first, last = (
        regions[:, 0, row, column].float().mean() for row, column in ((6, 4), (0, 0), (-1, -1))
    )
    assert middle > first > 0.17
    assert middle > last > 0.17


def test_the_network_is_shown_what_is_not_erased():
    call, _, images = asked(count=64, inpainting=True)
    mask = call["inpaint_mask"]
    # After t, the noise and which captions are emptied.
    source = generator()
    torch.randint(1000, (64,), generator=source)
    torch.randn(images.shape, generator=source)
    torch.rand(64, generator=source)
    assert torch.equal(mask, 1 - random_regions(images.shape, source).float())
    assert mask.unique().tolist() == [0, 1]
    assert torch.equal(call["inpaint_image"] * mask, images * mask)
    plain, *_ = asked(count=64)
    assert torch.equal(plain["x"], call["x"])
    assert torch.equal(plain["mask"], call["mask"])
    assert "inpaint_image" not in plain


def test_inpainting_begins_with_exactly_the_loss_of_the_network_it_starts_from(glide_config, trained):
    plain = GlideTask(glide_config(*trained))
    inpainting = GlideTask(glide_config(*trained, "inpainting=true"))
    assert inpainting.module.unet.config.inpaint
    batch = prepared(plain)
    losses = []
    for task in (plain, inpainting):
        loss, _ = task.module.train()(batch, step=0, generator=generator(3))
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    weight = inpainting.module.unet.input_blocks[0][0].weight
    assert (weight[:, 3:] == 0).all()
    assert (weight.grad[:, 3:7].flatten(2).abs().amax(dim=(0, 2)) > 0).all()
    assert plain.tokenizer.vocab == inpainting.tokenizer.vocab


def run(config, **options):
    tasks = []

    def build():
        tasks.append(GlideTask(config))
        return tasks[0]

    folder = train(config, build, progress=False, **options)
    return tasks[0], folder


def test_a_short_run_lowers_the_loss(glide_config):
    task, _ = run(glide_config("max_steps=20", "optimizer.lr=3e-3", "checkpoint_every=20"))
    fresh = GlideTask(glide_config())
    batch = prepared(fresh, 16)
    with torch.no_grad():
        before, after = (t.module.eval()(batch, step=0, generator=generator(4))[0] for t in (fresh, task))
    assert after < 0.9 * before


@pytest.mark.parametrize("overrides", [("name=base",), UPSAMPLER])
def test_resuming_gives_the_same_bits(glide_config, overrides):
    names = [f"{overrides[-1]}-{kind}" for kind in ("straight", "stopped")]
    straight, stopped = (glide_config(*overrides, name) for name in names)
    _, folder = run(straight)

    def build():
        task = GlideTask(stopped)
        forward = task.module.forward

        def stopping(batch, *, step, generator):
            if step == 3:
                raise TrainingInterrupted
            return forward(batch, step=step, generator=generator)

        task.module.forward = stopping
        return task

    with pytest.raises(TrainingInterrupted):
        train(stopped, build, progress=False)
    run(stopped, resume=True)
    last = [Path(c.output_dir) / c.name / "checkpoints" / "step-000004" for c in (straight, stopped)]
    for name in ("model.safetensors", "ema.safetensors"):
        one, other = (load_file(step / name) for step in last)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert folder.is_dir()


def test_what_is_cut_of_captions_is_said_once(glide_config, said_of_captions, tmp_path):
    config = glide_config("max_length=2", "max_steps=2")
    (said,) = said_of_captions(lambda: train(config, lambda: GlideTask(config), progress=False))
    assert said.startswith("16 of 16 captions are longer")
    assert said.endswith("see max_length")
    model = tmp_path / "runs" / config.name / "model"
    further = glide_config(f"start_from={model}", "unet={}", "inpainting=true")
    (said,) = said_of_captions(lambda: GlideTask(further))
    assert said.endswith(f"the window of the model in start_from={model} stays as it was trained")


def test_a_base_and_an_upsampler_become_a_pipeline(glide_config):
    base_task, base = run(glide_config("max_steps=1", "ema.enabled=false", "name=base"))
    large = [*UPSAMPLER, "low_res=32", "data.size=64", "max_steps=1", "schedule.beta_end=0.01"]
    _, upsampler = run(glide_config(*large))
    pipeline = GlidePipeline.from_parts(base, upsampler)
    (picture,) = pipeline("a red circle", progress=False).images
    assert picture.size == (64, 64)
    assert pipeline.base.schedule.to_fields() == NoiseSchedule(**BASE_NOISE).to_fields()
    wanted = NoiseSchedule(**{**UPSAMPLER_NOISE, "beta_end": 0.01})
    assert pipeline.upsampler.schedule.to_fields() == wanted.to_fields()
    assert (pipeline.sampler, pipeline.upsampler_sampler) == ("ddim", "ddim")
    assert pipeline.defaults["num_inference_steps"] == pipeline.defaults["upsampler_steps"] == 2
    state = base_task.module.unet.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in pipeline.base.unet.state_dict().items())


@pytest.mark.parametrize("overrides", [["sampling.prompts=[a red circle]"], UPSAMPLER, None])
def test_pictures_on_the_way(glide_config, trained, overrides):
    overrides = [*trained, "inpainting=true"] if overrides is None else overrides
    picture = GlideTask(glide_config(*overrides))
    picture.to(CPU)
    drawn = picture.picture(0)
    assert isinstance(drawn, Image.Image)
    again = picture.picture(0)
    assert drawn.tobytes() == again.tobytes()
    count = 1 if "sampling.prompts=[a red circle]" in overrides else 2
    assert drawn.width == 4 + count * (64 + 4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["unet.n_vocab=7"], r"unet\.n_vocab=7, but the rest says"),
        (["unet.super_res=true"], r"unet\.super_res=True, but the rest says False"),
        (["unet.width=7"], "'width'"),
        (["low_res=32"], "'low_res' must be at least 1 and below 32"),
        (["condition_dropout=1.5"], "'condition_dropout' must be"),
        (["start_from=x"], "unet with start_from=x: those of that folder are used"),
        (["inpainting=true", "sampling.prompts=[a]"], r"sampling\.prompts are for a base network"),
        (["sampling.prompts=[3]"], r"sampling\.prompts \[3\] must be captions"),
        (["sampling.num_inference_steps=2000"], "use 1 to 1000"),
        (["schedule.beta_schedule=cosine"], "beta_schedule='cosine' is not offered"),
        (["data.attributes=null", "data.source=image_folder"], r"data\.path"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(glide_config, overrides, said):
    with pytest.raises(Exception, match=said) as caught:
        GlideTask(glide_config(*overrides))
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_gone_on_with_is_named(glide_config, trained, tmp_path):
    with pytest.raises(ConfigError, match="has no upsampler; leave low_res out"):
        GlideTask(glide_config(*trained, *UPSAMPLER))
    with pytest.raises(ConfigError, match=r"makes pictures of 32 pixels; set data\.size to that"):
        GlideTask(glide_config(*trained, "data.size=64"))
    assert GlideTask(glide_config("low_res=16")).pipeline().upsampler.low_res == 16
    GlideTask(glide_config("low_res=16")).export(tmp_path / "upsampler", torch.float32)
    further = [f"start_from={tmp_path / 'upsampler'}", "unet={}"]
    with pytest.raises(ConfigError, match="enlarges pictures of 16 pixels; set low_res to that"):
        GlideTask(glide_config(*further, "low_res=8"))
    assert GlideTask(glide_config(*further, "low_res=16", "inpainting=true")).stage.low_res == 16
    GlideTask(glide_config(*trained, "inpainting=true")).export(tmp_path / "inpainting", torch.float32)
    with pytest.raises(ConfigError, match="inpaints; add inpainting=true"):
        GlideTask(glide_config(f"start_from={tmp_path / 'inpainting'}", "unet={}"))


@pytest.mark.parametrize("name", ["shapes-glide", "shapes-glide-upsampler"])
def test_the_shipped_configurations_fit_each_other(name):
    task = GlideTask(load_config(GlideConfig, name, ["data.length=8"]))
    other = GlideTask(load_config(GlideConfig, "shapes-glide", ["data.length=8"]))
    assert isinstance(task.module.unet, GlideUNet)
    if name != "shapes-glide":
        joined = GlidePipeline.from_parts(other.pipeline(), task.pipeline())
        assert joined.size == 64
    longest = max(len(caption.split()) for caption in (item["caption"] for item in task.dataset))
    assert int(task.tokenizer([item["caption"] for item in task.dataset])[1].sum(dim=1).max()) == longest

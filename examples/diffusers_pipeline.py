"""fastldm in a pipeline of diffusers: one line, its report, and the pictures before and after.

    python examples/diffusers_pipeline.py --model path/or/name --prompt "a cat" --out cat.png

Without --model a tiny random pipeline is built: nothing is downloaded, and the picture is noise.
"""

import argparse

import diffusers
import numpy as np
import torch

import fastldm


def tiny_pipeline() -> diffusers.StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
    )
    return diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        scheduler=diffusers.DDIMScheduler(),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub name of a pipeline")
    parser.add_argument("--prompt", default="a photograph of a cat")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", help="where to save the picture")
    arguments = parser.parse_args()

    if arguments.model:
        pipe = diffusers.DiffusionPipeline.from_pretrained(arguments.model)
        inputs = {"prompt": arguments.prompt}
    else:
        pipe = tiny_pipeline()
        inputs = {"prompt_embeds": torch.randn(1, 7, 32), "negative_prompt_embeds": torch.randn(1, 7, 32)}

    def picture() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        steps = arguments.steps
        return pipe(**inputs, num_inference_steps=steps, generator=generator, output_type="np").images[0]

    before = picture()
    print(fastldm.apply(pipe))
    with fastldm.record() as calls:
        after = picture()
    print(calls.summary())
    print(f"largest difference of a pixel, of 1: {np.abs(after - before).max():.1e}")
    if arguments.out:
        pipe.numpy_to_pil(after)[0].save(arguments.out)


if __name__ == "__main__":
    main()

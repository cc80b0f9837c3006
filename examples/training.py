"""Training a UNet of diffusers with fastldm in it, gradients and all, and the weights it leaves behind."""

import diffusers
import torch
import torch.nn.functional as F

import fastldm


def tiny_unet() -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )


def train(unet: diffusers.UNet2DModel, steps: int) -> list[float]:
    schedule = diffusers.DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    clean = torch.linspace(-1, 1, 16).expand(8, 3, 16, 16)
    losses = []
    for _ in range(steps):
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (8,), generator=generator)
        predicted = unet(schedule.add_noise(clean, noise, timesteps), timesteps).sample
        loss = F.mse_loss(predicted, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    plain = tiny_unet()
    applied = tiny_unet()
    applied.load_state_dict(plain.state_dict())
    print(fastldm.apply(applied), end="\n\n")

    for name, unet in (("plain", plain), ("applied", applied)):
        losses = train(unet, steps=20)
        print(f"{name:<8} loss of the first step {losses[0]:.6f}, of the last {losses[-1]:.6f}")

    # The weights are those of diffusers, before, while and after fastldm is applied.
    plain.load_state_dict(applied.state_dict())
    fastldm.revert(applied)


if __name__ == "__main__":
    main()

"""diffusers: UNets with attention and time embeddings."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from helpers.clients import check_round_trip

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_unet(tmp_path):
    def build():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    inputs = {"sample": IMAGES, "timestep": torch.tensor([3, 70])}
    check_round_trip(build, inputs, tmp_path / "unet.safetensors", budget=0.5)


def test_conditional_unet(tmp_path):
    def build():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            norm_num_groups=8, cross_attention_dim=12, attention_head_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    inputs = {"sample": torch.rand(2, 4, 8, 8), "timestep": 5, "encoder_hidden_states": torch.rand(2, 6, 12)}
    check_round_trip(build, inputs, tmp_path / "unet.safetensors", budget=0.5)


def test_autoencoder(tmp_path):
    def build():
        torch.manual_seed(0)
        return AutoencoderKL(block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                             up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8)  # fmt: skip

    check_round_trip(build, {"sample": IMAGES}, tmp_path / "vae.safetensors", budget=0.5)

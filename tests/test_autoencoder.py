"""The first stage: what is read from it, what it computes, and what is never executed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from latentflow.artifacts import read_tensors, write_tensors
from latentflow.autoencoder import (
    Autoencoder,
    LatentNormalisation,
    latent_mean,
    sample_latents,
    to_uint8,
    to_unit_range,
)
from latentflow.errors import ArtifactError, ConfigError
from latentflow.randomness import ImageRandom
from tests import tiny

MAKERS = {
    # maker, factor, channels, moments, shift, scale
    "kl": (tiny.kl, 2, 4, 8, 0.1, 0.5),
    "tiny": (tiny.deterministic, 2, 4, 4, 0.0, 1.0),
    "dc": (tiny.deep_compression, 4, 4, 4, 0.0, 0.4),
}


@pytest.fixture(params=MAKERS)
def made(request):
    """(autoencoder, factor, channels, moments, shift, scale) of each kind."""
    make, *facts = MAKERS[request.param]
    return Autoencoder(make(), request.param), *facts


def pixels(num: int, side: int = 16) -> torch.Tensor:
    return torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


# What it is


def test_everything_is_read_from_the_model(made):
    autoencoder, factor, channels, moments, shift, scale = made
    assert (autoencoder.factor, autoencoder.num_channels, autoencoder.num_moments) == (factor, channels, moments)
    assert autoencoder.normalisation == LatentNormalisation(shift=[shift] * channels, scale=[scale] * channels)
    assert autoencoder.encode(pixels(2)).shape == (2, moments, 16 // factor, 16 // factor)
    assert autoencoder.decode(torch.zeros(2, channels, 4, 4)).shape == (2, 3, 4 * factor, 4 * factor)


def test_it_is_frozen(made):
    model = made[0].model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not made[0].encode(pixels(1)).requires_grad


def test_latents_mean_and_std_of_the_config():
    """The second dialect: per-channel lists, on top of which the scalar still applies."""
    mean, std = [0.5, -1.0, 2.0, 0.0], [0.5, 2.0, 4.0, 1.0]
    autoencoder = Autoencoder(tiny.kl(latents_mean=mean, latents_std=std, scaling_factor=0.5), "listed")
    assert autoencoder.normalisation == LatentNormalisation(shift=mean, scale=[1.0, 0.25, 0.125, 0.5])
    raw = torch.tensor(mean)[None, :, None, None] + torch.tensor(std)[None, :, None, None]
    assert torch.equal(autoencoder.normalisation.normalise(raw), torch.full((1, 4, 1, 1), 0.5))


def test_a_config_without_scaling():
    autoencoder = Autoencoder(tiny.kl(scaling_factor=1.0, shift_factor=None), "plain")
    assert autoencoder.normalisation == LatentNormalisation(shift=[0.0] * 4, scale=[1.0] * 4)


def test_normalisation_there_and_back():
    normalisation = LatentNormalisation(shift=[0.5, -2.0], scale=[4.0, 0.25])
    raw = torch.tensor([[1.0, 6.0]]).reshape(1, 2, 1, 1)
    latents = normalisation.normalise(raw)
    assert latents.flatten().tolist() == [2.0, 2.0]  # (raw - shift) * scale
    assert torch.equal(normalisation.restore(latents), raw)
    many = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalisation.restore(normalisation.normalise(many)), many)


@pytest.mark.parametrize(("size", "side"), [(2, 1), (16, 8), (18, 9)])
def test_latent_side(kl, size, side):
    assert kl.latent_side(size) == side


@pytest.mark.parametrize(("size", "said"), [(17, "use 16 or 18"), (1, "use 2 or 4"), (0, "use 2 or 4"), (-4, "use 2")])
def test_sizes_that_do_not_divide(kl, size, said):
    with pytest.raises(ConfigError, match=rf"image size {size} is not a multiple of 2.*{said}"):
        kl.latent_side(size)


# What it computes


def test_encode_equals_diffusers(kl):
    posterior = kl.model.encode(pixels(3)).latent_dist
    moments = kl.encode(pixels(3))
    torch.testing.assert_close(latent_mean(moments, 4), posterior.mode(), rtol=0, atol=1e-6)
    torch.testing.assert_close(moments[:, 4:].clamp(-30, 20), posterior.logvar, rtol=0, atol=1e-6)


def test_the_posterior_is_that_of_diffusers():
    """z = mean + exp(log-variance / 2) noise, the log-variance clamped to [-30, 20]."""
    moments = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0)) * 30
    drawn = sample_latents(moments, 4, ImageRandom([5, 6]))
    noise = ImageRandom([5, 6]).normal(4, 3, 3)
    posterior = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(drawn, posterior.mean + posterior.std * noise)
    assert torch.equal(latent_mean(moments, 4), moments[:, :4])


def test_a_deterministic_encoder_has_nothing_to_draw():
    moments = torch.randn(2, 4, 3, 3)
    random = ImageRandom([5, 6])
    assert torch.equal(sample_latents(moments, 4, random), moments)
    assert torch.equal(random.normal(2), ImageRandom([5, 6]).normal(2)), "it used up random numbers"


def test_slices_equal_the_whole_batch(made):
    autoencoder, _, channels, *_ = made
    raw = torch.randn(7, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = autoencoder.encode(pixels(7)), autoencoder.decode(raw)
    autoencoder.slice_size = 3
    sliced = autoencoder.encode(pixels(7)), autoencoder.decode(raw)
    for one, other in zip(whole, sliced, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert one.dtype == torch.float32


def test_decoded_pixels_are_clamped(made):
    autoencoder, _, channels, *_ = made
    assert autoencoder.decode(torch.randn(1, channels, 4, 4) * 1000).abs().max() <= 1


def test_pixels_there_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit_range(levels)
    assert (unit.min(), unit.max(), unit.dtype) == (-1.0, 1.0, torch.float32)
    assert torch.equal(to_uint8(unit), levels)
    assert to_uint8(torch.tensor([-2.0, 2.0, 0.0])).tolist() == [0, 255, 128]


# On disk


def test_the_hash_survives_a_round_trip(made, tmp_path):
    autoencoder = made[0]
    autoencoder.save_pretrained(tmp_path / "copy")
    copy = Autoencoder.from_pretrained(tmp_path / "copy")
    assert copy.content_hash == autoencoder.content_hash
    assert type(copy.model) is type(autoencoder.model)
    assert torch.equal(copy.encode(pixels(2)), autoencoder.encode(pixels(2)))


def test_the_hash_tells_latent_spaces_apart(kl):
    hashes = {
        kl.content_hash,
        Autoencoder(tiny.kl(seed=1), "other weights").content_hash,
        Autoencoder(tiny.kl(scaling_factor=0.25), "other scale").content_hash,
        Autoencoder(tiny.kl(shift_factor=0.2), "other shift").content_hash,
        Autoencoder(tiny.deterministic(), "other class").content_hash,
    }
    assert len(hashes) == 5
    assert Autoencoder(tiny.kl(), "another place").content_hash == kl.content_hash


def test_the_hash_does_not_know_how_weights_are_stored(kl_folder, tmp_path):
    """Weights that float16 holds exactly are the same latent space in either precision."""
    folders = {}
    for dtype in (torch.float32, torch.float16):
        folders[dtype] = shutil.copytree(kl_folder, tmp_path / str(dtype))
        file = folders[dtype] / "diffusion_pytorch_model.safetensors"
        rounded = {name: tensor.half().to(dtype) for name, tensor in read_tensors(file).items()}
        file.unlink()
        write_tensors(file, rounded, metadata={"format": "pt"})
    assert len({Autoencoder.from_pretrained(folder).content_hash for folder in folders.values()}) == 1


@pytest.mark.parametrize("name", ["taesd", "taesd3"])
def test_published_autoencoders(shared, name):
    folder = shared / "autoencoders" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    autoencoder = Autoencoder.from_pretrained(folder)
    channels = {"taesd": 4, "taesd3": 16}[name]
    assert (autoencoder.factor, autoencoder.num_channels, autoencoder.num_moments) == (8, channels, channels)
    ramp = torch.linspace(-0.8, 0.8, 64).expand(1, 3, 64, 64)
    assert (autoencoder.decode(autoencoder.encode(ramp)) - ramp).abs().mean() < 0.05


# What is refused


def refusal(reference: Path | str) -> str:
    with pytest.raises(ArtifactError) as caught:
        Autoencoder.from_pretrained(reference)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("reference", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c/d"])
def test_places_that_do_not_exist(reference):
    assert repr(reference) in refusal(reference)


def test_folders_that_hold_something_else(tmp_path):
    assert "config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    assert "_class_name" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["NoSuchClass", "os", "Transformer2DModel"])
def test_classes_that_are_no_autoencoder(kl_folder, tmp_path, name):
    folder = shutil.copytree(kl_folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": name}))
    assert "other" in refusal(folder)


def test_a_network_that_is_no_autoencoder(tmp_path):
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, add_attention=False, **blocks
    ).save_pretrained(tmp_path / "unet")
    assert "has no encode and decode" in refusal(tmp_path / "unet")


def test_truncated_weights(kl_folder, tmp_path):
    folder = shutil.copytree(kl_folder, tmp_path / "cut")
    weights = folder / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    assert "cut" in refusal(folder)


@pytest.mark.parametrize("name", ["model.pth", "model.bin", "model.ckpt", "model.safetensors"])
def test_a_pickle_in_place_of_a_folder(bomb, tmp_path, name):
    assert name in refusal(bomb(tmp_path / name))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_a_pickle_in_place_of_weights(bomb, kl_folder, tmp_path, name):
    folder = tmp_path / "poisoned"
    folder.mkdir()
    shutil.copy(kl_folder / "config.json", folder)
    bomb(folder / name)
    assert "poisoned" in refusal(folder)


def test_a_pickle_beside_sound_weights_is_not_looked_at(bomb, kl, kl_folder, tmp_path):
    folder = shutil.copytree(kl_folder, tmp_path / "both")
    bomb(folder / "diffusion_pytorch_model.bin")
    assert Autoencoder.from_pretrained(folder).content_hash == kl.content_hash


def test_a_pickle_as_a_shard(bomb, kl_folder, tmp_path):
    """An index of safetensors shards which points to a pickle."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copy(kl_folder / "config.json", folder)
    names = read_tensors(kl_folder / "diffusion_pytorch_model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "shard.bin")}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    bomb(folder / "shard.bin")
    assert "sharded" in refusal(folder)


def test_code_that_a_config_points_to(kl_folder, tmp_path):
    """`auto_map` names a Python file in the folder; it must not be imported."""
    folder = shutil.copytree(kl_folder, tmp_path / "remote")
    (folder / "payload.py").write_text(
        f"open({str(tmp_path / 'exploded')!r}, 'w')\nfrom diffusers import AutoencoderKL as Mine\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "payload.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(ArtifactError):  # refused or passed over: both will do
        Autoencoder.from_pretrained(folder)
    assert not (tmp_path / "exploded").exists()

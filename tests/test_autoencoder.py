"""The first stage: what is read from it, what it computes, and what is never executed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from latentflow import autoencoder as module
from latentflow.artifacts import read_tensors, write_tensors
from latentflow.autoencoder import (
    _COPIES,
    Autoencoder,
    LatentNormalisation,
    latent_mean,
    sample_latents,
    to_uint8,
    to_unit_range,
)
from latentflow.errors import ArtifactError, ConfigError
from latentflow.pixel_format import PixelFormat
from latentflow.randomness import ImageRandom
from latentflow.runtime import Runtime
from tests import tiny
from tests.dispatch import LiveBytes

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


@pytest.mark.parametrize("channels", [1, 2, 7])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (tiny.kl, ("in_channels", "out_channels")),
        (tiny.deterministic, ("in_channels", "out_channels")),
        (tiny.deep_compression, ("in_channels",)),
    ],
)
def test_images_of_any_number_of_channels(make, said, channels, tmp_path):
    Autoencoder(make(**dict.fromkeys(said, channels)), "made").save_pretrained(tmp_path)
    autoencoder = Autoencoder.from_pretrained(tmp_path)
    assert (autoencoder.pixel_channels, autoencoder.num_channels) == (channels, 4)
    images = torch.rand(2, channels, 16, 16) * 2 - 1
    raw = latent_mean(autoencoder.encode(images), 4)
    assert autoencoder.decode(raw).shape == images.shape
    stored = to_uint8(images)
    assert torch.equal(
        autoencoder.reconstruct(stored, PixelFormat(channels=channels)),
        to_uint8(autoencoder.decode(raw_of(autoencoder, stored))),
    )


def raw_of(autoencoder: Autoencoder, stored: torch.Tensor) -> torch.Tensor:
    return latent_mean(autoencoder.encode(to_unit_range(stored)), autoencoder.num_channels)


def test_gray_images_are_repeated_and_come_back_gray(made):
    autoencoder, _, channels, *_ = made
    gray = pixels(2)[:, :1]
    moments = autoencoder.encode(gray)
    assert torch.equal(moments, autoencoder.encode(gray.repeat(1, 3, 1, 1)))
    raw = latent_mean(moments, channels)
    assert torch.equal(autoencoder.decode(raw, 1), autoencoder.decode(raw).mean(1, keepdim=True))
    assert torch.equal(autoencoder.decode(raw, 3), autoencoder.decode(raw))
    assert autoencoder.reconstruct(to_uint8(gray), PixelFormat(channels=1)).shape == gray.shape


def test_images_of_other_channels_are_refused(kl):
    kl.require_channels(1, "scans")
    kl.require_channels(3, "photos")
    with pytest.raises(ConfigError, match=r"tiles has images of 4 channels, but .* was made for 3; train"):
        kl.require_channels(4, "tiles")


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
    assert kl.latent_size(size) == (side, side)


@pytest.mark.parametrize(("size", "said"), [(17, "use 16 or 18"), (1, "use 2 or 4"), (0, "use 2 or 4"), (-4, "use 2")])
def test_sizes_that_do_not_divide(kl, size, said):
    with pytest.raises(ConfigError, match=rf"image size {size} is not a multiple of 2.*{said}"):
        kl.latent_size(size)


# What it computes


def test_encode_equals_diffusers(kl):
    posterior = kl.model.encode(pixels(3)).latent_dist
    moments = kl.encode(pixels(3))
    torch.testing.assert_close(latent_mean(moments, 4), posterior.mode(), rtol=0, atol=1e-6)
    torch.testing.assert_close(moments[:, 4:].clamp(-30, 20), posterior.logvar, rtol=0, atol=1e-6)


def test_the_posterior_is_that_of_diffusers():
    """z = mean + exp(log-variance / 2) noise, the log-variance clamped to [-30, 20]."""
    moments = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0)) * 30
    drawn = sample_latents(moments, 4, ImageRandom.of_seeds("test", [5, 6]))
    noise = ImageRandom.of_seeds("test", [5, 6]).normal(4, 3, 3)
    posterior = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(drawn, posterior.mean + posterior.std * noise)
    assert torch.equal(latent_mean(moments, 4), moments[:, :4])


def test_a_deterministic_encoder_has_nothing_to_draw():
    moments = torch.randn(2, 4, 3, 3)
    random = ImageRandom.of_seeds("test", [5, 6])
    assert torch.equal(sample_latents(moments, 4, random), moments)
    assert torch.equal(random.normal(2), ImageRandom.of_seeds("test", [5, 6]).normal(2)), "it used up random numbers"


def test_slices_equal_the_whole_batch(made):
    autoencoder, _, channels, *_ = made
    raw = torch.randn(7, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = autoencoder.encode(pixels(7)), autoencoder.decode(raw)
    autoencoder.slice_size = 3
    sliced = autoencoder.encode(pixels(7)), autoencoder.decode(raw)
    for one, other in zip(whole, sliced, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert one.dtype == torch.float32


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_a_slice_takes_what_it_is_thought_to_take(made, way):
    """The most that is alive at a time, in layers of any width, is near the estimate and below it."""
    autoencoder, factor, channels, *_ = made
    autoencoder.to("meta")
    given = torch.empty(4, 3, 48, 48) if way == "encode" else torch.empty(4, channels, 48 // factor, 48 // factor)
    estimate = 4 * 48 * 48 * 4 * _COPIES * autoencoder._widest  # images, pixels, bytes
    autoencoder.slice_size = 4
    with LiveBytes() as live:
        getattr(autoencoder, way)(given.to("meta"))
    assert estimate / 5 < live.peak < estimate


def test_slices_are_as_large_as_memory_allows(monkeypatch):
    autoencoder = Autoencoder(tiny.kl(), "kl")
    each = 16**2 * 4 * _COPIES * autoencoder._widest
    images = torch.empty(41, 3, 16, 16)
    for fits, sizes in ((100, [16, 16, 9]), (7, [4] * 10 + [1]), (1, [1] * 41), (0.1, [1] * 41)):
        monkeypatch.setattr(module, "_BYTES_OF_A_SLICE_ON_CPU", int(fits * each))
        assert [len(part) for part in autoencoder.slices(images)] == sizes
        assert [len(part) for part in autoencoder.slices(images[..., ::2, ::2], latents=True)] == sizes
    assert len(autoencoder.slices(images[:1])) == 1


@pytest.mark.parametrize(
    ("free", "unused", "side", "most"),
    [
        (64, 0, 256, 16),  # a megapixel, which is as fast as more
        (64, 0, 64, 256),
        (8, 0, 256, 8),  # half of 8 GiB, each taking 384 MiB
        (1, 7, 256, 8),  # what torch holds and does not use is free as well
        (0.1, 0, 256, 1),
        (64, 0, 2048, 1),
    ],
)
def test_a_slice_on_a_gpu_takes_half_of_what_is_free(monkeypatch, free, unused, side, most):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (unused + 3) * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * 2**30)
    autoencoder = Autoencoder(tiny.kl(), "kl")
    autoencoder.__dict__["_widest"] = 256  # of Stable Diffusion's
    monkeypatch.setattr(Autoencoder, "device", torch.device("cuda", 0))
    assert len(autoencoder.slices(torch.empty(500, 3, side, side, device="meta"))[0]) == most


@pytest.mark.parametrize("way", ["encode", "decode", "decode_stored"])
def test_an_autoencoder_that_overflows_in_half_precision_is_named(way):
    """Some were made in float32 and exceed what fp16 can hold; a black picture would not say so."""
    model = tiny.kl()
    with torch.no_grad():
        for part in (model.encoder, model.decoder):
            part.conv_in.weight.mul_(1e6)
    autoencoder = Autoencoder(model, "some/autoencoder")
    given = torch.ones(2, 3, 16, 16) if way == "encode" else torch.ones(2, 4, 8, 8)
    assert getattr(autoencoder, way)(given).isfinite().all()
    half = autoencoder.under(Runtime(torch.device("cpu"), precision="fp16"))
    with pytest.raises(ArtifactError, match="some/autoencoder overflows in fp16; use --precision bf16 or tf32"):
        getattr(half, way)(given)


def test_decoded_levels_are_decoded_pixels_rounded(made):
    autoencoder, _, channels, *_ = made
    raw = torch.randn(5, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    autoencoder.slice_size = 2
    levels = autoencoder.decode_stored(raw)
    assert levels.dtype == torch.uint8
    assert torch.equal(levels, to_uint8(autoencoder.decode(raw)))


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


def test_the_hash_distinguishes_latent_spaces(kl):
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
    assert "is not one of diffusers' autoencoders with encode and decode" in refusal(tmp_path / "unet")


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


def test_a_pickle_next_to_sound_weights_is_ignored(bomb, kl, kl_folder, tmp_path):
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


# Folders and files of other kinds


@pytest.fixture
def folder(kl_folder, tmp_path) -> Path:
    """A copy of the autoencoder, to be changed."""
    return shutil.copytree(kl_folder, tmp_path / "changed")


def change_weights(folder: Path, change) -> Path:
    """Overwrite the folder's weights by the result of `change`."""
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
    write_tensors(file, change(tensors), {"format": "pt"})
    return folder


def change_config(folder: Path, **values) -> Path:
    """Change values of the folder's config; None takes one out."""
    config = {**json.loads((folder / "config.json").read_text(encoding="utf-8")), **values}
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return folder


def in_shards(folder: Path) -> dict[str, str]:
    """Split the folder's weights into two shards with an index; returns its weight map."""
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
    places = {name: f"diffusion_pytorch_model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for place in set(places.values()):
        write_tensors(folder / place, {name: tensors[name] for name in tensors if places[name] == place})
    file.unlink()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return places


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model.", "module.", "_orig_mod.module."])
def test_a_prefix_of_all_weights_is_taken_off(kl, folder, prefix):
    change_weights(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    assert Autoencoder.from_pretrained(folder).content_hash == kl.content_hash


def test_shards_are_one_autoencoder(kl, folder):
    in_shards(folder)
    assert Autoencoder.from_pretrained(folder).content_hash == kl.content_hash


def test_the_vae_of_a_pipeline(kl, folder, tmp_path):
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}', encoding="utf-8")
    folder.rename(pipeline / "vae")
    assert Autoencoder.from_pretrained(pipeline).content_hash == kl.content_hash


def test_the_only_variant_is_read_and_said(kl, folder, caplog):
    change_weights(folder, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    rounded = Autoencoder.from_pretrained(folder).content_hash
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    loaded = Autoencoder.from_pretrained(folder)
    assert loaded.content_hash == rounded != kl.content_hash
    assert next(loaded.model.parameters()).dtype == torch.float32
    assert "only has weights in fp16; they are used" in caplog.text


def test_the_whole_weights_win_over_a_variant(kl, folder):
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", folder / "diffusion_pytorch_model.non_ema.safetensors")
    assert Autoencoder.from_pretrained(folder).content_hash == kl.content_hash


def test_attention_layers_under_their_old_names(tmp_path):
    made = tiny.kl(mid_block_add_attention=True)
    made.save_pretrained(tmp_path / "new")
    old = shutil.copytree(tmp_path / "new", tmp_path / "old")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def aged(name: str) -> str:
        for new, before in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        return name

    change_weights(old, lambda tensors: {aged(name): tensor for name, tensor in tensors.items()})
    assert Autoencoder.from_pretrained(old).content_hash == Autoencoder.from_pretrained(tmp_path / "new").content_hash


def _only_the_decoder(folder: Path) -> None:
    change_weights(folder, lambda t: {name: tensor for name, tensor in t.items() if name.startswith("decoder.")})


def _lfs_pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 334643276\n"
    (folder / "diffusion_pytorch_model.safetensors").write_text(pointer, encoding="utf-8")


def _without_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def _two_variants(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, folder / "diffusion_pytorch_model.bf16.safetensors")
    file.rename(folder / "diffusion_pytorch_model.fp16.safetensors")


def _a_shard_less(folder: Path) -> None:
    (folder / next(iter(in_shards(folder).values()))).unlink()


def _a_shard_elsewhere(folder: Path) -> None:
    places = in_shards(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    places["encoder.conv_in.weight"] = "../kl/diffusion_pytorch_model.safetensors"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_only_the_decoder, "lacks the weights of the encoder: its file only holds the decoder; get the one with both"),
        (_lfs_pointer, "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"),
        (_without_weights, "has no diffusion_pytorch_model.safetensors; get the whole folder"),
        (_two_variants, "rename the one you want to diffusion_pytorch_model.safetensors"),
        (_a_shard_less, "lacks diffusion_pytorch_model-00001-of-00002.safetensors"),
        (_a_shard_elsewhere, "which is not a safetensors file in its folder"),
        (lambda f: change_weights(f, lambda t: dict(list(t.items())[1:])), "is missing (1 missing, 0 unknown)"),
        (lambda f: change_weights(f, lambda t: {**t, "extra": torch.ones(3)}), "'extra' is unknown"),
        (lambda f: change_weights(f, lambda t: {**t, "decoder.conv_in.bias": torch.ones(3)}), "has shape [3]"),
        (
            lambda f: change_weights(f, lambda t: {**t, "encoder.conv_in.bias": t["encoder.conv_in.bias"] / 0}),
            "not finite",
        ),
        (lambda f: change_config(f, _class_name="UNet2DConditionModel"), "UNet2DConditionModel"),
        (lambda f: change_config(f, _class_name="AutoencoderKLl"), "did you mean 'AutoencoderKL'?"),
        (lambda f: change_config(f, _class_name=["AutoencoderKL"]), "not one of diffusers' autoencoders"),
        (lambda f: change_config(f, _class_name="AutoencoderTiny"), "config.json: "),
        (lambda f: change_config(f, block_out_channels=[8, 10**9]), "larger than in any autoencoder"),
        (lambda f: change_config(f, block_out_channels=[8, 2**19]), "asks for [524288"),
        (lambda f: change_config(f, block_out_channels=[8, -16]), "changed"),
        (lambda f: change_config(f, block_out_channels=[8, 0]), "changed"),
        (lambda f: change_config(f, block_out_channels=[8, "16"]), "describes a network that cannot be built"),
        (lambda f: change_config(f, block_out_channels=[8] * 5000), "nested too deeply or too long"),
        (lambda f: change_config(f, layers_per_block=10**6), "asks for 1000000 layers"),
        (lambda f: change_config(f, layers_per_block=0), "config.json: "),
        (lambda f: change_config(f, norm_num_groups=3), "describes a network that cannot be built"),
        (lambda f: change_config(f, norm_num_groups=0), "describes a network that cannot be built"),
        (lambda f: change_config(f, down_block_types=["NoBlock"] * 2), "describes a network that cannot be built"),
        (lambda f: change_config(f, scaling_factor=float("nan")), "scaling_factor = nan is not a finite number"),
        (lambda f: change_config(f, scaling_factor=0), "scaling_factor = 0 must be above 0"),
        (lambda f: change_config(f, scaling_factor=-0.18), "must be above 0"),
        (lambda f: change_config(f, scaling_factor="much"), "scaling_factor = 'much' is not a number"),
        (lambda f: change_config(f, latents_mean=0.5, latents_std=["a"] * 4), "latents_std = ['a', 'a', 'a', 'a']"),
        (lambda f: change_config(f, shift_factor=float("inf")), "shift_factor = inf is not a finite number"),
        (lambda f: change_config(f, latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 0.0, 1.0]), "must be above 0"),
        (lambda f: change_config(f, latents_mean=[0.0] * 3, latents_std=[1.0] * 3), "3 numbers for 4 channels"),
        (lambda f: (f / "config.json").write_text("[" * 100_000, encoding="utf-8"), "config.json"),
        (lambda f: (f / "config.json").write_text(" " * 2**21, encoding="utf-8"), "larger than 1 MiB"),
        (lambda f: (f / "config.json").write_text("[]", encoding="utf-8"), "holds no settings"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json"),
    ],
)
def test_folders_that_are_refused(folder, change, said):
    change(folder)
    assert said in refusal(folder)


def test_a_model_folder_names_its_autoencoder(folder, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"image_size": 16}', encoding="utf-8")
    inside = folder.rename(tmp_path / "model" / "autoencoder")
    assert refusal(tmp_path / "model").endswith(f"give {inside}")
    assert Autoencoder.from_pretrained(inside).factor == 2


def test_a_pickle_becomes_safetensors_as_the_line_says(kl, folder):
    tensors = read_tensors(folder / "diffusion_pytorch_model.safetensors")
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    line = refusal(folder)
    assert "diffusion_pytorch_model.bin, a pickle, which is never loaded" in line
    _follow(line)
    assert Autoencoder.from_pretrained(folder).content_hash == kl.content_hash


def test_one_file_of_a_folder_names_the_folder(folder):
    assert refusal(folder / "diffusion_pytorch_model.safetensors").endswith(f"give its folder {folder}")


def test_a_file_of_weights_becomes_a_folder_as_the_message_says(kl, kl_folder, tmp_path):
    single = shutil.copy(kl_folder / "diffusion_pytorch_model.safetensors", tmp_path / "vae-ft-mse.safetensors")
    assert "put it into a folder as diffusion_pytorch_model.safetensors, together with the config.json" in refusal(
        single
    )
    (tmp_path / "vae").mkdir()
    shutil.move(single, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    shutil.copy(kl_folder / "config.json", tmp_path / "vae")
    assert Autoencoder.from_pretrained(tmp_path / "vae").content_hash == kl.content_hash


@pytest.mark.parametrize("name", ["kl-f8.safetensors", "model.ckpt"])
def test_a_file_of_the_latent_diffusion_program_becomes_a_folder_as_the_line_says(tmp_path, monkeypatch, name):
    made = tiny.kl(mid_block_add_attention=True)
    made.save_pretrained(tmp_path / "like")
    expected = Autoencoder.from_pretrained(tmp_path / "like")
    weights = {f"first_stage_model.{name}": tensor for name, tensor in _in_old_layout(made.state_dict()).items()}
    file = tmp_path / name
    if file.suffix == ".ckpt":
        torch.save({"state_dict": weights}, file)
    else:
        write_tensors(file, weights)
    monkeypatch.chdir(tmp_path)
    _follow(refusal(file).replace("config=LIKE", "config='like'"))
    assert Autoencoder.from_pretrained("vae").content_hash == expected.content_hash


def _in_old_layout(weights: dict) -> dict:
    """Names and shapes of CompVis' latent-diffusion."""
    rules = [
        (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
        (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ]
    renamed = {}
    for name, tensor in weights.items():
        for pattern, instead in rules:
            name = re.sub(pattern, instead, name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample", name)
        is_linear = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        renamed[name] = tensor[:, :, None, None].contiguous() if is_linear else tensor
    return renamed


def _follow(line: str) -> None:
    """Do what a line advises: the program behind python -c."""
    exec(re.search(r'python -c "(.*?)"(?:;| with|$)', line)[1], {})


def test_code_in_the_folder_never_runs(kl, folder, tmp_path, monkeypatch):
    """Whatever the config calls for: files next to it, `auto_map`, a class or a library of another name."""
    code = f"open({str(tmp_path / 'exploded')!r}, 'w')\nfrom diffusers import AutoencoderKL as Mine\n"
    for name in ("payload.py", "modeling_payload.py", "AutoencoderKL.py", "diffusers.py"):
        (folder / name).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    named = {"auto_map": {"AutoModel": "payload.Mine"}, "custom_pipeline": "payload", "_library_name": "payload"}
    change_config(folder, **named)
    (folder / "model_index.json").write_text('{"": ["payload", "Mine"], "vae": ["payload", "Mine"]}', encoding="utf-8")
    assert Autoencoder.from_pretrained(folder).content_hash == kl.content_hash
    for name in ("payload.Mine", "modeling_payload", "Mine", "PosixPath"):
        change_config(folder, _class_name=name)
        refusal(folder)
    assert not (tmp_path / "exploded").exists()


def test_videos_and_sounds_are_no_images(tmp_path):
    from diffusers import AutoencoderKLTemporalDecoder, AutoencoderKLWan, AutoencoderOobleck

    blocks = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2}
    makers = {
        "frames": lambda: AutoencoderKLTemporalDecoder(latent_channels=4, **blocks),
        "videos": lambda: AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        "sounds": lambda: AutoencoderOobleck(
            encoder_hidden_size=8, downsampling_ratios=[2], channel_multiples=[1], decoder_channels=8
        ),
    }
    for name, make in makers.items():
        make().save_pretrained(tmp_path / name)
        assert "does not map images [B, 3, 64, 64] to one latent grid and back" in refusal(tmp_path / name)


def test_loading_draws_nothing_from_torch(kl_folder):
    """A program's own random numbers are the same whether it loads one or not."""
    torch.manual_seed(0)
    Autoencoder.from_pretrained(kl_folder)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_eight_threads_load_and_encode_at_once(kl, kl_folder, deterministic, deterministic_folder):
    images = pixels(2)
    expected = {kl_folder: kl.encode(images), deterministic_folder: deterministic.encode(images)}

    def load(number: int) -> None:
        folder = (kl_folder, deterministic_folder)[number % 2]
        assert torch.equal(Autoencoder.from_pretrained(folder).encode(images), expected[folder])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(load, range(32)))
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.empty(1).device.type == "cpu"


def test_a_slice_is_a_megapixel_and_on_a_cpu_no_more_than_its_caches_hold(made, monkeypatch):
    autoencoder = made[0]
    assert [autoencoder.slice_of(side**2) for side in (16, 64, 256, 512, 1024, 4096)] == [16, 16, 16, 4, 1, 1]
    monkeypatch.setattr(Autoencoder, "device", torch.device("meta"))
    assert [autoencoder.slice_of(side**2) for side in (16, 64, 256, 512, 1024, 4096)] == [4096, 256, 16, 4, 1, 1]

import json
import os
import shutil

import numpy as np
import pytest
import torch

from latentflow.artifacts import read_json
from latentflow.autoencoder import latent_mean, to_unit_range
from latentflow.data.images import BrokenImage, open_images
from latentflow.data.latent_cache import LatentCache, write_cache
from latentflow.errors import ArtifactError, ConfigError, DataError
from tests import processes, tiny


@pytest.fixture
def source(images):
    return open_images(images, tiny.IMAGE_SIZE)


def moments_of(source, autoencoder, *, mirrored=False):
    pixels = torch.from_numpy(np.stack([item.pixels for item in source])).permute(0, 3, 1, 2)
    return autoencoder.encode(to_unit_range(pixels.flip(-1) if mirrored else pixels))


@pytest.mark.parametrize("mirrored", [False, True])
def test_it_holds_what_the_autoencoder_says(cache, source, kl, mirrored):
    stored = LatentCache(cache).moments(range(len(source)), [mirrored] * len(source))
    expected = moments_of(source, kl, mirrored=mirrored)
    # float16 keeps 11 bits; the encoder itself differs by rounding in batches of another shape
    assert torch.allclose(stored, expected, rtol=2**-11, atol=1e-5)


def test_labels_names_and_classes_are_those_of_the_source(cache, source):
    stored = LatentCache(cache)
    assert stored.class_names == source.class_names
    assert stored.labels(range(len(source))).tolist() == [item.label for item in source]
    assert stored.names() == [item.name for item in source]


def test_statistics_are_of_the_latents_with_their_posterior(cache, source, kl):
    moments, index = moments_of(source, kl).double(), LatentCache(cache).index
    mean, variance = latent_mean(moments, 4), moments[:, 4:].exp()
    expected = ((mean**2 + variance).mean((0, 2, 3)) - mean.mean((0, 2, 3)) ** 2).sqrt()
    assert index.channel_mean == pytest.approx(mean.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert index.channel_std == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_deterministic_autoencoder_stores_latents_alone(tmp_path, source, deterministic):
    write_cache(source, deterministic, tmp_path / "cache")
    assert LatentCache(tmp_path / "cache").plan.moments_shape == (4, 8, 8)


def test_float32_is_kept_to_the_last_bit(tmp_path, source, kl):
    write_cache(source, kl, tmp_path / "cache", precision="float32", batch_size=len(source))
    stored = LatentCache(tmp_path / "cache").moments(range(len(source)), [False] * len(source))
    assert torch.equal(stored, moments_of(source, kl))


def test_an_unlabelled_source_has_no_labels(tmp_path, kl):
    flat = tiny.write_images(tmp_path / "flat", classes=(), per_class=3)
    write_cache(open_images(flat, tiny.IMAGE_SIZE), kl, tmp_path / "cache")
    stored = LatentCache(tmp_path / "cache")
    assert stored.labels([0, 1]) is None
    assert stored.class_names == ()


def test_mirrored_images_must_have_been_encoded(tmp_path, source, kl):
    write_cache(source, kl, tmp_path / "cache")
    with pytest.raises(DataError, match="holds no mirrored images; encode it with --flips"):
        LatentCache(tmp_path / "cache").moments([0, 1], [False, True])


def test_a_broken_image_is_left_out_by_name_or_refused(tmp_path, images, kl):
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "berry" / "2.png").write_bytes(b"no picture")
    source = open_images(folder, tiny.IMAGE_SIZE)
    index = write_cache(source, kl, tmp_path / "cache", shard_size=5)
    assert index.broken == ["berry/2.png"]
    assert index.num_images == tiny.NUM_IMAGES - 1
    stored = LatentCache(tmp_path / "cache")
    assert "berry/2.png" not in stored.names()
    assert stored.labels(range(len(stored))).tolist() == [0] * 6 + [1] * 5 + [2] * 6
    with pytest.raises(BrokenImage, match=r"berry/2\.png"):
        write_cache(source, kl, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict" / "index.json").exists()


def test_nothing_but_broken_images_is_refused(tmp_path, kl):
    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the 2 images"):
        write_cache(open_images(tmp_path / "images", tiny.IMAGE_SIZE), kl, tmp_path / "cache")


def test_kill_9_loses_at_most_the_shard_at_hand(tmp_path, kl_folder):
    """`latentflow encode` is killed in the middle; repeated, it ends in the same bytes and redoes nothing complete."""
    many = tiny.write_images(tmp_path / "many", per_class=200)
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"

    def command(out):
        options = ("--autoencoder", kl_folder, "--image-size", tiny.IMAGE_SIZE, "--shard-size", 20, "--batch-size", 4)
        return ("encode", many, *options, "--out", out, "--device", "cpu")

    assert processes.finish(processes.start(command(whole), log), log) == 0, log.read_text()
    process = processes.start(command(killed), log)
    processes.wait_until(lambda: (killed / "shard-00003.json").exists(), process)
    process.kill()
    process.join()
    complete = {file: file.stat().st_mtime_ns for file in killed.glob("shard-*.json")}
    assert 4 <= len(complete) < 30
    assert not (killed / "index.json").exists()
    with pytest.raises(ArtifactError, match="its encoding is not finished"):
        LatentCache(killed)
    assert processes.finish(processes.start(command(killed), log), log) == 0, log.read_text()
    assert all(file.stat().st_mtime_ns == before for file, before in complete.items())
    assert tiny.tree(killed) == tiny.tree(whole)


def test_two_processes_share_the_work(tmp_path, source, kl):
    options = {"flips": True, "shard_size": 5}
    assert write_cache(source, kl, tmp_path / "shared", process=(1, 2), **options) is None
    assert write_cache(source, kl, tmp_path / "shared", process=(0, 2), **options) is not None
    write_cache(source, kl, tmp_path / "alone", **options)
    assert tiny.tree(tmp_path / "shared") == tiny.tree(tmp_path / "alone")


def test_a_truncated_shard_is_named_and_encoded_anew(tmp_path, cache, source, kl):
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    shard = damaged / "shard-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(ArtifactError, match=r"shard-00002\.safetensors is truncated or damaged.*encode. again"):
        LatentCache(damaged)
    write_cache(source, kl, damaged, flips=True, shard_size=5)
    assert tiny.tree(damaged) == tiny.tree(cache)


def test_a_flipped_bit_is_found_by_verify_and_mended(tmp_path, cache, source, kl):
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    shard = damaged / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors does not match its checksum"):
        LatentCache(damaged).verify()
    write_cache(source, kl, damaged, flips=True, shard_size=5)
    LatentCache(damaged).verify()


def test_another_plan_is_refused(cache, images, source, kl, deterministic):
    before = tiny.tree(cache)
    other_size = open_images(images, 2 * tiny.IMAGE_SIZE)
    for given, said in (
        ((other_size, kl, {"flips": True}), f"image_size {tiny.IMAGE_SIZE}, not {2 * tiny.IMAGE_SIZE}"),
        ((source, kl, {"flips": False}), "flips True, not False"),
        ((source, deterministic, {"flips": True}), "autoencoder_hash"),
    ):
        images_, autoencoder, options = given
        with pytest.raises(ArtifactError, match=said):
            write_cache(images_, autoencoder, cache, shard_size=5, **options)
    assert tiny.tree(cache) == before


def test_a_folder_of_other_things_is_refused(tmp_path, source, kl):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"not empty \(thesis\.tex"):
        write_cache(source, kl, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_autoencoder_is_refused(cache, kl, deterministic):
    LatentCache(cache).require_autoencoder(kl)
    with pytest.raises(ArtifactError, match="was encoded with .* not with .*; use the former or encode a new cache"):
        LatentCache(cache).require_autoencoder(deterministic)


def test_an_image_size_that_does_not_fit_is_refused(tmp_path, images, kl):
    with pytest.raises(ConfigError, match="image size 15 is not a multiple of 2.*use 14 or 16"):
        write_cache(open_images(images, 15), kl, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_newer_schema_is_refused(tmp_path, cache):
    newer = shutil.copytree(cache, tmp_path / "newer")
    index = read_json(newer / "index.json")
    index["plan"]["schema_version"] = 2
    (newer / "index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="does not fit latent cache schema 1"):
        LatentCache(newer)

import json
import os
import pickle
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.artifacts import read_json
from latentflow.autoencoder import Autoencoder, latent_mean, to_unit_range
from latentflow.data.cache.reader import LatentCache
from latentflow.data.cache.schema import CacheIndex, ShardRecord, read_cache_record
from latentflow.data.items import ImageItem
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.pixel_format import PixelFormat
from latentflow.sizes import Size
from tests import processes, tiny
from tests.tiny import write_cache


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
    assert stored.dtype == torch.float16
    assert torch.allclose(stored.float(), expected, rtol=2**-11, atol=1e-5)


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


def test_a_deterministic_autoencoder_stores_only_latents(tmp_path, source, deterministic):
    write_cache(source, deterministic, tmp_path / "cache")
    assert LatentCache(tmp_path / "cache").plan.moments_shape == (4, 8, 8)


def test_float32_is_kept_to_the_last_bit(tmp_path, source, kl):
    write_cache(source, kl, tmp_path / "cache", dtype="float32", batch_size=len(source))
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
    assert index.broken == ["berry/2.png: its content is no image that Pillow can read"]
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
    with pytest.raises(DataError, match=r"2 images from .*: no image can be read, for example 0\.png: its content"):
        write_cache(open_images(tmp_path / "images", tiny.IMAGE_SIZE), kl, tmp_path / "cache")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_kill_9_loses_at_most_the_shards_at_hand(tmp_path, kl_folder, num_workers):
    """`latentflow encode` is killed in the middle; repeated, it ends in the same bytes and redoes nothing complete."""
    many = tiny.write_images(tmp_path / "many", per_class=200)
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"

    def command(out, num_workers=0):
        options = ("--autoencoder", kl_folder, "--image-size", tiny.IMAGE_SIZE, "--shard-size", 20, "--batch-size", 4)
        return ("encode", many, *options, "--out", out, "--device", "cpu", "--num-workers", num_workers)

    assert processes.finish(processes.start(command(whole), log), log) == 0, log.read_text()
    process = processes.start(command(killed, num_workers), log)
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
    assert write_cache(source, kl, tmp_path / "shared", runtime=tiny.one_of_two(1), **options) is None
    assert write_cache(source, kl, tmp_path / "shared", runtime=tiny.one_of_two(0), **options) is not None
    write_cache(source, kl, tmp_path / "single", **options)
    assert tiny.tree(tmp_path / "shared") == tiny.tree(tmp_path / "single")


def test_a_truncated_shard_is_named_and_encoded_again(tmp_path, cache, source, kl):
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
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors is damaged: it does not match its checksum"):
        LatentCache(damaged).verify()
    write_cache(source, kl, damaged, flips=True, shard_size=5)
    LatentCache(damaged).verify()


def test_another_plan_is_refused(cache, images, source, kl, deterministic):
    before = tiny.tree(cache)
    other_size = open_images(images, 2 * tiny.IMAGE_SIZE)
    for given, said in (
        ((other_size, kl, {"flips": True}), f"image_size: {tiny.IMAGE_SIZE}, now {2 * tiny.IMAGE_SIZE}"),
        ((source, kl, {"flips": False}), "flips: true, now false"),
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
    with pytest.raises(ArtifactError, match=r"was encoded with .* not with .*; use the former, or encode a new cache"):
        LatentCache(cache).require_autoencoder(deterministic)


def test_an_image_size_that_does_not_fit_is_refused(tmp_path, images, kl):
    with pytest.raises(ConfigError, match=r"image size 15 is not a multiple of 2.*use 14 or 16"):
        write_cache(open_images(images, 15), kl, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_newer_schema_is_refused(tmp_path, cache):
    newer = shutil.copytree(cache, tmp_path / "newer")
    index = read_json(newer / "index.json")
    index["plan"]["schema_version"] = 2
    (newer / "index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="does not fit latent cache schema 1"):
        LatentCache(newer)


def test_each_image_may_be_mirrored_on_its_own_and_read_in_any_order(cache, source):
    stored = LatentCache(cache)
    plain, mirrored = (stored.moments(range(len(source)), [flip] * len(source)) for flip in (False, True))
    assert (plain.flip(-1) - mirrored).abs().max() > 0.01  # an encoder does not commute with mirroring
    order, flips = [17, 0, 5, 4, 17], [True, False, True, True, False]
    expected = torch.stack([(mirrored if flip else plain)[i] for i, flip in zip(order, flips, strict=True)])
    assert torch.equal(stored.moments(order, flips), expected)
    assert stored.labels(order).tolist() == [source[i].label for i in order]


def test_the_index_says_what_the_cache_is(cache, kl, source):
    stored = LatentCache(cache)
    plan, shards = stored.plan, stored.index.shards
    assert (plan.autoencoder_hash, plan.source_fingerprint) == (kl.content_hash, source.fingerprint())
    assert (plan.image_size, plan.num_channels, plan.moments_shape) == ((16, 16), 4, (8, 8, 8))
    assert (plan.flips, plan.precision, plan.pixel_range) == (True, "float16", (-1.0, 1.0))
    assert [shard.num_images for shard in shards] == [5, 5, 5, 3]
    assert [shard.num_bytes for shard in shards] == [(cache / shard.file).stat().st_size for shard in shards]
    stored.verify()


def test_worker_processes_map_the_files_themselves(cache):
    stored = LatentCache(cache)
    before = stored.moments([7], [False])
    sent = pickle.dumps(stored)
    assert len(sent) < 10_000
    assert torch.equal(pickle.loads(sent).moments([7], [False]), before)


def test_a_shard_of_broken_images_only(tmp_path, images, kl):
    folder = shutil.copytree(images, tmp_path / "images")
    for number in range(5):
        (folder / "apple" / f"{number}.png").write_bytes(b"no picture")
    index = write_cache(open_images(folder, tiny.IMAGE_SIZE), kl, tmp_path / "cache", flips=True, shard_size=5)
    assert [shard.num_images for shard in index.shards] == [0, 5, 5, 3]
    stored = LatentCache(tmp_path / "cache")
    assert stored.moments([0], [True]).shape == (1, 8, 8, 8)
    assert (stored.names()[0], stored.labels([0, 1]).tolist()) == ("apple/5.png", [0, 1])


@pytest.mark.parametrize("mirrored_alone", [False, True])
def test_moments_beyond_float16_are_refused(tmp_path, source, kl, monkeypatch, mirrored_alone):
    true_encode, calls = Autoencoder.encode, []

    def huge(self, pixels):
        calls.append(1)
        too_large = not mirrored_alone or len(calls) % 2 == 0  # the mirrored images follow the plain ones
        return true_encode(self, pixels) * (1e6 if too_large else 1)

    assert kl.num_moments == 8  # probed before `encode` is replaced
    monkeypatch.setattr(Autoencoder, "encode", huge)
    with pytest.raises(DataError, match="not finite as float16; store them with --dtype float32"):
        write_cache(source, kl, tmp_path / "cache", flips=True)


class Counting:
    """A source that counts how often each image is decoded."""

    class_names = map_class_names = map_palette = columns = ()
    image_size, pixel_format = Size.of(tiny.IMAGE_SIZE), PixelFormat()
    input_format, input_origin = None, ""
    description = "counted"

    def __init__(self):
        self.counts = [0] * 10

    def __len__(self):
        return len(self.counts)

    def __getitem__(self, index):
        self.counts[index] += 1
        return ImageItem(np.full((16, 16, 3), index, dtype=np.uint8), None, str(index))

    def name(self, index):
        return str(index)

    def contents(self):
        return [""] * len(self)

    def fingerprint(self):
        return "counted"


def test_every_image_is_decoded_once(tmp_path, kl):
    source, seen = Counting(), []
    write_cache(source, kl, tmp_path / "cache", flips=True, batch_size=3, shard_size=7, on_images=seen.append)
    assert source.counts == [1] * 10
    assert sum(seen) == 10


def test_names_are_kept_whatever_they_are(tmp_path, kl):
    folder = tiny.write_images(tmp_path / "odd", classes=("b", "über \u96ea 'x'"), per_class=1)
    write_cache(open_images(folder, tiny.IMAGE_SIZE), kl, tmp_path / "cache")
    assert LatentCache(tmp_path / "cache").names() == ["b/0.png", "über \u96ea 'x'/0.png"]


def test_kill_9_at_random_moments(tmp_path, kl_folder):
    """Killed three times wherever it happens to be; what was complete is never encoded again."""
    options, killed, log = {"flips": True, "shard_size": 4}, tmp_path / "killed", tmp_path / "log"
    source, autoencoder = open_images("synthetic:400", 16), Autoencoder.from_pretrained(kl_folder)
    write_cache(source, autoencoder, tmp_path / "whole", **options)
    command = ("encode", "synthetic:400", "--out", killed, "--autoencoder", kl_folder, "--image-size", 16)
    command += ("--shard-size", 4, "--flips", "--device", "cpu")

    def complete() -> dict[str, int]:
        """Finished shards and when they were written."""
        records = sorted(killed.glob("shard-*.json"))
        return {record.stem: record.with_suffix(".safetensors").stat().st_mtime_ns for record in records}

    kept: dict[str, int] = {}
    for _ in range(3):
        process, before = processes.start(command, log), len(kept)
        processes.wait_until(lambda before=before: len(complete()) > before + 2, process)
        process.join(random.uniform(0, 0.1))
        assert process.is_alive(), f"too quick to be killed: {log.read_text()}"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert kept.items() <= complete().items()
        kept = complete()
    assert 9 <= len(kept) < 100
    seen: list[int] = []
    write_cache(source, autoencoder, killed, **options, on_images=seen.append)
    assert sum(seen) == 400  # the progress bar ends where it should
    assert kept.items() <= complete().items()
    (killed / ".lock.0").unlink(missing_ok=True)  # of the killed command; it locks nothing any more
    assert tiny.tree(killed) == tiny.tree(tmp_path / "whole")


@pytest.mark.parametrize("missing", ["shard-00002.safetensors", "shard-00002.json"])
def test_a_missing_file_is_made_again_and_nothing_else(tmp_path, cache, source, kl, missing):
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    others = {file: file.stat().st_mtime_ns for file in damaged.glob("shard-*") if "00002" not in file.name}
    (damaged / missing).unlink()
    write_cache(source, kl, damaged, flips=True, shard_size=5)
    assert tiny.tree(damaged) == tiny.tree(cache)
    assert {file: file.stat().st_mtime_ns for file in others} == others


def test_two_processes_at_once(tmp_path, kl_folder):
    """As under torchrun; they only communicate through the folder."""
    write_cache(open_images("synthetic:60", 16), Autoencoder.from_pretrained(kl_folder), tmp_path / "one", shard_size=4)
    command = ("encode", "synthetic:60", "--out", tmp_path / "two", "--autoencoder", kl_folder, "--image-size", 16)
    workers = processes.start_processes([*command, "--shard-size", 4, "--device", "cpu"], tmp_path / "log", 2)
    for rank, worker in enumerate(workers):
        log = tmp_path / f"log.{rank}"
        assert processes.finish(worker, log) == 0, log.read_text()
    assert tiny.tree(tmp_path / "two") == tiny.tree(tmp_path / "one")


def test_processes_that_begin_together_do_not_refuse_each_other(tmp_path, source, kl, monkeypatch):
    """Another process writes its plan and its shards while this one looks at the folder."""
    true_iterdir, raced = Path.iterdir, []

    def iterdir(self):
        listed = list(true_iterdir(self))
        if self == tmp_path / "raced" and not raced:
            raced.append(1)
            write_cache(source, kl, self, shard_size=5, runtime=tiny.one_of_two(1))
        return iter(listed)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert write_cache(source, kl, tmp_path / "raced", shard_size=5, runtime=tiny.one_of_two(0)) is not None
    assert raced


def test_the_same_images_and_autoencoder_elsewhere_continue_a_cache(tmp_path, cache, images, kl):
    """A plan is compared by content: where things lie has no say."""
    copied = shutil.copytree(cache, tmp_path / "copied")
    moved = open_images(shutil.copytree(images, tmp_path / "moved"), tiny.IMAGE_SIZE)
    write_cache(moved, Autoencoder(kl.model, "elsewhere"), copied, flips=True, shard_size=5)
    changed = {name for name, content in tiny.tree(copied).items() if tiny.tree(cache)[name] != content}
    assert changed == {"index.json"}  # where the source lies


def test_a_shard_that_is_a_pickle_is_not_executed(tmp_path, cache, bomb):
    poisoned = shutil.copytree(cache, tmp_path / "poisoned")
    shard = poisoned / "shard-00001.safetensors"
    size = shard.stat().st_size
    os.truncate(bomb(shard), size)
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors"):
        LatentCache(poisoned).moments([6], [False])


# What changed since


def _encode(folder, kl, out, **options):
    kept = []
    index = write_cache(open_images(folder, tiny.IMAGE_SIZE), kl, out, shard_size=5, on_kept=kept.append, **options)
    return index, sum(kept)


@pytest.fixture
def own(tmp_path, images):
    return shutil.copytree(images, tmp_path / "own")


def test_a_complete_cache_of_the_same_images_is_kept(tmp_path, own, kl):
    _encode(own, kl, tmp_path / "cache")
    before = tiny.tree(tmp_path / "cache")
    for file in own.rglob("*.png"):
        os.utime(file)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(own, tmp_path / "elsewhere")
    assert _encode(moved, kl, tmp_path / "cache")[1] == tiny.NUM_IMAGES
    assert tiny.tree(tmp_path / "cache") == before


def test_images_that_changed_came_or_went_are_named(tmp_path, own, kl):
    _encode(own, kl, tmp_path / "cache")
    before = tiny.tree(tmp_path / "cache")
    other = (own / "berry" / "1.png").read_bytes()
    new = own / "apple" / "new.png"
    for change, said in (
        (lambda: (own / "apple" / "0.png").write_bytes(other), r"since then 1 changed \(apple/0\.png\); restore them"),
        (
            lambda: new.write_bytes(other),
            r"1 changed \(apple/0\.png\), 1 added \(apple/new\.png\)",
        ),
        (
            lambda: (own / "berry" / "3.png").unlink(),
            r", 1 added \(apple/new\.png\), 1 removed \(berry/3\.png\); restore",
        ),
    ):
        change()
        with pytest.raises(ArtifactError, match=said):
            _encode(own, kl, tmp_path / "cache")
        assert tiny.tree(tmp_path / "cache") == before
    shutil.rmtree(tmp_path / "cache")  # as the message says
    assert _encode(own, kl, tmp_path / "cache")[0].num_images == tiny.NUM_IMAGES


def test_what_was_broken_and_is_whole_now_is_taken_in(tmp_path, own, images, kl):
    whole = tmp_path / "whole"
    _encode(images, kl, whole)
    for name in ("apple/3.png", "cherry/0.png"):
        (own / name).write_bytes(bytes((images / name).stat().st_size))
    index, _ = _encode(own, kl, tmp_path / "cache")
    assert len(index.broken) == 2
    shutil.copy(images / "apple/3.png", own / "apple/3.png")
    index, kept = _encode(own, kl, tmp_path / "cache")
    assert [line.partition(":")[0] for line in index.broken] == ["cherry/0.png"]
    assert kept == tiny.NUM_IMAGES - 5  # one shard of five was encoded again
    shutil.copy(images / "cherry/0.png", own / "cherry/0.png")
    index, _ = _encode(own, kl, tmp_path / "cache")
    assert index.broken == []
    for shard in whole.glob("shard-*"):
        assert (tmp_path / "cache" / shard.name).read_bytes() == shard.read_bytes()


def test_images_that_are_not_encoded_yet_may_change(tmp_path, own, kl):
    assert _encode(own, kl, tmp_path / "cache", runtime=tiny.one_of_two(0))[0] is None
    (own / "apple" / "5.png").write_bytes((own / "berry" / "1.png").read_bytes())  # of the second shard
    assert _encode(own, kl, tmp_path / "cache")[0].num_images == tiny.NUM_IMAGES
    LatentCache(tmp_path / "cache").verify()


def test_a_cache_of_an_earlier_version_can_be_trained_on_but_not_gone_on_with(tmp_path, cache, source, kl):
    old = shutil.copytree(cache, tmp_path / "old")
    (old / "source.json").unlink()
    for file in old.glob("*.json"):
        text = json.loads(file.read_text())
        for record in (text, text.get("plan", {}), *text.get("shards", [])):
            for key in ("identity", "masks_fingerprint", "checksum"):
                record.pop(key, None)
            if "sha256" in record:
                record.pop("source_fingerprint")
        file.write_text(json.dumps(text))
    assert len(LatentCache(old)) == tiny.NUM_IMAGES
    with pytest.raises(ArtifactError, match="it can be trained on, but not extended; choose another --out"):
        write_cache(source, kl, old, flips=True, shard_size=5)


def test_a_class_of_broken_images_is_noticed(tmp_path, own, kl, caplog):
    for file in (own / "berry").iterdir():
        file.write_bytes(b"<html>404")
    _encode(own, kl, tmp_path / "cache")
    assert "has no readable image of 1 of its classes (berry), so training with labels will refuse" in caplog.text


def test_the_index_says_what_the_squares_leave_out(tmp_path, kl):
    (tmp_path / "in").mkdir()
    for n, size in enumerate([(40, 30), (30, 40), (32, 32), (64, 16)]):
        Image.new("RGB", size).save(tmp_path / "in" / f"{n}.png")
    index = write_cache(open_images(tmp_path / "in", 16), kl, tmp_path / "cache", shard_size=3)
    assert index.cut == (pytest.approx((0.25 + 0.25 + 0 + 0.75) / 4), 0.75)


def test_a_flipped_bit_of_a_shard_is_noticed_and_encoding_again_helps(cache, tmp_path, images, kl):
    copy = shutil.copytree(cache, tmp_path / "cache")
    shard = copy / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors is damaged.*encode` again"):
        LatentCache(copy).verify()
    write_cache(open_images(images, tiny.IMAGE_SIZE), kl, copy, flips=True, shard_size=5)
    verified = []
    LatentCache(copy).verify(verified.append)
    assert sum(verified) == tiny.NUM_IMAGES
    assert tiny.tree(copy) == tiny.tree(cache)


@pytest.mark.parametrize("name", ["index.json", "shard-00001.json"])
def test_a_digit_of_a_record_is_noticed_and_encoding_again_helps(cache, tmp_path, images, kl, name):
    copy = shutil.copytree(cache, tmp_path / "cache")
    record = json.loads((copy / name).read_text())
    sums = record["channel_mean"] if name == "index.json" else record["channel_sum"]
    sums[0] += 0.5
    (copy / name).write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=rf"{name} is damaged"):
        read_cache_record(CacheIndex if name == "index.json" else ShardRecord, copy / name)
    write_cache(open_images(images, tiny.IMAGE_SIZE), kl, copy, flips=True, shard_size=5)
    assert tiny.tree(copy) == tiny.tree(cache)


def test_a_shard_that_is_cut_off_while_it_is_read(cache, tmp_path):
    """Reading its mapped memory would kill the process."""
    copy = LatentCache(shutil.copytree(cache, tmp_path / "cache"))
    copy.moments([6], [False])
    with (copy.folder / "shard-00001.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors is truncated"):
        copy.moments([6], [False])

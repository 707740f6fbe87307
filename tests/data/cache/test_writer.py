"""Semantic maps and mask variants in a latent cache: what is read back is what computing directly gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.artifacts import open_tensors
from latentflow.autoencoder import Autoencoder, to_unit_range
from latentflow.commands.info import describe
from latentflow.data import prefetch
from latentflow.data.cache import shard as cache_shard
from latentflow.data.cache.reader import LatentCache
from latentflow.data.items import UNLABELLED, ImageItem
from latentflow.data.painting.latent_size import class_counts, hide, hole_counts, shares
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.painting.masks import draw_mask
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.prefetch import Reading
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError
from latentflow.pixel_format import PixelFormat
from latentflow.randomness import derive_seed
from latentflow.sizes import Size
from tests import tiny
from tests.tiny import write_cache

VARIANTS = 3
NUM_IMAGES = 12
PLAIN, MIRRORED = [False] * NUM_IMAGES, [True] * NUM_IMAGES


@pytest.fixture
def source(segmented):
    return open_images(segmented, tiny.IMAGE_SIZE)


def holes_of(rows: int, variants: int, rules: MaskRules) -> list[np.ndarray]:
    """The holes of some images: variant after variant, image after image."""
    side = tiny.IMAGE_SIZE
    seeds = [derive_seed("mask variant", row, variant) for row in range(rows) for variant in range(variants)]
    return [draw_mask(rules, side, side, seed) for seed in seeds]


def encoded(pictures: list[np.ndarray], autoencoder: Autoencoder) -> torch.Tensor:
    return autoencoder.encode(to_unit_range(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)))


def test_maps_are_those_of_the_source_and_mirror_with_the_image(segmented_cache, source):
    stored = LatentCache(segmented_cache)
    assert (stored.map_class_names, stored.map_palette) == (tiny.MAP_CLASSES, tiny.MAP_PALETTE)
    maps = [item.semantic_map for item in source]
    for flipped, turned in ((PLAIN, maps), (MIRRORED, [semantic_map[:, ::-1] for semantic_map in maps])):
        expected = torch.stack([shares(class_counts(one, 3, tiny.FACTOR), tiny.FACTOR) for one in turned])
        found = stored.class_fractions(range(NUM_IMAGES), flipped)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    assert any((one == UNLABELLED).any() for one in maps)


def test_variants_are_the_images_without_their_holes(tmp_path, source, kl):
    write_cache(source, kl, tmp_path / "cache", flips=True, mask_variants=VARIANTS, shard_size=5, batch_size=2)
    holes = holes_of(NUM_IMAGES, VARIANTS, MaskRules())
    assert len({hole.tobytes() for hole in holes}) == len(holes)  # no two alike
    stored = LatentCache(tmp_path / "cache")
    for variant in range(VARIANTS):
        own = holes[variant::VARIANTS]
        hidden = [hide(item.pixels, hole) for item, hole in zip(source, own, strict=True)]
        for flipped, step in ((PLAIN, 1), (MIRRORED, -1)):
            moments, mask = stored.known(range(NUM_IMAGES), [variant] * NUM_IMAGES, flipped)
            expected = encoded([picture[:, ::step] for picture in hidden], kl)
            # float16 keeps 11 bits; the encoder itself differs by rounding in batches of another shape
            assert torch.allclose(moments.float(), expected, rtol=2**-11, atol=1e-5)
            counted = [shares(hole_counts(hole[:, ::step], tiny.FACTOR), tiny.FACTOR) for hole in own]
            assert torch.equal(mask, torch.stack(counted))
    plain = stored.moments(range(NUM_IMAGES), PLAIN)
    assert (plain - stored.known(range(NUM_IMAGES), [0] * NUM_IMAGES, PLAIN)[0]).abs().amax((1, 2, 3)).min() > 0.01


def test_rows_variants_and_mirrors_are_chosen_one_by_one(segmented_cache):
    stored = LatentCache(segmented_cache)
    indices, variants, flipped = [11, 0, 5, 4, 11], [2, 0, 1, 2, 0], [True, False, True, True, False]
    moments, mask = stored.known(indices, variants, flipped)
    fractions = stored.class_fractions(indices, flipped)
    for row, chosen in enumerate(zip(indices, variants, flipped, strict=True)):
        own_moments, own_mask = stored.known(*([one] for one in chosen))
        assert torch.equal(moments[row], own_moments[0])
        assert torch.equal(mask[row], own_mask[0])
        assert torch.equal(fractions[row], stored.class_fractions([chosen[0]], [chosen[2]])[0])
    straight, mirrored = (stored.known([3], [1], [flip]) for flip in (False, True))
    assert torch.equal(straight[1].flip(-1), mirrored[1])
    assert (straight[0].flip(-1) - mirrored[0]).abs().max() > 1e-3  # encoded on its own: an encoder is not symmetric


def test_masks_follow_the_rules_of_the_plan(tmp_path, source, kl):
    rules = MaskRules(policy="boxes", most_share=0.3)
    write_cache(source, kl, tmp_path / "cache", masks=rules, mask_variants=2)
    plan = LatentCache(tmp_path / "cache").plan
    assert (plan.masks, plan.mask_variants) == (rules, 2)
    holes = holes_of(NUM_IMAGES, 2, rules)
    assert all(0.05 <= hole.mean() <= 0.3 for hole in holes)
    shared = LatentCache(tmp_path / "cache").known(range(NUM_IMAGES), [1] * NUM_IMAGES, PLAIN)[1]
    assert torch.allclose(shared.mean((1, 2, 3)), torch.tensor([hole.mean() for hole in holes[1::2]]).float())


def test_a_cache_without_variants_says_nothing_of_masks(tmp_path, source, kl):
    write_cache(source, kl, tmp_path / "cache", masks=MaskRules(policy="boxes"))
    assert LatentCache(tmp_path / "cache").plan.masks is None
    names = set(open_tensors(tmp_path / "cache" / "shard-00000.safetensors").keys())
    assert names == {"moments", "labels", "class_counts"}


def test_holes_of_the_others_do_not_change_where_an_image_is_broken(tmp_path, segmented, segmented_cache, kl):
    folder = shutil.copytree(segmented, tmp_path / "images")
    (folder / "images" / "apple" / "2.png").write_bytes(b"no picture")
    (folder / "masks" / "berry" / "1.png").write_bytes(b"no map")
    index = write_cache(open_images(folder, tiny.IMAGE_SIZE), kl, tmp_path / "cache", mask_variants=3, flips=True)
    image, semantic_map = index.broken
    assert image == "apple/2.png: its content is no image that Pillow can read"
    assert semantic_map.startswith("berry/1.png: its map masks/berry/1.png")  # the file that is at fault is named
    whole, fewer = LatentCache(segmented_cache), LatentCache(tmp_path / "cache")
    assert fewer.names() == [name for name in whole.names() if name not in ("apple/2.png", "berry/1.png")]
    for row, name in enumerate(fewer.names()):
        before = whole.names().index(name)
        assert torch.equal(fewer.known([row], [2], [True])[1], whole.known([before], [2], [True])[1])
        assert torch.equal(fewer.class_fractions([row], [False]), whole.class_fractions([before], [False]))


def test_resumed_after_a_kill_it_is_the_same_to_the_byte(tmp_path, source, segmented_cache, kl):
    options = {"flips": True, "shard_size": 5, "mask_variants": 3}

    def die(num_images: int) -> None:
        seen.append(num_images)
        if len(seen) == 3:
            raise KeyError("killed here")

    seen = []
    with pytest.raises(KeyError):
        write_cache(source, kl, tmp_path / "cache", batch_size=2, on_images=die, **options)
    assert not (tmp_path / "cache" / "shard-00000.json").exists()
    seen = [0, 0, 0]  # now it lives on
    tiny.leave_half_written(tmp_path / "cache" / "shard-00000.safetensors")
    write_cache(source, kl, tmp_path / "cache", on_images=die, **options)
    assert tiny.tree(tmp_path / "cache") == tiny.tree(segmented_cache)
    (tmp_path / "cache" / "index.json").unlink()
    for suffix in ("json", "safetensors"):
        (tmp_path / "cache" / f"shard-00001.{suffix}").unlink()
    assert write_cache(source, kl, tmp_path / "cache", runtime=tiny.one_of_two(0), **options) is None
    assert write_cache(source, kl, tmp_path / "cache", runtime=tiny.one_of_two(1), **options) is not None
    assert tiny.tree(tmp_path / "cache") == tiny.tree(segmented_cache)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_variants": 2}, "mask_variants: 3, now 2"),
        ({}, "mask_variants: 3, now 0"),
        ({"mask_variants": 3, "masks": MaskRules(policy="boxes")}, 'masks.policy: "mixed", now "boxes"'),
    ],
)
def test_another_set_of_masks_is_refused(segmented_cache, source, kl, options, said):
    before = tiny.tree(segmented_cache)
    with pytest.raises(ArtifactError, match=said):
        write_cache(source, kl, segmented_cache, flips=True, shard_size=5, **options)
    assert tiny.tree(segmented_cache) == before


def test_other_classes_are_refused(tmp_path, segmented, segmented_cache, kl):
    folder = shutil.copytree(segmented, tmp_path / "renamed")
    names = (folder / "classes.json").read_text()
    (folder / "classes.json").write_text(names.replace('"road"', '"lane"'))
    with pytest.raises(ArtifactError, match="map_class_names"):
        write_cache(
            open_images(folder, tiny.IMAGE_SIZE), kl, segmented_cache, flips=True, shard_size=5, mask_variants=3
        )


class Plain:
    """One picture whose map is all one class: 256 pixels of it in each latent pixel of an encoder of factor 16."""

    class_names = columns = ()
    input_format, input_origin = None, ""
    map_class_names, map_palette = ("a", "b"), ((0, 0, 0), (9, 9, 9))
    image_size, description = Size(32, 32), "plain"
    pixel_format = PixelFormat()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> ImageItem:
        semantic_map = np.ones((32, 32), np.uint8)
        semantic_map[20, 20] = 0
        return ImageItem(np.zeros((32, 32, 3), np.uint8), None, "plain", semantic_map)

    def name(self, index: int) -> str:
        return "plain"

    def contents(self) -> list[str]:
        return [""]

    def fingerprint(self) -> str:
        return "plain"


@pytest.mark.parametrize(("levels", "dtype"), [(4, torch.uint8), (5, torch.int16)])
def test_counts_beyond_a_byte(tmp_path, levels, dtype):
    """Factors of 8 and 16: 64 and 256 pixels in a latent pixel."""
    parts = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    autoencoder = Autoencoder(tiny.kl(block_out_channels=(4,) * levels, norm_num_groups=2, **parts), "deep")
    factor = autoencoder.factor
    assert factor == 2 ** (levels - 1)
    write_cache(Plain(), autoencoder, tmp_path / "cache", mask_variants=1, masks=MaskRules(policy="halves"))
    stored = LatentCache(tmp_path / "cache")
    tensors = open_tensors(tmp_path / "cache" / "shard-00000.safetensors")
    assert tensors.get_tensor("class_counts").dtype == tensors.get_tensor("hole_counts").dtype == dtype
    expected = torch.ones(32 // factor, 32 // factor)
    expected[20 // factor, 20 // factor] = 1 - 1 / factor**2
    fractions = stored.class_fractions([0], [False])[0]
    assert torch.equal(fractions[1], expected)
    assert torch.equal(fractions[0], 1 - expected)
    assert stored.known([0], [0], [False])[1].max() == 1


def test_info_describes_it(segmented_cache):
    facts = describe(segmented_cache)
    assert facts["map classes"] == list(tiny.MAP_CLASSES)
    assert facts["mask variants"] == 3
    assert (facts["images"], facts["flips"], facts["classes"]) == (NUM_IMAGES, True, list(tiny.CLASSES))


def test_masks_count_by_their_content_and_not_by_their_place(tmp_path, source, kl):
    folder = tmp_path / "holes"
    folder.mkdir()
    for n in range(2):
        mask = Image.new("L", (16, 16))
        mask.paste(255, (n, 0, n + 5, 9))
        mask.save(folder / f"{n}.bmp")
    kept: list[int] = []
    options = {"shard_size": 5, "mask_variants": 1, "on_kept": kept.append}
    write_cache(source, kl, tmp_path / "cache", masks=MaskRules(folder=str(folder)), **options)
    moved = folder.rename(tmp_path / "moved")
    write_cache(source, kl, tmp_path / "cache", masks=MaskRules(folder=str(moved)), **options)
    assert sum(kept) == len(source)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 3, 3))
    mask.save(moved / "1.bmp")
    with pytest.raises(ArtifactError, match=r"other settings \(masks_fingerprint: .* choose another --out"):
        write_cache(source, kl, tmp_path / "cache", masks=MaskRules(folder=str(moved)), **options)


# Reading ahead


@pytest.fixture
def troubled(tmp_path, segmented) -> Path:
    """Images of which one is broken, and one has a broken map."""
    folder = shutil.copytree(segmented, tmp_path / "images")
    (folder / "images" / "apple" / "2.png").write_bytes(b"no picture")
    (folder / "masks" / "berry" / "1.png").write_bytes(b"no map")
    return folder


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("read_together", [1, 32])
def test_a_cache_is_the_same_whoever_reads(tmp_path, troubled, kl, monkeypatch, num_workers, read_together):
    monkeypatch.setattr(prefetch, "_MOST_READ_TOGETHER", read_together)
    source = open_images(troubled, tiny.IMAGE_SIZE)
    options = {"flips": True, "mask_variants": 2, "shard_size": 5, "batch_size": 3}
    write_cache(source, kl, tmp_path / "threads", num_workers=0, **options)
    seen: list[int] = []
    write_cache(source, kl, tmp_path / "processes", num_workers=num_workers, on_images=seen.append, **options)
    assert sum(seen) == len(source) and max(seen) == 3
    assert tiny.tree(tmp_path / "processes") == tiny.tree(tmp_path / "threads")
    with pytest.raises(BrokenImage, match=r"apple/2\.png: its content is no image"):
        write_cache(source, kl, tmp_path / "strict", strict=True, num_workers=num_workers, **options)
    assert not list((tmp_path / "strict").glob("shard-*"))


def test_batches_are_encoded_whole(tmp_path, source, kl, monkeypatch):
    """However many images are read together; a CPU encodes 16 of them at a time."""
    monkeypatch.setattr(prefetch, "_MOST_READ_TOGETHER", 2)
    given, true_encode = [], Autoencoder.encode
    monkeypatch.setattr(
        Autoencoder, "encode", lambda self, pixels: given.append(len(pixels)) or true_encode(self, pixels)
    )
    write_cache(source, kl, tmp_path / "cache", shard_size=7, batch_size=5)
    assert given == [5, 2, 5]


def test_a_shard_that_cannot_be_written_is_an_error(tmp_path, source, kl, monkeypatch):
    def full(*given, **options):
        raise ArtifactError("no space left")

    monkeypatch.setattr(cache_shard, "write_tensors", full)
    with pytest.raises(ArtifactError, match="no space left"):
        write_cache(source, kl, tmp_path / "cache", shard_size=5)
    assert not (tmp_path / "cache" / "index.json").exists()


def test_notices_of_worker_processes_are_printed_by_the_main_process(tmp_path, kl, caplog):
    (tmp_path / "in").mkdir()
    for number in range(12):
        picture = Image.new("RGB", (16, 16), (20 * number, 0, 0))
        picture.save(tmp_path / "in" / f"{number}.gif", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    source = open_images(tmp_path / "in", tiny.IMAGE_SIZE)
    write_cache(source, kl, tmp_path / "cache", batch_size=2, num_workers=2)
    assert caplog.text.count("holds several pictures; the first is read") == 1


def test_processes_read_where_that_takes_long(monkeypatch):
    """And few threads where little of the time is spent outside Python, of which one runs at a time."""
    clock, seconds = [0.0], [0.002]
    monkeypatch.setattr(prefetch, "usable_cpus", lambda: 8)
    monkeypatch.setattr(prefetch.time, "perf_counter", lambda: clock[0])

    class Slow:
        def __getitems__(self, rows: range) -> None:
            clock[0] += 0.1 if clock[0] == 0 else seconds[0] * len(rows)

    def chosen(num_images: int, device: str = "cuda", sharing: int = 1) -> Reading:
        clock[0] = 0.0
        rows = [range(start, min(start + 1024, num_images)) for start in range(0, num_images, 1024)]
        how = Reading(batch_bytes=1 << 20, cpu_is_busy=device == "cpu", sharing=sharing)
        return prefetch.what_pays(Slow(), rows, how)

    assert chosen(100_000).num_workers == 7
    assert chosen(100_000, sharing=2).num_workers == 3
    assert chosen(100_000, sharing=8).num_workers == 0  # one processor each
    assert chosen(100_000, "cpu").num_workers == 0
    assert chosen(1_900).num_workers == chosen(10).num_workers == 0  # below four seconds
    assert chosen(1_900).num_threads == chosen(100_000, "cpu").num_threads == 8
    seconds[0] = 3e-4
    assert (chosen(10_000).num_workers, chosen(10_000).num_threads) == (0, 1)
    assert chosen(20_000).num_workers == 6  # a second of reading for each
    assert chosen(40_000).num_workers == 7

import os
import re
import shlex
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.commands.prepare import PrepareResult
from latentflow.commands.prepare import prepare as run
from latentflow.data.painting.semantic_maps import MapClasses, default_palette
from latentflow.data.prepare import CAMVID, CELEBAMASK_HQ, KINDS, find_dataset
from latentflow.data.request import PrepareRequest
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, DataError

PACK = Path(__file__).parents[3] / "shared" / "data" / "camvid.zip"


def prepare(kind: str, source: Path, out: Path, **options: bool) -> PrepareResult:
    return run(PrepareRequest(kind=kind, source=source, **options), out)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def photo(seed: int, height: int = 10, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def a_map(seed: int, num_classes: int, height: int = 10, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_classes, (height, width), np.uint8)


def write(folder: Path, images: dict[str, str], num_classes: int) -> None:
    """Save a photograph under each key and a map under each value."""
    for seed, (image, semantic_map) in enumerate(images.items()):
        save(folder / image, photo(seed))
        save(folder / semantic_map, a_map(seed, num_classes))


def camvid(folder: Path) -> None:
    pairs = {f"images/{name}.jpg": f"masks/{name}.png" for name in ("train/a", "train/b", "val/c")}
    write(folder, pairs, len(CAMVID))
    (folder / "classes.json").write_text(str(list(CAMVID)).replace("'", '"'))


def ade20k(folder: Path) -> None:
    names = ("training/ADE_train_01", "training/ADE_train_02", "validation/ADE_val_01")
    write(folder, {f"images/{name}.jpg": f"annotations/{name}.png" for name in names}, 151)
    rows = [f"{index}\t0.1 \t9\t1\tthing {index}, object {index}" for index in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows, ""]))
    (folder / "sceneCategories.txt").write_text("ADE_train_01 street")


def coco_stuff(folder: Path) -> None:
    names = ("train2017/000000000009", "train2017/000000000025", "val2017/000000000139")
    write(folder, {f"images/{name}.jpg": f"stuffthingmaps/{name}.png" for name in names}, 182)
    rows = ["0: unlabeled", *(f"{index}: thing: {index}" for index in range(1, 183))]
    (folder / "labels.txt").write_text("\n".join(rows))


def celebamask_hq(folder: Path) -> None:
    for index in (0, 26999, 27000):
        save(folder / f"CelebA-HQ-img/{index}.jpg", photo(index, 16, 16))
        for part in ("skin", "nose", "hair", "l_eye"):
            mask = np.zeros((8, 8), np.uint8)
            first = {"skin": 1, "nose": 3, "l_eye": 6, "hair": 5}[part]
            mask[first:, :first] = 255
            save(folder / f"CelebAMask-HQ-mask-anno/{index // 2000}/{index:05d}_{part}.png", mask)
    (folder / "CelebA-HQ-to-CelebA-mapping.txt").write_text("idx orig_idx")


MAKE = {"camvid": camvid, "celebamask-hq": celebamask_hq, "ade20k": ade20k, "coco-stuff": coco_stuff}


@pytest.fixture
def made(tmp_path):
    """Make the tiny data set of a kind, and say where it is."""

    def make(kind: str, wrapper: str = "") -> Path:
        MAKE[kind](tmp_path / "source" / wrapper)
        return tmp_path / "source"

    return make


def pack(folder: Path) -> Path:
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder).as_posix())
    return archive


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Every kind


def test_every_kind_is_tested():
    assert MAKE.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", MAKE)
def test_prepared_data_can_be_opened(tmp_path, made, kind):
    result = prepare(kind, made(kind), tmp_path / "out")
    assert result.num_images == {"train": 2, "val": 1}
    for split, number in result.num_images.items():
        source = open_images(tmp_path / "out" / split, 8, strict=True)
        assert len(source) == number and source.class_names == ()
        assert len(source.map_class_names) == result.num_map_classes
        assert source[0].semantic_map.shape == (8, 8)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("wrapper", ["", "Published/set"])
def test_zip_and_folder_and_wrapper_give_the_same(tmp_path, made, kind, wrapper):
    folder = made(kind, wrapper)
    prepare(kind, folder, tmp_path / "a")
    prepare(kind, pack(folder), tmp_path / "b")
    MAKE[kind](tmp_path / "plain")
    prepare(kind, tmp_path / "plain", tmp_path / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


@pytest.mark.parametrize("kind", MAKE)
def test_files_are_copied_to_the_byte(tmp_path, made, kind):
    folder = made(kind)
    before = contents(folder)
    prepare(kind, folder, tmp_path / "out")
    images = sorted((tmp_path / "out").glob("*/images/*.jpg"))
    assert len(images) == 3
    assert all(image.read_bytes() in before.values() for image in images)
    for copy in (tmp_path / "out").rglob("*.*"):
        assert copy.stat().st_nlink == 1 and not copy.is_symlink()
        copy.write_bytes(b"edited in place")
    assert contents(folder) == before


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Permissions and time of change of the content of every file and folder."""
    found = {path: path.stat() for path in sorted([folder, *folder.rglob("*")])}
    return {str(path): (state.st_mode, state.st_mtime_ns) for path, state in found.items()}


@pytest.mark.parametrize("link", [False, True], ids=["copied", "linked"])
def test_permissions_and_times_of_the_originals_stay(tmp_path, made, link):
    folder = made("camvid")
    (folder / "images/train/a.jpg").chmod(0o400)
    (folder / "masks/train/a.png").chmod(0o664)
    os.utime(folder / "masks/train/b.png", ns=(1, 1))
    before = states(folder)
    prepare("camvid", folder, tmp_path / "out", link=link)
    assert states(folder) == before
    usual = (tmp_path / "out/train/classes.json").stat().st_mode
    copies = [path for path in (tmp_path / "out").rglob("*.*") if path.suffix in (".png", ".jpg")]
    assert link or all(copy.stat().st_mode == usual for copy in copies)


def test_links_only_when_asked_for(tmp_path, made, monkeypatch, caplog):
    folder = made("camvid")
    prepare("camvid", folder, tmp_path / "linked", link=True)
    assert (tmp_path / "linked/train/images/a.jpg").samefile(folder / "images/train/a.jpg")

    def impossible(self, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("latentflow.console._printed", set())
    monkeypatch.setattr(Path, "hardlink_to", impossible)
    prepare("camvid", folder, tmp_path / "copied", link=True)
    assert contents(tmp_path / "linked") == contents(tmp_path / "copied")
    assert [r.message for r in caplog.records] == [
        "files are copied, since they cannot be linked here (Invalid cross-device link)"
    ]


def test_blocks_are_shared_where_the_file_system_can(tmp_path, made, monkeypatch):
    import fcntl

    def clone(target, request, source):
        assert request == 0x40049409
        os.write(target.fileno(), os.pread(source, 1 << 20, 0))

    folder = made("camvid")
    prepare("camvid", folder, tmp_path / "copied")
    monkeypatch.setattr(fcntl, "ioctl", clone)
    monkeypatch.setattr("shutil.copyfile", None)
    prepare("camvid", folder, tmp_path / "cloned")
    assert contents(tmp_path / "copied") == contents(tmp_path / "cloned")


@pytest.mark.parametrize(
    "place",
    ["images/train/a.jpg", "masks/train/a.png", "images/train", "masks", "classes.json", "images/train/a.jpg/.."],
)
def test_links_out_of_the_data_are_refused_with_a_remedy_that_works(tmp_path, made, place):
    folder = made("camvid")
    private = tmp_path / "private"
    path = folder / place.removesuffix("/..")
    path.rename(private)
    path.symlink_to(f"../../../{private.name}" if place.endswith("..") else private)
    private.chmod(private.stat().st_mode & 0o700)
    before = private.stat().st_mode
    with pytest.raises(
        DataError, match=rf"source: .* links to {private}.*, outside this folder, and is not followed"
    ) as caught:
        prepare("camvid", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and private.stat().st_mode == before
    remedy = re.search(r"(cp -rL .*) COPY$", str(caught.value))[1]
    subprocess.run([*shlex.split(remedy), str(tmp_path / "copy")], check=True)
    prepare("camvid", tmp_path / "copy", tmp_path / "out")
    assert len(list((tmp_path / "out/train/images").iterdir())) == 2


def test_links_inside_the_data_are_followed(tmp_path, made):
    folder = made("camvid")
    (folder / "store").mkdir()
    (folder / "images/train/a.jpg").rename(folder / "store/0001")
    (folder / "images/train/a.jpg").symlink_to("../../store/0001")
    (tmp_path / "alias").symlink_to(folder)
    prepare("camvid", tmp_path / "alias", tmp_path / "out")
    copy = tmp_path / "out/train/images/a.jpg"
    assert copy.read_bytes() == (folder / "store/0001").read_bytes() and not copy.is_symlink()


def test_pipes_are_refused(tmp_path, made):
    folder = made("camvid")
    (folder / "images/train/a.jpg").unlink()
    os.mkfifo(folder / "images/train/a.jpg")
    with pytest.raises(DataError, match=r"images/train and masks/train: 1 maps have no image \(a.png\)"):
        prepare("camvid", folder, tmp_path / "out")


def test_a_place_inside_the_data_is_refused(tmp_path, made):
    folder = made("camvid")
    for out in (folder, folder / "prepared", folder / "images" / "new"):
        with pytest.raises(ArtifactError, match=r"lies inside .*source and would become part of it; choose another p"):
            prepare("camvid", folder, out)
    assert not (folder / "prepared").exists()


@pytest.mark.parametrize("kind", MAKE)
def test_progress_counts_every_image(tmp_path, made, kind):
    dataset, counts = find_dataset(kind, made(kind)), []
    dataset.write(tmp_path / "out", counts.append)
    assert counts == [1, 1, 1] and len(dataset) == 3


@pytest.mark.parametrize("kind", MAKE)
def test_preparing_again_is_refused(tmp_path, made, kind):
    (tmp_path / "out").mkdir()
    folder = made(kind)
    prepare(kind, folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"out exists already; choose another place, or delete it to prepare the data"):
        prepare(kind, folder, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match=r"file is a file; choose another place"):
        prepare(kind, folder, tmp_path / "file")


@pytest.mark.parametrize("kind", MAKE)
def test_other_data_are_refused_with_the_layout(tmp_path, kind):
    save(tmp_path / "source" / "cat" / "1.png", photo(0))
    save(tmp_path / "source" / "dog" / "1.png", photo(0))
    with pytest.raises(DataError, match=rf"source (does not hold {kind}, which has |has no objectInfo150.txt, which)"):
        prepare(kind, tmp_path / "source", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        prepare(kind, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_kind_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(DataError, match=r"unknown data set 'ade20'; did you mean 'ade20k'\? \(valid: camvid, celeb"):
        find_dataset("ade20", tmp_path)


def test_what_fails_halfway_leaves_nothing(tmp_path, made):
    folder = made("celebamask-hq")
    broken = folder / "CelebAMask-HQ-mask-anno/13/27000_nose.png"
    broken.write_bytes(b"no image")
    with pytest.raises(
        DataError,
        match=r"source: cannot read .*13/27000_nose.png \(its content is no image that Pillow .*\); download or unp",
    ):
        prepare("celebamask-hq", folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_damaged_archive_is_named(tmp_path, made):
    archive = pack(made("camvid"))
    data = bytearray(archive.read_bytes())
    data[data.index(b"\xff\xd8\xff") + 100] ^= 0xFF  # inside the first photograph
    archive.write_bytes(data)
    with pytest.raises(DataError, match=r"source.zip: cannot read images/train/a.jpg \(Bad CRC-32 .*; download or unp"):
        prepare("camvid", archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dangling_link_is_named(tmp_path, made):
    folder = made("camvid")
    (folder / "images/train/a.jpg").unlink()
    (folder / "images/train/a.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(DataError, match=r"source: cannot read images/train/a.jpg \(No such file or directory\)"):
        prepare("camvid", folder, tmp_path / "out")


@pytest.mark.parametrize(
    "kind, image, semantic_map",
    [
        ("camvid", "images/train/a.jpg", "masks/train/a.png"),
        ("ade20k", "images/training/ADE_train_01.jpg", "annotations/training/ADE_train_01.png"),
        ("coco-stuff", "images/train2017/000000000009.jpg", "stuffthingmaps/train2017/000000000009.png"),
    ],
)
def test_image_without_map_and_map_without_image(tmp_path, made, kind, image, semantic_map):
    folder = made(kind)
    kept = (folder / semantic_map).read_bytes()
    (folder / semantic_map).unlink()
    where = re.escape(f"{folder}: {Path(image).parent} and {Path(semantic_map).parent}")
    with pytest.raises(DataError, match=rf"^{where}: 1 images have no map \({Path(image).name}\); an image a/x"):
        prepare(kind, folder, tmp_path / "out")
    (folder / semantic_map).write_bytes(kept)
    (folder / image).unlink()
    with pytest.raises(DataError, match=rf"^{where}: 1 maps have no image \({Path(semantic_map).name}\)"):
        prepare(kind, folder, tmp_path / "out")


# CamVid


def test_camvid_gets_its_customary_colours(tmp_path, made):
    prepare("camvid", made("camvid"), tmp_path / "out")
    source = open_images(tmp_path / "out/train", 8)
    assert dict(zip(source.map_class_names, source.map_palette, strict=True)) == CAMVID


def test_data_laid_out_like_camvid_keep_their_own_classes(tmp_path, made):
    folder = made("camvid")
    own = MapClasses(tuple(f"kind {index}" for index in range(12)), default_palette(13)[1:])
    own.write(folder / "classes.json")
    for top, suffix in (("images", "jpg"), ("masks", "png")):
        (folder / top / "test" / "street").mkdir(parents=True)
        (folder / top / "val" / f"c.{suffix}").rename(folder / top / "test" / "street" / f"c.{suffix}")
    assert prepare("camvid", folder, tmp_path / "out").num_images == {"test": 1, "train": 2}
    assert MapClasses.read(tmp_path / "out/test/classes.json") == own
    assert (tmp_path / "out/test/masks/street/c.png").is_file()


def test_split_with_only_maps_is_refused(tmp_path, made):
    folder = made("camvid")
    save(folder / "masks/test/x.png", a_map(0, 12))
    with pytest.raises(DataError, match=r"images/test and masks/test: 1 maps have no image \(x.png\)"):
        find_dataset("camvid", folder)


@pytest.mark.skipif(not PACK.is_file(), reason="the CamVid pack is not there")
def test_camvid_as_published(tmp_path):
    result = prepare("camvid", PACK, tmp_path / "out")
    assert result.num_images == {"train": 367, "val": 101} and result.num_map_classes == 12
    source = open_images(tmp_path / "out/train", 32)
    assert source.description == "367 images with semantic maps of 12 classes from train"
    with zipfile.ZipFile(PACK) as archive:
        assert (tmp_path / "out/val/masks/0016E5_07959.png").read_bytes() == archive.read("masks/val/0016E5_07959.png")
    shares = np.bincount(np.stack([source[i].semantic_map for i in range(0, 367, 8)]).ravel(), minlength=12)
    assert shares.argmax() == list(CAMVID).index("road") and (shares > 0).all()


# ADE20K


def test_ade20k_names_its_classes(tmp_path, made):
    prepare("ade20k", made("ade20k"), tmp_path / "out")
    names = open_images(tmp_path / "out/val", 8).map_class_names
    assert len(names) == 151
    assert (names[0], names[1], names[150]) == ("other", "thing 1, object 1", "thing 150, object 150")


def test_ade20k_with_only_validation(tmp_path, made):
    folder = made("ade20k")
    for image in (folder / "images/training").iterdir():
        image.unlink()
    assert prepare("ade20k", folder, tmp_path / "out").num_images == {"val": 1}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"source has no objectInfo150.txt, which names the classes; it comes with ADEChallengeData2016"),
        ("", r"objectInfo150.txt has no tab-separated column Name; restore the published file"),
        ("Idx,Name\n1,wall", r"objectInfo150.txt has no tab-separated column Name"),
        ("Idx\tName\n1\twall\n", r"objectInfo150.txt names 1 classes, not 150"),
    ],
)
def test_ade20k_without_names(made, content, message):
    folder = made("ade20k")
    (folder / "objectInfo150.txt").unlink()
    if content is not None:
        (folder / "objectInfo150.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        find_dataset("ade20k", folder)


# COCO-Stuff


def test_coco_stuff_counts_its_names_from_one(made):
    classes = find_dataset("coco-stuff", made("coco-stuff")).classes
    assert len(classes) == 182
    assert (classes.names[0], classes.names[181]) == ("thing: 1", "thing: 182")


def test_coco_stuff_names_counted_like_the_maps(made):
    folder = made("coco-stuff")
    rows = [*(f"{index}: value {index}" for index in range(182)), "255: unlabeled"]
    (folder / "labels.txt").write_text("\n".join(rows))
    classes = find_dataset("coco-stuff", folder).classes
    assert (classes.names[0], classes.names[181]) == ("value 0", "value 181")


def test_coco_stuff_without_names(made):
    folder = made("coco-stuff")
    (folder / "labels.txt").write_text("0: unlabeled\n1: person\n")
    with pytest.raises(DataError, match=r'labels.txt has no line "2: NAME"; use the file of the cocostuff repository'):
        find_dataset("coco-stuff", folder)
    (folder / "labels.txt").unlink()
    names = find_dataset("coco-stuff", folder).classes.names
    assert len(names) == 182 and (names[0], names[181]) == ("class_000", "class_181")


def test_coco_stuff_in_its_other_layout(tmp_path, made):
    folder = made("coco-stuff")
    expected = contents_of(find_dataset("coco-stuff", folder), tmp_path / "a")
    for split in ("train2017", "val2017"):
        (folder / "images" / split).rename(folder / split)
    (folder / "stuffthingmaps").rename(folder / "annotations")
    (folder / "annotations/instances_train2017.json").write_text("{}")
    assert contents_of(find_dataset("coco-stuff", folder), tmp_path / "b") == expected


def contents_of(dataset, out: Path) -> dict[str, bytes]:
    dataset.write(out)
    return contents(out)


# CelebAMask-HQ


def test_celebamask_hq_paints_later_parts_over_earlier_ones(tmp_path, made):
    prepare("celebamask-hq", made("celebamask-hq"), tmp_path / "out")
    painted = np.asarray(Image.open(tmp_path / "out/val/masks/27000.png"))
    expected = np.zeros((8, 8), np.uint8)
    for part, first in (("skin", 1), ("nose", 3), ("l_eye", 6), ("hair", 5)):  # in the order of the classes
        expected[first:, :first] = CELEBAMASK_HQ.index(part)
    assert set(np.unique(expected)) == {0, 1, 2, 4, 13}
    assert np.array_equal(painted, expected.repeat(2, 0).repeat(2, 1))  # as large as its image


def test_celebamask_hq_is_split_and_named_by_number(tmp_path, made):
    prepare("celebamask-hq", made("celebamask-hq"), tmp_path / "out")
    train = open_images(tmp_path / "out/train", 8)
    assert [train.name(index) for index in range(2)] == ["00000.jpg", "26999.jpg"]
    assert train.map_class_names == CELEBAMASK_HQ and len(CELEBAMASK_HQ) == 19
    assert open_images(tmp_path / "out/val", 8).name(0) == "27000.jpg"


def test_celebamask_hq_masks_in_colour(tmp_path, made):
    folder = made("celebamask-hq")
    prepare("celebamask-hq", folder, tmp_path / "a")
    for mask in (folder / "CelebAMask-HQ-mask-anno").rglob("*.png"):
        Image.open(mask).convert("RGB").save(mask)
    prepare("celebamask-hq", folder, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_celebamask_hq_files_that_do_not_fit(tmp_path, made):
    folder = made("celebamask-hq")
    masks, image = folder / "CelebAMask-HQ-mask-anno", folder / "CelebA-HQ-img/0.jpg"

    def refused(message: str):
        return pytest.raises(DataError, match=message)

    mask = np.zeros((8, 8), np.uint8)
    stray = save(masks / "0/00000_noze.png", mask)
    with refused(r"CelebAMask-HQ-mask-anno/0/00000_noze.png is not a part of a face; did you mean 'nose'\?"):
        find_dataset("celebamask-hq", folder)
    stray = stray.rename(masks / "0/nose.png")
    with refused(r"CelebAMask-HQ-mask-anno/0/nose.png is not a part of a face; it should be called NUMBER_PART.png"):
        find_dataset("celebamask-hq", folder)
    stray = stray.rename(masks / "0/00003_nose.png")
    with refused(r"there are part masks and no image for image 3; unpack the data set again"):
        find_dataset("celebamask-hq", folder)
    stray.unlink()
    stray = save(folder / "CelebA-HQ-img/face.jpg", photo(0))
    with refused(r"CelebA-HQ-img/face.jpg should be called NUMBER.jpg; rename or remove it"):
        find_dataset("celebamask-hq", folder)
    for other in (7, 8):
        save(folder / f"CelebA-HQ-img/{other}.jpg", photo(0))
    stray.unlink()
    with refused(r"there are no part masks for image 7 \(and 1 more\); unpack the data set again"):
        find_dataset("celebamask-hq", folder)
    for other in (7, 8):
        (folder / f"CelebA-HQ-img/{other}.jpg").unlink()
    assert len(find_dataset("celebamask-hq", folder)) == 3 and image.is_file()
    save(masks / "0/00000_skin.png", np.zeros((9, 8), np.uint8))
    with refused(r"00000_nose.png has another size than the other parts; unpack it again"):
        prepare("celebamask-hq", folder, tmp_path / "out")

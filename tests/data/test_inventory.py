import shutil
from pathlib import Path

import pytest
from PIL import Image

from latentflow.data.buckets import BucketedImages
from latentflow.data.inventory import ColumnCounts, duplicates_in, take_inventory
from latentflow.data.sources.images import open_images
from latentflow.data.table_options import TableOptions
from latentflow.sizes import Size
from tests import tiny


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three classes of 20 x 24 pixels, with one of each thing that people should know of."""
    folder = tiny.write_images(tmp_path / "photos", per_class=3)
    shutil.copy(folder / "apple" / "0.png", folder / "apple" / "again.png")
    shutil.copy(folder / "apple" / "0.png", folder / "cherry" / "other.png")
    shutil.copy(folder / "cherry" / "1.png", folder / "cherry" / "same.png")
    Image.open(folder / "berry" / "0.png").resize((40, 10)).save(folder / "berry" / "wide.jpg")
    for number in range(3):
        (folder / "berry" / f"{number}.png").write_bytes(b"<html>404</html>")
    return folder


def test_everything_is_counted(photos):
    found = take_inventory(open_images(photos, 16))
    assert found.num_images == 10
    assert [line.partition(":")[0] for line in found.broken] == ["berry/0.png", "berry/1.png", "berry/2.png"]
    assert found.classes == {"apple": 4, "berry": 1, "cherry": 5}
    assert found.formats == {"PNG, 8-bit rgb": 9, "JPEG, 8-bit rgb": 1}
    assert found.sizes == {"24 x 20": 9, "40 x 10": 1}
    assert found.duplicates == [
        ["apple/0.png", "apple/again.png", "cherry/other.png"],
        ["berry/0.png", "berry/1.png", "berry/2.png"],
        ["cherry/1.png", "cherry/same.png"],
    ]
    assert found.contradictory == [["apple/0.png", "apple/again.png", "cherry/other.png"]]
    assert found.num_duplicates == 5
    assert found.cut_mean == pytest.approx((9 * (1 - 20 / 24) + 1 - 10 / 40) / 10) and found.cut_most == 0.75
    assert found.columns == {} and found.pixels == "8-bit rgb"


def test_a_class_without_a_readable_image_has_none(photos):
    (photos / "berry" / "wide.jpg").unlink()
    assert take_inventory(open_images(photos, 16)).classes == {"apple": 4, "berry": 0, "cherry": 5}


def test_columns_are_counted(tmp_path):
    folder = tiny.write_images(tmp_path / "flat", classes=(), per_class=5)
    rows = ["0.png,1,a,x|y", "1.png,2.5,a,", "2.png,,b,y", "3.png,4,,x", "4.png,,,"]
    (folder / "labels.csv").write_text("\n".join(["file,age,view,tags", *rows]), encoding="utf-8")
    found = take_inventory(open_images(folder, 16, table=TableOptions(columns=["age", "view", "tags:labels"])))
    assert found.columns == {
        "age": ColumnCounts(kind="number", unknown=2, least=1, mean=2.5, greatest=4),
        "view": ColumnCounts(kind="label", unknown=2, classes={"a": 2, "b": 1}),
        "tags": ColumnCounts(kind="labels", unknown=2, classes={"x": 2, "y": 2}),
    }


def test_the_empty_set_is_known(tmp_path):
    folder = tiny.write_images(tmp_path / "flat", classes=(), per_class=2)
    rows = ['{"file": "0.png", "tags": []}', '{"file": "1.png", "tags": ["x"]}']
    (folder / "labels.jsonl").write_text("\n".join(rows), encoding="utf-8")
    found = take_inventory(open_images(folder, 16, table=TableOptions(columns=["tags"])))
    assert found.columns["tags"] == ColumnCounts(kind="labels", unknown=0, classes={"x": 1}, without_class=1)


def test_what_is_drawn_has_no_files():
    source = open_images("synthetic:14", 16)
    found = take_inventory(source)
    assert found.formats == {"drawn, 8-bit rgb": 14} and found.sizes == {"16 x 16": 14}
    assert duplicates_in(source) == [] and sum(found.classes.values()) == 14


def test_buckets_are_counted(tmp_path):
    folder = tiny.write_mixed(tmp_path / "photos")
    (folder / "apple" / "broken.png").write_bytes(b"<html>404</html>")
    source = open_images(folder, 16)
    found = take_inventory(BucketedImages.of(source, [Size(12, 20), Size(20, 12), Size(16, 16)]))
    assert {size: bucket.num_images for size, bucket in found.buckets.items()} == {"20x12": 9, "16": 6, "12x20": 5}
    cut = {size: bucket.cut_mean for size, bucket in found.buckets.items()}
    assert cut["20x12"] == pytest.approx(1 - 12 / (24 * 20 / 36))  # 20 wide, of which 12 of 13.3 rows are kept
    assert cut["16"] == 0 and found.buckets["16"].cut_most == 0
    whole = take_inventory(source)
    assert (found.formats, found.sizes, found.classes) == (whole.formats, whole.sizes, whole.classes)
    assert [line.partition(":")[0] for line in found.broken] == ["apple/broken.png"] and whole.buckets == {}
    assert found.cut_mean < whole.cut_mean

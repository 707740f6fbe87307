import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from latentflow.artifacts import (
    atomic_file,
    atomic_folder,
    make_folder,
    read_json,
    read_tensors,
    require_writable,
    sha256_tensors,
    write_json,
    write_tensors,
    write_text,
)
from latentflow.errors import ArtifactError


def test_an_interrupted_file_leaves_the_old_one_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError, match="power cut"), atomic_file(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError("power cut")
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_an_interrupted_folder_leaves_the_old_one_and_nothing_else(tmp_path):
    folder = tmp_path / "model"
    with atomic_folder(folder) as temporary:
        write_text(temporary / "a.txt", "old")
    with pytest.raises(RuntimeError, match="power cut"), atomic_folder(folder) as temporary:
        write_text(temporary / "a.txt", "new")
        raise RuntimeError("power cut")
    assert (folder / "a.txt").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "model"
    for name in ("first", "second"):
        with atomic_folder(folder) as temporary:
            write_text(temporary / name, name)
    assert [entry.name for entry in folder.iterdir()] == ["second"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_below_a_file_is_refused(tmp_path):
    write_text(tmp_path / "file", "")
    with pytest.raises(ArtifactError, match=r"cannot create the folder .*file/below"):
        make_folder(tmp_path / "file" / "below")


def test_json_round_trip_and_refusal_of_nan(tmp_path):
    write_json(tmp_path / "a.json", {"name": "épée", "values": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"name": "épée", "values": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("content", ["{", "\x00\x01"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_tensors_round_trip_bit_for_bit(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(1.5, dtype=torch.float16)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    found = read_tensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_a_truncated_tensor_file_is_named(tmp_path):
    file = tmp_path / "t.safetensors"
    write_tensors(file, {"a": torch.randn(100)})
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match=r"t\.safetensors is truncated or not a safetensors file"):
        read_tensors(file)


def test_a_missing_tensor_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"absent\.safetensors does not exist"):
        read_tensors(tmp_path / "absent.safetensors")


def test_the_hash_of_tensors_is_of_their_values_not_of_their_storage():
    values = torch.randn(4, 4).half()
    assert sha256_tensors({"w": values}) == sha256_tensors({"w": values.float()})
    assert sha256_tensors({"w": values}) == sha256_tensors({"w": values.t().contiguous().t()})
    assert sha256_tensors({"w": values}) != sha256_tensors({"v": values})
    assert sha256_tensors({"w": values}) != sha256_tensors({"w": values.reshape(2, 8)})
    assert sha256_tensors({"w": values}) != sha256_tensors({"w": values + 1})


def test_what_a_killed_writer_left_is_removed(tmp_path):
    """Also by a writer with the same process id, as in a container that is started again."""
    for number in (os.getpid(), 1):
        (tmp_path / f".model.{number}.tmp").mkdir()
        (tmp_path / f".model.{number}.tmp" / "half.bin").write_bytes(b"half")
    (tmp_path / ".model.1.old").mkdir()
    (tmp_path / ".model-b.1.tmp").mkdir()  # belongs to another folder
    with atomic_folder(tmp_path / "model") as temporary:
        write_text(temporary / "a.txt", "whole")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["a.txt"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".model-b.1.tmp", "model"]


def test_a_folder_that_was_retired_by_a_killed_writer_comes_back(tmp_path):
    """Killed between its two renames, a writer leaves the old folder under a hidden name."""
    (tmp_path / ".model.1.old").mkdir()
    (tmp_path / ".model.1.old" / "a.txt").write_text("old")
    with pytest.raises(RuntimeError, match="power cut"), atomic_folder(tmp_path / "model"):
        raise RuntimeError("power cut")
    assert (tmp_path / "model" / "a.txt").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_full(tmp_path):
    """A limit on the size of files stands in for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(ArtifactError, match=r"cannot write .*a\.safetensors"):
            write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(10_000)})
        with pytest.raises(ArtifactError, match=r"cannot write .*a\.txt"):
            write_text(tmp_path / "a.txt", "x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="permission denied"):
            write_text(tmp_path / "a.txt", "x")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_the_system_refuses():
    with pytest.raises(ArtifactError, match="/proc/nope"):
        make_folder("/proc/nope")


def test_a_place_is_looked_at_without_touching_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    require_writable(tmp_path / "new" / "deep" / "picture.PNG", suffix=".png")
    require_writable(tmp_path / "new" / "folder")
    require_writable("relative.png", suffix=".png")
    for path, suffix, said in (
        (tmp_path / "picture.jpg", ".png", r"picture\.jpg must end in \.png"),
        (tmp_path / "folder.png", ".png", r"folder\.png: it is a folder"),
        (tmp_path / "file" / "below.png", ".png", "file is a file"),
        (tmp_path / "file" / "below", None, "file is a file"),
    ):
        with pytest.raises(ArtifactError, match=said):
            require_writable(path, suffix=suffix)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_files_get_the_usual_permissions(tmp_path):
    """safetensors alone would make them readable by their owner only."""
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    write_tensors(tmp_path / "one.safetensors", {"x": torch.zeros(1)})
    with atomic_folder(tmp_path / "folder") as folder:
        save_file({"x": torch.zeros(1)}, folder / "raw.safetensors")
        (folder / "below").mkdir()
        (folder / "below" / "text").write_text("x")
    files = [tmp_path / "one.safetensors", tmp_path / "folder" / "raw.safetensors", tmp_path / "folder/below/text"]
    assert [file.stat().st_mode for file in files] == [usual] * 3
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["below", "raw.safetensors"]

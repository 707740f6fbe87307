import os
import re
import resource
import signal
from itertools import count
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

from latentflow import artifacts
from latentflow.artifacts import (
    atomic_file,
    atomic_folder,
    contents,
    json_line,
    make_folder,
    open_tensors,
    read_json,
    read_tensors,
    remove_folder,
    remove_leftovers,
    require_apart,
    require_writable,
    restore,
    sha256_tensors,
    verify_checksums,
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


def killed(act) -> None:
    """Call `act` in a process that ends as by a kill: whatever it does last, nothing is tidied up."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(9)
    os.waitpid(child, 0)


def half_written(folder: Path) -> None:
    """Begin to write a file and a folder, and be killed."""

    def write():
        with atomic_file(folder / "metrics.json") as file, atomic_folder(folder / "model") as model:
            file.write_text("half")
            (model / "half.bin").write_bytes(b"half")
            os._exit(9)

    killed(write)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    half_written(tmp_path)
    half_written(tmp_path / "checkpoints")
    with atomic_folder(tmp_path / "model") as temporary:
        write_text(temporary / "a.txt", "whole")
        assert len(list(tmp_path.iterdir())) == 4  # two of the dead, ours, and checkpoints
        assert contents(tmp_path) == [tmp_path / "checkpoints"]
        remove_leftovers(tmp_path)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([temporary.name, "checkpoints"])
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["a.txt"]
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["a.txt", "checkpoints", "model"]


def test_what_others_are_writing_stays(tmp_path):
    """Of living processes and other machines, and what only looks like it; not of an earlier one with our number."""
    with atomic_folder(tmp_path / "a") as temporary:
        (host,) = re.fullmatch(r"\.a\.(\w+)-\d+-\d+\.tmp", temporary.name).groups()
    (tmp_path / "a").rmdir()
    living = [f".a.{host}-{os.getppid()}-0.tmp", f".a.{host}-1-0.tmp.json", ".a.elsewhere-999999999-0.tmp"]
    strange = [".a.tmp", ".hidden", f".a.{host}-x-0.tmp", "a.tmp"]
    for name in (*living, *strange):
        (tmp_path / name).touch()
    (tmp_path / f".a.{host}-{os.getpid()}-999999.tmp").touch()  # as in a container that is started again
    (tmp_path / f".a.{host}-{10**30}-0.tmp").touch()
    remove_leftovers(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*living, *strange])
    assert [entry.name for entry in contents(tmp_path)] == sorted(strange)


@pytest.fixture(params=["exchange", "two renames"])
def replacing(request, monkeypatch):
    """Folders are replaced in both ways: where the system can exchange names, and where it cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(artifacts, "_exchange", lambda one, other: False)
    return request.param


@pytest.mark.usefixtures("replacing")
def test_a_kill_at_any_call_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch):
    """Killed at each call that changes names in turn."""
    folder = tmp_path / "model"
    with atomic_folder(folder) as temporary:
        write_text(temporary / "a.txt", "old")
    counted = ["replace", "rename", "unlink", "rmdir"]
    true = {name: getattr(os, name) for name in counted}
    found = []
    for last in range(40):
        calls = count()

        def counting(call, last=last, calls=calls):
            def stand_in(*args, **options):
                if next(calls) == last:
                    os._exit(9)
                return call(*args, **options)

            return stand_in

        def write():
            for name in counted:
                setattr(os, name, counting(true[name]))
            with atomic_folder(folder) as temporary:
                write_text(temporary / "a.txt", "new")
            os._exit(0)

        killed(write)
        restore(folder)
        found.append((folder / "a.txt").read_text())
        remove_leftovers(tmp_path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
        with atomic_folder(folder) as temporary:
            write_text(temporary / "a.txt", "old")
    assert found == sorted(found, key=["old", "new"].index)
    assert set(found) == {"old", "new"}


def test_a_folder_is_there_at_every_moment(tmp_path):
    """Another process that looks all the time never misses it."""
    folder = tmp_path / "model"
    with atomic_folder(folder) as temporary:
        write_text(temporary / "a.txt", "whole")
    if not artifacts._exchange(folder, folder):
        pytest.skip("this file system cannot exchange two names")
    child = os.fork()
    if child == 0:
        for _ in range(300):
            with atomic_folder(folder) as temporary:
                (temporary / "a.txt").write_text("whole")
        os._exit(0)
    looks = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        assert folder.is_dir()
        looks += 1
    assert looks > 100


def test_a_kill_inside_safetensors_leaves_nothing(tmp_path):
    """It writes under a temporary name of its own choice, as large as the file."""

    def write():
        def begin(tensors, file, metadata):
            (file.parent / ".tmpAbCdEf").write_bytes(b"half")
            os._exit(9)

        safetensors.torch.save_file = begin
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})

    killed(write)
    assert [file.read_bytes() for file in tmp_path.rglob(".tmpAbCdEf")] == [b"half"]
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_deleted_whole_or_not_at_all(tmp_path, monkeypatch):
    """A kill while it is deleted leaves no half of it under its name."""
    (tmp_path / "step").mkdir()
    for name in "abc":
        (tmp_path / "step" / name).touch()

    def delete():
        true = os.unlink
        os.unlink = lambda *args, **options: (true(*args, **options), os._exit(9))
        remove_folder(tmp_path / "step")

    killed(delete)
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".step.")
    assert len(list(left.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


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
    """safetensors by itself would make them readable only by their owner."""
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


def test_results_may_not_become_data(tmp_path):
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(data)
    (tmp_path / "file.zip").touch()
    for out in (data, data / "run", tmp_path / "alias" / "a" / "run", data / "a" / ".." / "b"):
        with pytest.raises(ArtifactError, match="and would become part of it; choose another place"):
            require_apart(out, None, tmp_path / "elsewhere", data)
    require_apart(tmp_path / "data2", data, tmp_path / "file.zip", "synthetic:9", None)
    require_apart(tmp_path, data)
    (tmp_path / "run" / "model" / "images").mkdir(parents=True)
    require_apart(tmp_path / "run", tmp_path / "run" / "data", replaced=("model",))
    with pytest.raises(ArtifactError, match=r"images lies inside .*model, which is overwritten; choose another place"):
        require_apart(tmp_path / "run", tmp_path / "run" / "model" / "images", replaced=("model",))


def flipped(file: Path, place: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)


def test_every_flipped_bit_of_a_tensor_file_is_noticed(tmp_path):
    """In the data, in the header, in the metadata and in the checksums themselves."""
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(3), "c": torch.zeros(0, 4), "d": torch.tensor(1.5).half()}
    file = tmp_path / "t.safetensors"
    write_tensors(file, tensors, {"rows": "0 256"})
    whole = file.read_bytes()
    used = []
    for place in range(8 * len(whole)):
        flipped(file, place)
        try:
            found = read_tensors(file)
        except ArtifactError as error:
            assert "\n" not in str(error)
        else:
            same = found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in tensors)
            used.append(same and open_tensors(file).metadata().get("rows") == "0 256")
        file.write_bytes(whole)
    assert all(used)  # a bit that changes nothing, such as one in the padding


@pytest.mark.parametrize("value", [1e30, float("nan"), 0.0])
def test_a_planted_value_is_named(tmp_path, value):
    file = tmp_path / "t.safetensors"
    write_tensors(file, {"fine": torch.ones(3), "bad": torch.ones(4)})
    with open_tensors(file) as opened:
        metadata = opened.metadata()
    save_file({"fine": torch.ones(3), "bad": torch.tensor([1.0, 1.0, value, 1.0])}, file, metadata=metadata)
    with pytest.raises(ArtifactError, match=r"t\.safetensors is damaged: tensor 'bad' does not match"):
        read_tensors(file)
    verify_checksums(False)
    try:
        assert read_tensors(file)["bad"][0] == 1
    finally:
        verify_checksums(True)


def test_files_without_checksums_are_read(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "old.safetensors")
    assert torch.equal(read_tensors(tmp_path / "old.safetensors")["x"], torch.ones(3))


def test_a_line_of_json_has_no_numbers_that_json_does_not_know():
    line = json_line({"loss": float("nan"), "rows": [1.5, float("inf"), {"low": float("-inf")}], "name": "nan"})
    assert line == '{"loss": null, "rows": [1.5, null, {"low": null}], "name": "nan"}'

"""Files that appear complete or not at all, and are never unpickled.

Everything is written under a temporary name in the same folder, synced, and renamed into place.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentflow.errors import ArtifactError

LOCK = ".lock"
"""The suffix of a lock file, before the rank of its process: ".lock.0", ".report.json.lock.0"."""

_LOCK_FILE = re.compile(rf"(\..+)?{re.escape(LOCK)}\.\d+", re.DOTALL)
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>\w+)-(?P<pid>\d+)-\d+\.(?P<kind>tmp|old)(\.\w+)?", re.DOTALL)
_HOST = re.sub(r"\W", "_", socket.gethostname())[:32]
_numbers = count()
_mine: set[str] = set()  # temporary names in use by this process


@contextmanager
def atomic_file(path: str | Path, *, sync_folder: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success sync it and rename it to `path`.

    On an exception the temporary file is removed and `path` is unchanged. The temporary name has the same suffix, so
    that libraries which look at it write the right format.

    Args:
        sync_folder: also sync the folder, so that the new name survives a power cut; of many files only the last needs
            it. The file is complete or absent either way.

    Raises:
        ArtifactError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    make_folder(path.parent)
    with _temporary(path, "tmp", path.suffix) as temporary, writing(path):
        mode = _usual_mode(temporary)
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        sync(temporary)
        temporary.replace(path)
        if sync_folder:
            sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder next to `path`; on success rename it to `path`, replacing what was there.

    Where the system can exchange two names atomically, `path` exists at every moment. Elsewhere a kill between two
    renames leaves the old folder under a hidden name, and `restore` puts it back.

    Raises:
        ArtifactError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    make_folder(path.parent)
    restore(path)
    with _temporary(path, "tmp") as temporary, _temporary(path, "old") as retired, writing(path):
        temporary.mkdir()
        mode = _usual_mode(temporary / ".mode")
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and file.stat().st_nlink == 1:  # a hard link also belongs to another folder
                file.chmod(mode)
            sync(file)
        if not path.exists():
            temporary.replace(path)
        elif not _exchange(temporary, path):
            path.replace(retired)
            try:
                temporary.replace(path)
            except OSError:
                retired.replace(path)
                raise
        sync(path.parent)


def restore(path: str | Path) -> None:
    """Put back a folder that a writer had renamed to make room for a new one before it was killed."""
    path = Path(path)
    with suppress(OSError):
        if not path.exists():
            for entry in path.parent.iterdir():
                if (found := _left_behind(entry)) and found["kind"] == "old" and found["name"] == path.name:
                    entry.replace(path)
                    return


def remove_folder(path: str | Path) -> None:
    """Delete a folder; a kill never leaves half of it under its name."""
    with _temporary(Path(path), "tmp") as temporary, writing(path, "delete"):
        Path(path).replace(temporary)


def remove_leftovers(folder: str | Path, *, depth: int = 2) -> None:
    """Delete half-written files and folders of killed processes of this machine.

    Args:
        depth: how many levels of sub-folders to search.
    """
    with suppress(OSError):
        for entry in list(Path(folder).iterdir()):
            if found := _left_behind(entry):
                restore(entry.with_name(found["name"]))
                _remove(entry)
            elif depth and entry.is_dir() and not entry.is_symlink():
                remove_leftovers(entry, depth=depth - 1)


def contents(folder: str | Path) -> list[Path]:
    """The entries of a folder without locks and half-written files, sorted."""
    hidden = (_LOCK_FILE, _TEMPORARY)
    return sorted(entry for entry in Path(folder).iterdir() if not any(name.fullmatch(entry.name) for name in hidden))


@contextmanager
def writing(path: str | Path, doing: str = "write") -> Iterator[None]:
    """Turn errors of the system while writing `path`, such as a full disk, into an `ArtifactError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
            number = int(found[1])
        why = os.strerror(number).lower() if number else str(error)
        raise ArtifactError(f"cannot {doing} {path}: {why}{_REMEDIES.get(number, '')}") from error


_REMEDIES = {
    errno.ENOSPC: "; free some space and repeat the command",
    errno.EDQUOT: "; free some space and repeat the command",
    errno.EFBIG: "; choose a place that takes larger files",
    errno.EROFS: "; choose another place",
    errno.EACCES: "; choose another place",
    errno.ENOENT: ": its folder is gone; repeat the command",
    errno.EMFILE: "; allow more with `ulimit -n`",
}


@contextmanager
def _temporary(path: Path, kind: str, suffix: str = "") -> Iterator[Path]:
    """A hidden name next to `path` that contains the id of the process; deleted at the end of the context."""
    stem = path.name.removesuffix(suffix)
    temporary = path.with_name(f".{stem}.{_HOST}-{os.getpid()}-{next(_numbers)}.{kind}{suffix}")
    _mine.add(temporary.name)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _mine.discard(temporary.name)


def _left_behind(entry: Path) -> re.Match[str] | None:
    """The parsed name of a temporary file or folder, if its process was of this machine and is dead."""
    found = _TEMPORARY.fullmatch(entry.name)
    if not found or found["host"] != _HOST or entry.name in _mine:
        return None
    number = int(found["pid"])
    if number == os.getpid():  # an earlier process with the same id, as in a restarted container
        return found
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return found
    except OSError:
        return None
    return None


def _remove(entry: Path) -> None:
    with suppress(OSError):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically (renameat2, on macOS renamex_np); false if the system or file system cannot."""
    names, at_working_folder, exchange = (os.fsencode(one), os.fsencode(other)), -100, 2
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return library.renamex_np(*names, exchange) == 0
        return library.renameat2(at_working_folder, names[0], at_working_folder, names[1], exchange) == 0
    except (OSError, AttributeError):
        return False


def make_folder(path: str | Path) -> Path:
    """Create `path` and its parents if they are missing, and make sure that files can be written there.

    Raises:
        ArtifactError: a file stands in the way, or the place is read-only.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot create the folder {path}: {error.strerror}; choose another place") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot write into {path}: permission denied; choose another place")
    return path


def _usual_mode(unused: Path) -> int:
    """The permissions of a new file; `unused` is a name that does not exist yet."""
    unused.touch()
    mode = stat.S_IMODE(unused.stat().st_mode)
    unused.unlink()
    return mode


def require_writable(path: str | Path, *, suffix: str | None = None) -> Path:
    """Refuse a file (or, without `suffix`, a folder) that cannot be written; nothing is created.

    Args:
        suffix: the required suffix of the file, for example ".png".

    Raises:
        ArtifactError: it has another suffix, something else is in the way, or the place is read-only.
    """
    path = Path(path)
    if suffix is not None:
        if path.is_dir():
            raise ArtifactError(f"cannot write the file {path}: it is a folder; give the name of a {suffix} file")
        if path.suffix.lower() != suffix:
            raise ArtifactError(f"{path} must end in {suffix}: the file is written in that format, whatever its name")
    folder = path if suffix is None else path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        wanted = path if suffix is None else path.parent
        raise ArtifactError(f"cannot create the folder {wanted}: {folder} is a file; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot write {path}: permission denied in {folder}; choose another place")
    return path


def require_apart(out: str | Path, *data: str | Path | None, replaced: Sequence[str] = ()) -> None:
    """Refuse to write results into a folder of data, of which they would become part; nothing is created.

    Args:
        data: what is read; only folders matter, links are followed.
        replaced: folders inside `out` that are overwritten, and may not contain data either.

    Raises:
        ArtifactError: `out` lies inside `data`, or data inside what is replaced.
    """
    place = Path(out).resolve()
    for source in filter(None, data):
        folder = Path(source).resolve()
        if place.is_relative_to(folder) and folder.is_dir():
            raise ArtifactError(f"{out} lies inside {source} and would become part of it; choose another place")
        if part := next((name for name in replaced if folder.is_relative_to(place / name)), None):
            raise ArtifactError(f"{source} lies inside {Path(out) / part}, which is overwritten; choose another place")


def require_new(folder: str | Path) -> Path:
    """Refuse a folder that is not empty or cannot be created; nothing is created.

    Raises:
        ArtifactError: saying which.
    """
    folder = require_writable(folder)
    if folder.exists() and (found := contents(folder)):
        names = ", ".join(entry.name for entry in found[:3])
        raise ArtifactError(f"{folder} is not empty ({names}, ...); delete its contents or give a new folder")
    return folder


def write_text(path: str | Path, text: str) -> None:
    r"""Write `text` as UTF-8, complete or not at all. Bytes of file names that are not UTF-8 become \udc80 to
    \udcff."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # which JSON reads back unchanged


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, complete or not at all. NaN is refused, since it is not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def json_line(value: Any) -> str:
    """`value` as one line of JSON; non-finite numbers, which JSON does not have, become null."""
    return json.dumps(_with_nulls(value), allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_nulls(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}); the file is damaged or of another kind") from error


def checksum_of(value: Any) -> int:
    """The CRC-32 of a JSON value, independent of formatting."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors, complete or not at all, with a checksum of each in the metadata."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = dict(metadata or {})
    metadata[_CHECKSUMS] = json.dumps(
        {"": _metadata_checksum(metadata)} | {name: _checksum(name, tensor) for name, tensor in contiguous.items()},
        sort_keys=True,
    )
    path = Path(path)
    with atomic_file(path) as temporary, _temporary(path, "tmp") as folder:
        folder.mkdir()  # safetensors has a temporary file of its own, of which a kill would leave an unknown name
        safetensors.torch.save_file(contiguous, folder / path.name, metadata=metadata)
        (folder / path.name).replace(temporary)
        _sort_metadata(temporary)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file on the CPU, memory-mapped, and verify it; see `checked_tensors`.

    Raises:
        ArtifactError: the file is missing, truncated, damaged, or not safetensors.
    """
    with open_tensors(path) as file:
        return checked_tensors(file, path)


def checked_tensors(file: safe_open, path: str | Path) -> dict[str, Tensor]:
    """Every tensor of an opened safetensors file, compared with its checksum if the file has checksums.

    A checksum is the CRC-32 of name, dtype, shape and bytes; it detects every burst of up to 32 changed bits.

    Raises:
        ArtifactError: the file has changed since it was written.
    """
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    metadata = dict(file.metadata() or {})
    if _CHECKSUMS not in metadata or not _verify:
        return tensors
    try:
        expected = dict(json.loads(metadata.pop(_CHECKSUMS)))
    except (ValueError, TypeError):
        raise _damaged(path, "its checksums") from None
    if expected.pop("", None) != _metadata_checksum(metadata):
        raise _damaged(path, "its metadata")
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in tensors or expected.get(name) != _checksum(name, tensors[name]):
            raise _damaged(path, f"tensor {name!r}")
    return tensors


def verify_checksums(wanted: bool) -> None:
    """Switch the comparison with checksums on or off for everything read from now on; it is on by default."""
    global _verify
    _verify = wanted


def verifies() -> bool:
    """Whether checksums are compared."""
    return _verify


def _sort_metadata(file: Path) -> None:
    """Sort the metadata, whose order safetensors leaves to chance, so that equal contents are equal bytes."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            opened.seek(8)
            opened.write(text.ljust(size))


_CHECKSUMS = "crc32"
_verify = True


def _checksum(name: str, tensor: Tensor) -> int:
    """The CRC-32 of a contiguous tensor."""
    begun = zlib.crc32(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), begun) if tensor.numel() else begun


def _metadata_checksum(metadata: Mapping[str, str]) -> int:
    return checksum_of(dict(metadata))


def _damaged(path: str | Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path} is damaged: {what} does not match its checksum; copy, download or create the file again"
    )


def open_tensors(path: str | Path) -> safe_open:
    """Open a safetensors file for lazy, memory-mapped reading.

    Raises:
        ArtifactError: the file is missing, truncated, or not safetensors.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        if not Path(path).exists():
            raise ArtifactError(f"{path} does not exist") from error
        _refuse_pointer(path)
        raise ArtifactError(f"{path} is truncated or not a safetensors file ({error})") from error


def read_torch_file(path: str | Path) -> Any:
    """Read a foreign .pth or .pt file as plain data: tensors, numbers, text, lists, dicts, argparse's namespaces.

    Nothing in it is executed; a file with anything else is refused. Only this function reads torch's own format.

    Raises:
        ArtifactError: the file is missing, truncated, of another kind, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; give the path of a checkpoint file")
    try:
        # a Namespace only has attributes
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles, which are then refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers of damaged files raise nearly anything
        _refuse_pointer(path)
        wanted = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if wanted:
            raise ArtifactError(
                f"{path} would run {wanted[1]} while it is read, which is refused; save only its weights "
                "(a state_dict, best as .safetensors) with the program that wrote it"
            ) from error
        raise ArtifactError(
            f"{path} is truncated, or not a file of tensors written by torch.save (other pickles are never "
            "loaded); download it again, or save only its weights with the program that wrote it"
        ) from error


def _refuse_pointer(path: str | Path) -> None:
    """Refuse the pointer that Git LFS leaves in place of a file that it has not fetched."""
    with suppress(OSError), Path(path).open("rb") as file:
        if file.read(64).startswith(b"version https://git-lfs"):
            raise ArtifactError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 over names, shapes and float32 values, independent of file format and stored precision."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name}:{list(tensor.shape)};".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

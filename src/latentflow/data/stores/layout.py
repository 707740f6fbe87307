"""What the folders of a data set mean: which are classes, which are splits, and which files are skipped."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from latentflow.console import notice
from latentflow.errors import DataError

_SPLIT = re.compile(
    r"(train(ing|val)?|val(id(ation)?)?|minival|test(ing)?|eval(uation)?|dev|hold[-_ ]?out|unlabell?ed)"
    r"([-_ ]?(set|split|data|images?|imgs))?[-_ ]?(\d*|[ab])|images(tr|ts)",  # trainA: unpaired sets; imagesTr: nnU-Net
    re.IGNORECASE,
)
_PICTURES = re.compile(
    r"(jpeg|png|rgb|colou?r|input)?[-_ ]?(images?|imgs?|pictures?|photos?)|rgb|leftimg8bit", re.IGNORECASE
)
_MAPS = re.compile(
    r"((png|class|semantic|pixel|seg)[-_ ]?)?(masks?|labels?|labelmaps?|annotations?|trimaps?|ground[-_ ]?truths?)"
    r"|segmentations?([-_ ]?(class|object|masks?|maps?)(png|raw|aug)?)?|segmaps?|gt(fine|coarse)?",
    re.IGNORECASE,
)
_CONVERT, _UNPACK, _CUT = "save them as JPEG or PNG", "unpack them", "save their frames as images"
_UNREAD = dict.fromkeys((".heic", ".heif", ".hif", ".dcm"), f"{_CONVERT}, or install latentflow[data]")
_UNREAD |= dict.fromkeys((".jxl", ".psd", ".psb", ".xcf", ".svg", ".eps", ".ai"), _CONVERT)
_UNREAD |= dict.fromkeys((".exr", ".hdr", ".dds", ".ico", ".qoi", ".fits", ".pcx", ".sgi", ".jxr"), _CONVERT)
_UNREAD |= dict.fromkeys((".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".dng", ".raf", ".orf", ".rw2"), _CONVERT)
_UNREAD |= dict.fromkeys((".pef", ".srw", ".raw", ".3fr", ".j2k", ".jpc", ".jpx", ".jpf", ".wdp"), _CONVERT)
_UNREAD |= dict.fromkeys((".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"), _UNPACK)
_UNREAD |= dict.fromkeys((".mov", ".mp4", ".m4v", ".avi", ".mkv", ".webm"), _CUT)
_MARKS = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp"))
_MARKS += ((b"II*\0", ".tif"), (b"MM\0*", ".tif"))
_LOOKED_AT = 16  # files of one suffix in one folder
_NAMED = 5

FirstBytes = Callable[[str], bytes]
"""The first bytes of the file of that name."""


def split_of(name: str) -> str:
    """The split that a path names: train of "data/train-00000-of-00002.parquet" and of "train/0000.parquet"; or "".

    The last part of the path that names one counts.
    """
    for part in reversed(os.path.splitext(name)[0].split("/")):  # noqa: PTH122
        word = re.match(r"[A-Za-z]*", part)[0]
        if _SPLIT.fullmatch(word):
            return word
    return ""


def class_folders(names: Iterable[str], where: Path, prefix: str, has_maps: bool) -> tuple[str, ...]:
    """The sorted class folders of images; empty if all images are at the top level.

    Args:
        names: of the images, below `prefix`.
        where: the path that the user gave.
        prefix: the folder that wraps all images, with its trailing slash.

    Raises:
        DataError: there are images next to class folders, a folder is named like a split, or one holds maps of another.
    """
    tops, inner, loose = set(), set(), 0
    for name in names:
        top, *below = name.split("/")
        tops |= {top} if below else set()
        inner |= {below[0]} if len(below) > 1 else set()
        loose += not below
    if tops and loose:
        raise DataError(
            f"{where} has {loose} images next to {len(tops)} sub-folders with images ({_some(tops)}): "
            "put every image into a class folder, or all of them into one folder without labels"
        )
    if splits := sorted(filter(_SPLIT.fullmatch, tops)):
        train = next((top for top in splits if top.lower().startswith("train")), splits[0])
        remedy = f"give one of them, such as {where / prefix / train}, unpacked if need be"
        if has_maps:
            remedy = f"run `latentflow prepare camvid {where} --out DST` and give DST/{splits[0]}"
        others = "" if len(splits) == len(tops) else f" next to {_some(tops - set(splits))}"
        way_out = f"; if {splits[0]} is a class like the others, rename it, for example to {splits[0]}_class"
        raise DataError(
            f"{where} holds the splits {_some(splits)}{others}, not classes: {remedy}{way_out if others else ''}"
        )
    pictures, maps = (sorted(filter(kind.fullmatch, tops)) for kind in (_PICTURES, _MAPS))
    if pictures and maps and not has_maps:
        raise DataError(
            f"{where} holds pictures and their maps ({pictures[0]}, {maps[0]}), not classes: give "
            f"{where / prefix / pictures[0]}, unpacked if need be, to do without maps; to learn from them, rename the "
            "two to images and masks and add a classes.json; if they are classes, rename one, for "
            f"example to {maps[0]}_class"
        )
    if len(splits := sorted(filter(_SPLIT.fullmatch, inner))) > 1 and tops:
        notice(f"{where}: the splits {_some(splits)} inside the class folders are merged into one set")
    return tuple(sorted(tops))


def notice_skipped(
    others: Iterable[str], folders: Iterable[str], classes: Sequence[str], prefix: str, where: Path, mark: FirstBytes
) -> None:
    """Print which pictures and folders are skipped, and how they could be used.

    Args:
        others: names of the files that are skipped.
        folders: names of all folders.
        classes: the class folders below `prefix`, if any.
        mark: returns the first bytes of a file.

    Raises:
        DataError: a folder next to the classes has pictures, but none in a format that is read.
    """
    unread = unread_pictures(others, mark)
    taken = prefix.rstrip("/").split("/") if prefix else []
    candidates: dict[str, list[str]] = defaultdict(list)  # folders that could be classes, with their unread pictures
    for name in folders:
        parts = name.split("/")
        level = len(parts) - 1
        is_sibling = level < len(taken) and parts[:level] == taken[:level] and parts[level] != taken[level]
        if is_sibling or (classes and level == len(taken) and parts[:level] == taken and parts[-1] not in classes):
            candidates[name] = []
    for name in unread:
        for folder in candidates:
            if name.startswith(f"{folder}/"):
                candidates[folder].append(name)
    for folder, names in candidates.items():
        if names:
            raise DataError(
                f"{where}: no image in the folder {folder} can be read: {counted({n: unread[n] for n in names})}; "
                "or remove the folder"
            )
    if candidates:
        notice(f"{where}: folders without images are not classes ({_some(candidates)})")
    if unread:
        notice(f"{where}: {len(unread)} files are skipped: {counted(unread)}")


def unread_pictures(names: Iterable[str], mark: FirstBytes) -> dict[str, tuple[str, str]]:
    """Files that hold pictures but are not read as images, with their suffix and the remedy.

    Files whose suffix says nothing are opened; of many in one folder only a few are, which stand for the others.
    """
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        folder, _, file = name.rpartition("/")
        groups[folder, os.path.splitext(file)[1].lower()].append(name)  # noqa: PTH122
    found = {}
    for (_, suffix), group in groups.items():
        if suffix in _UNREAD:
            found |= dict.fromkeys(group, (suffix, _UNREAD[suffix]))
            continue
        actual = {name: kind for name in group[:_LOOKED_AT] if (kind := _suffix_of(mark(name)))}
        if actual and len(group) > _LOOKED_AT:
            actual = dict.fromkeys(group, next(iter(actual.values())))
        found |= {name: (suffix, f"rename them to end in {kind}") for name, kind in actual.items()}
    return found


def counted(unread: dict[str, tuple[str, str]]) -> str:
    """For example "9 .heic (save them as JPEG or PNG), 1 without suffix (rename them to end in .jpg)"."""
    groups: dict[tuple[str, str], int] = defaultdict(int)
    for kind in unread.values():
        groups[kind] += 1
    return ", ".join(
        f"{count} {suffix if suffix.strip() == suffix else repr(suffix)} ({remedy})"
        if suffix
        else f"{count} without suffix ({remedy})"
        for (suffix, remedy), count in sorted(groups.items())
    )


def _suffix_of(mark: bytes) -> str | None:
    """The right suffix for the content of an image; None if it is not an image that is read."""
    if mark[:4] == b"RIFF" and mark[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for start, suffix in _MARKS if mark.startswith(start)), None)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")

"""Split a folder of images with class sub-folders in two: every n-th image of each class is held out.

    python benchmarks/ladder/split.py cifar10/train --every 5 --out cifar10/split

makes OUT/train and OUT/held_out of hard links, or of copies on another file system.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> dict[str, int]:
    """Split; returns the number of images on each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with class sub-folders")
    parser.add_argument("--every", type=int, default=5, help="one image in so many is held out")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args(arguments)
    if options.every < 2:
        raise SystemExit(f"--every {options.every}: give 2 or more, or no image is left to train on")
    if options.out.exists():
        raise SystemExit(f"--out {options.out} exists; choose a new folder")
    classes = sorted(folder for folder in options.data.iterdir() if folder.is_dir())
    if not classes:
        raise SystemExit(f"{options.data} has no sub-folders; their names are the classes")
    counts = {"train": 0, "held_out": 0}
    for folder in classes:
        for number, file in enumerate(sorted(folder.iterdir())):
            side = "held_out" if number % options.every == options.every - 1 else "train"
            target = options.out / side / folder.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:
                shutil.copyfile(file, target)
            counts[side] += 1
    print(", ".join(f"{count:,} in {options.out / side}" for side, count in counts.items()))
    return counts


if __name__ == "__main__":
    main()

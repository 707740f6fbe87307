"""Names of scores and of features, for the command line's help, which does not wait for torch."""

from __future__ import annotations

from pathlib import Path

NEIGHBOUR_SCORES = ("precision", "recall", "density", "coverage")
FEATURE_METRICS = ("fid", "kid", "is", *NEIGHBOUR_SCORES)
"""Scores of two sets of features; "fid" is the Fréchet distance of any features."""

PAIR_SCORES = ("psnr", "ssim")
DISCRIMINATIVE_SCORES = ("p-ids", "u-ids")
CLASS_ACCURACY = "class-accuracy"
METRICS: dict[str, tuple[str, ...]] = {
    "sample": (*FEATURE_METRICS, CLASS_ACCURACY),
    "reconstruction": (*FEATURE_METRICS, CLASS_ACCURACY, *PAIR_SCORES, "lpips"),
    "inpaint": (*FEATURE_METRICS, *DISCRIMINATIVE_SCORES, *PAIR_SCORES, "lpips", "psnr-hole", "ssim-hole"),
    "mask-to-image": (*FEATURE_METRICS, "miou"),
    "translate": (*FEATURE_METRICS, CLASS_ACCURACY, *PAIR_SCORES, "lpips", "psnr-input", "ssim-input"),
}
"""The metrics of each task; "fd" is another name of "fid"."""

USUAL_METRICS: dict[str, tuple[str, ...]] = {
    "sample": ("fid", "precision", "recall"),
    "reconstruction": ("fid", *PAIR_SCORES),
    "inpaint": ("fid", *DISCRIMINATIVE_SCORES, *PAIR_SCORES, "psnr-hole", "ssim-hole"),
    "mask-to-image": ("fid",),
    "translate": ("fid", *PAIR_SCORES, "psnr-input", "ssim-input"),
}
"""What is computed unless the user asks for something else."""

FEATURES = ("inception", "dinov2", "latents", "random")
JUDGE = "judge"
"""The name of features of one's own, which are given by the folder that `train-features` wrote."""
JUDGE_FILE = "judge.json"
FEATURE_PRECISIONS = ("fp32", "tf32", "bf16")

NEIGHBOURS = 10_000
"""The default for how many images of each kind precision, recall, density and coverage look at."""


def features_name(given: str) -> str:
    """The name of features as they are asked for: one of `FEATURES`, or `JUDGE` for the folder of a judge."""
    return given if given in FEATURES else JUDGE


def is_judge(given: str) -> bool:
    """Whether features are asked for by the folder of a finished judge."""
    return given not in FEATURES and (Path(given) / JUDGE_FILE).is_file()

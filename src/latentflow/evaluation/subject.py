"""What `latentflow evaluate` is given, checked before anything heavy: metrics, subject, and how its images are made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from latentflow.autoencoder import Autoencoder
from latentflow.data.items import ImageSource
from latentflow.data.pictures.decode import open_image, reason
from latentflow.data.sources.stored import ImageFiles
from latentflow.data.stores.files import FolderStore, Listing, ZipStore, is_image, open_store
from latentflow.errors import ArtifactError, ConfigError, DataError, nearest
from latentflow.evaluation.drawn_set import LABEL_POLICIES, set_request
from latentflow.evaluation.painted import Painting, plan_painting, require_same_classes
from latentflow.evaluation.real_images import RealImages
from latentflow.evaluation.reconstruction import open_autoencoder
from latentflow.metrics.evaluation_report import FEATURE_METRICS, ModelFacts, check_metrics
from latentflow.metrics.features.extractors import NAMES, FeatureExtractor, open_features
from latentflow.metrics.pairs import PairJudge
from latentflow.metrics.scores import require_enough
from latentflow.model.flow_model import CONFIG_FILE, FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.picture_file import facts_in, unlike, which, whose
from latentflow.sampling.picture_folder import GRID

PAIRS = ("psnr", "ssim")
JUDGED = ("p-ids", "u-ids")
METRICS: dict[str, tuple[str, ...]] = {
    "sample": FEATURE_METRICS,
    "reconstruction": (*FEATURE_METRICS, *PAIRS, "lpips"),
    "inpaint": (*FEATURE_METRICS, *JUDGED, *PAIRS, "lpips", "psnr-hole", "ssim-hole"),
    "mask-to-image": (*FEATURE_METRICS, "miou"),
}
"""What can be asked for, by task; "fd" is another name of "fid"."""

_USUAL = {
    "sample": ("fid", "precision", "recall"),
    "reconstruction": ("fid", *PAIRS),
    "inpaint": ("fid", *JUDGED, *PAIRS, "psnr-hole", "ssim-hole"),
    "mask-to-image": ("fid",),
}
USUAL_NUM = 50_000  # images of a published FID
_READERS = 8

Store = FolderStore | ZipStore


@dataclass(frozen=True)
class Subject:
    """Whose images are scored.

    Attributes:
        task: as in `EvaluationProtocol`, "images" aside.
        image_size: height and width of its images in pixels.
        device: where it is computed.
        facts: what a report says of it; weights are hashed when this is called.
        flow: the model that draws; None: nothing is drawn.
        samples: generated images in files; None: there are none.
        sample_rows: which of them.
        autoencoder: of the model, or on its own.
    """

    task: str
    image_size: int
    device: torch.device
    facts: Callable[[], ModelFacts]
    flow: FlowModel | None = None
    samples: ImageSource | None = None
    sample_rows: Sequence[int] = ()
    autoencoder: Autoencoder | None = None


@dataclass(frozen=True)
class ImagePlan:
    """How the images are made.

    Attributes:
        num: how many.
        labels: the policy, "none" where no class is told, "not known" of images in files.
        sampling: the preset, for the report.
        painting: of the tasks with pairs.
    """

    num: int
    labels: str
    sampling: dict[str, Any] = field(default_factory=dict)
    painting: Painting | None = None


def checked_words(
    task: str,
    reconstruction: bool,
    metrics: Sequence[str] | None,
    num: int | None,
    features: str,
    labels: str | None,
    resamples: int | None,
    neighbours: int,
) -> tuple[str, list[str]]:
    """The task and the metrics (none: the usual ones); the arguments are those of `evaluate`.

    Raises:
        ConfigError: one does not, naming the nearest that does.
    """
    tasks = ("sample", "inpaint", "mask-to-image")
    if task not in tasks:
        raise ConfigError(f"there is no task {task!r}: {nearest(task, tasks)}")
    if reconstruction and task != "sample":
        raise ConfigError(f"--reconstruction is of the autoencoder alone: leave --task {task} out")
    task = "reconstruction" if reconstruction else task
    asked = list(dict.fromkeys("fid" if name == "fd" else name for name in metrics or ()))
    for name in asked:
        if name not in METRICS[task]:
            raise ConfigError(f"there is no metric {name!r} of the task {task}: {nearest(name, METRICS[task])}")
    if features not in NAMES:
        raise ConfigError(f"there are no features {features!r}: {nearest(features, NAMES)}")
    if "is" in asked and features != "inception":
        raise ConfigError(f"the Inception Score is of the features 'inception', not of {features!r}: leave 'is' out")
    if num is not None and num < 2:
        raise ConfigError(f"number of images {num}: scores compare sets of images, so at least 2 are needed")
    if labels is not None and labels not in LABEL_POLICIES:
        raise ConfigError(f"there is no label policy {labels!r}: {nearest(labels, LABEL_POLICIES)}")
    if resamples is not None and (resamples < 0 or resamples == 1):
        raise ConfigError(f"{resamples} resamples: give 0 for none, or 2 and more; 200 are usual")
    if neighbours and neighbours < 6:
        raise ConfigError(f"neighbours among {neighbours} images: each needs 5, so give 6 and more, or 0 for all")
    return task, asked


def open_subject(model: str, task: str, image_size: int | None, runtime: Runtime) -> Subject:
    """A model, images or an autoencoder by name; the arguments are those of `evaluate`.

    Raises:
        ArtifactError, ConfigError, DataError: there is none, or not of the kind that the task needs.
    """
    if task == "reconstruction":
        autoencoder, image_size = open_autoencoder(model, image_size, runtime)
        facts = ModelFacts(name=autoencoder.reference, weights=autoencoder.content_hash)
        return Subject(task, image_size, autoencoder.device, lambda: facts, autoencoder=autoencoder)
    if image_size is not None:
        raise ConfigError("--image-size is of an autoencoder on its own, with --reconstruction; leave it out")
    if (found := _images_in(model)) is not None:
        if task == "mask-to-image":
            raise ConfigError(f"{model} is a set of images; the task mask-to-image draws its own: give a model")
        samples = _open_samples(model, *found)
        rows = [row for row in range(len(samples)) if not GRID.search(samples.name(row))]
        facts = ModelFacts(name=samples.description, weights=samples.fingerprint())
        given = (task, samples.image_size, runtime.device, lambda: facts)
        return Subject(*given, samples=samples, sample_rows=rows)
    flow = FlowModel.from_pretrained(model, runtime=runtime)

    def described() -> ModelFacts:
        training = flow.config.training.model_dump(mode="json")
        return ModelFacts(name=flow.reference, weights=flow.weights_hash, training=training)

    size = flow.config.image_size
    return Subject(task, size, flow.device, described, flow=flow, autoencoder=flow.autoencoder)


def _images_in(model: str) -> tuple[Store, Listing] | None:
    """What is in a set of images, a zip or a folder with images and without a model; None: it is a model, if anything.

    Raises:
        DataError: it cannot be listed.
    """
    path = Path(model)
    if path.suffix.lower() == ".zip":
        store = open_store(path)
        return store, store.listing()
    marks = (path / CONFIG_FILE, path / "model" / CONFIG_FILE, path / "recipe.yaml")
    if not path.is_dir() or any(mark.exists() for mark in marks):
        return None
    store = open_store(path)
    listing = store.listing()
    return (store, listing) if any(map(is_image, listing.files)) else None


def _open_samples(model: str, store: Store, listing: Listing) -> ImageSource:
    """Generated images in files, at their own size. Of each file only the beginning is read.

    Raises:
        DataError: they are not PNG, not square, of several sizes, of several sets, or drawn twice.
    """
    files = {name: file for name, file in sorted(listing.files.items()) if is_image(name) and not GRID.search(name)}
    side, facts = 0, {}
    if lossy := [name for name in files if not name.lower().endswith(".png")]:
        raise DataError(
            f"{model}: {lossy[0]} is no PNG: what JPEG and its like lose changes every score; save samples as PNG"
        )
    with ThreadPoolExecutor(_READERS) as pool, image_progress("looking at", len(files)) as on_images:
        heads = pool.map(lambda name: _head(store, files[name].path, name), files)
        for name, found in zip(files, heads, strict=True):
            if isinstance(found, Exception):
                raise DataError(f"{model}: cannot read {name}: {reason(found)}; draw it anew") from found
            (width, height), facts[name] = found
            side = side or width
            if (width, height) != (side, side):
                raise DataError(
                    f"{model}: {name} has {width} x {height} pixels; samples must be square and of one size, "
                    f"here {side} x {side}"
                )
            on_images(1)
    _require_one_set(model, facts)
    return ImageFiles(store, side or 1, listing=listing)


def _head(store: Store, path: str, name: str) -> tuple[tuple[int, int], dict[str, Any] | None] | Exception:
    """Width and height of a PNG, and what it says of itself; or what is wrong with it."""
    wrong: Exception = DataError(name)
    for read in (store.mark, store.read):  # what it says is longer than its first bytes only if somebody made it so
        try:
            content = read(path)
            if read == store.mark and b"IDAT" not in content:
                continue
            with open_image(content, name) as image:
                return image.size, facts_in(image)
        except Exception as error:  # damaged archives raise nearly anything
            wrong = error
    return wrong


def _require_one_set(model: str, facts: Mapping[str, dict[str, Any] | None]) -> None:
    """Refuse pictures that are not of one model and request, by what each of them says of itself.

    Raises:
        DataError: they are of several sets, some say nothing, or one is there twice.
    """
    sets: dict[str, list[str]] = {}
    for name, said in facts.items():
        sets.setdefault(json.dumps(whose(said), sort_keys=True) if said else "", []).append(name)
    if len(sets) > 1:
        most, other, *_ = sorted(sets.values(), key=len, reverse=True)
        one, two = facts[most[0]], facts[other[0]]
        how = unlike(one, two) if one and two else "it does not say what drew it" if one else f"{other[0]} does say it"
        raise DataError(
            f"{model} holds images of {len(sets)} sets, and no score is that of either: {len(most)} such as {most[0]}, "
            f"{len(other)} such as {other[0]} ({how}); put each set into a folder of its own"
        )
    known: dict[str, str] = {}
    for name, said in facts.items():
        if said and (first := known.setdefault(which(said), name)) != name:
            raise DataError(f"{model} holds one image twice, as {first} and as {name}: take one of them away")


def usual_metrics(subject: Subject, real: RealImages) -> list[str]:
    """What is computed unless the user says: all of it that can be."""
    usual = list(_USUAL[subject.task])
    if real.source is None:
        return ["fid"]
    return usual if subject.flow is not None else [name for name in usual if not name.endswith("-hole")]


def plan_images(
    subject: Subject,
    real: RealImages,
    metrics: Sequence[str],
    num: int | None,
    labels: str | None,
    masks: str | None,
    segmenter: str | None,
    judge: PairJudge,
    seed: int,
    preset: dict[str, Any],
) -> ImagePlan:
    """How the images are made; the arguments are those of `evaluate`.

    Raises:
        ConfigError, DataError: options that do not fit the task, the model or the images.
    """
    task, flow, paired = subject.task, subject.flow, subject.task != "sample"
    given = {
        "--masks": (masks, task == "inpaint" and flow is not None),
        "--segmenter": (segmenter, task == "mask-to-image"),
        "--labels": (labels, flow is not None),
        **{f"--{key.replace('_', '-')}": (value, flow is not None) for key, value in preset.items()},
    }
    for option, (value, fits) in given.items():
        if value is not None and not fits:
            raise ConfigError(f"{option} says nothing about this evaluation; leave it out")
    if flow is None and (alone := [name for name in metrics if name.endswith("-hole")]):
        raise ConfigError(f"{alone[0]}: images in files do not say where their holes were; leave it out")
    if "lpips" in metrics and judge.lpips is None:
        raise ConfigError(
            "lpips needs the weights of its network: --lpips FILE, or a folder (see metrics/features/lpips.py)"
        )
    if "miou" in metrics and segmenter is None:
        raise ConfigError("miou needs a network that finds maps in pictures: --segmenter package.module:function")
    if paired and real.source is None:
        raise ConfigError(f"the task {task} needs the images themselves, not {real.data}, their statistics")
    available = len(real.source) if paired else len(subject.sample_rows) if subject.samples is not None else None
    if available is not None and num is not None and num > available:
        raise DataError(f"--num {num}, but there are {available} images; leave it out to take all")
    chosen = num or available or USUAL_NUM
    if flow is None:
        return ImagePlan(chosen, "none" if paired else "not known")
    if paired:
        made = plan_painting(
            *(flow, real.source, task),
            labels=labels or "none",
            masks=masks,
            segmenter=segmenter,
            judge=judge,
            seed=seed,
            preset=preset,
        )
        policy = "data" if made.own_labels else "none"
        return ImagePlan(chosen, policy, made.request.sampling.model_dump(mode="json"), made)
    policy = labels or "balanced"
    shares = None
    if policy == "data" and flow.config.conditioning.num_classes:
        if real.source is None:
            raise ConfigError(f"labels 'data' need the labelled images themselves, not {real.data}, their statistics")
        require_same_classes(flow, real.source)
        shares = [1.0] * flow.config.conditioning.num_classes  # the true ones follow with the features
    request, label_of = set_request(flow, labels=policy, label_shares=shares, seed=seed, preset=preset)
    return ImagePlan(chosen, "none" if label_of(0) is None else policy, request.sampling.model_dump(mode="json"))


def check_scores(metrics: Sequence[str], num: int, real: RealImages, data: str | Path, features: str) -> None:
    """Refuse what cannot be computed, before features are.

    Raises:
        DataError: too few images for a score, or statistics of other features.
    """
    if real.source is None and real.stored.provenance.feature_name not in (features, "not known"):
        raise DataError(f"{data} was made with features {real.stored.provenance.feature_name}, not {features}")
    check_metrics(metrics, num, real.num_images)
    for name in metrics:
        if name in JUDGED:
            require_enough(name.replace("-", "_"), num)


def open_extractor(features: str, weights: str | Path | None, subject: Subject, precision: str) -> FeatureExtractor:
    """The feature network, on the subject's device; the arguments are those of `open_features`.

    Raises:
        ArtifactError: its weights are not there; names the features that need none.
        ConfigError: see `open_features`.
    """
    try:
        return open_features(
            features,
            weights=weights,
            autoencoder=subject.autoencoder,
            image_size=subject.image_size,
            device=subject.device,
            precision=precision,
        )
    except ArtifactError as error:
        if weights is not None:
            raise
        raise ArtifactError(f"{error}; or choose --features random or latents, which need no download") from error

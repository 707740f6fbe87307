"""Fixtures that many tests share; each is made once per session and must not be written to."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from latentflow import console
from latentflow.autoencoder import Autoencoder
from latentflow.commands import plan
from latentflow.data.sources.images import open_images
from latentflow.planning.probe import Speed
from latentflow.training.config import Recipe
from tests import tiny
from tests.tiny import write_cache

os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start: by another number of threads sums differ
torch.set_num_threads(1)

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published autoencoders and data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory) -> Iterator[None]:
    """What is remembered of files goes into a folder of the session's own, also in the commands that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTFLOW_CACHE", str(tmp_path_factory.mktemp("remembered")))
        yield


@pytest.fixture(autouse=True)
def untold() -> Iterator[None]:
    """Every test hears the notices that an earlier one has heard, and by the way that it asks for."""
    console._printed.clear()
    logger = logging.getLogger("latentflow")
    yield
    logger.propagate = True
    logger.handlers.clear()


@pytest.fixture(autouse=True)
def no_launch_of_another_test() -> Iterator[None]:
    """What accelerate keeps of a launch, or of one that failed, ends with its test."""
    yield
    if accelerate := sys.modules.get("accelerate"):
        accelerate.PartialState._reset_state()


@pytest.fixture(scope="session")
def kl_folder(tmp_path_factory) -> Path:
    """A variational autoencoder on disk."""
    folder = tmp_path_factory.mktemp("autoencoders") / "kl"
    tiny.kl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def deterministic_folder(tmp_path_factory) -> Path:
    """A deterministic autoencoder on disk."""
    folder = tmp_path_factory.mktemp("autoencoders") / "deterministic"
    tiny.deterministic().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def kl(kl_folder) -> Autoencoder:
    """The variational autoencoder, loaded."""
    return Autoencoder.from_pretrained(kl_folder)


@pytest.fixture(scope="session")
def deterministic(deterministic_folder) -> Autoencoder:
    """The deterministic autoencoder, loaded."""
    return Autoencoder.from_pretrained(deterministic_folder)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder of 3 classes with 6 images each."""
    return tiny.write_images(tmp_path_factory.mktemp("images") / "fruit")


@pytest.fixture(scope="session")
def cache(tmp_path_factory, images, kl) -> Path:
    """A complete latent cache of `images` with mirrored images, in shards of 5."""
    folder = tmp_path_factory.mktemp("caches") / "fruit"
    write_cache(open_images(images, tiny.IMAGE_SIZE), kl, folder, flips=True, shard_size=5)
    return folder


@pytest.fixture
def recipe(cache, kl_folder, tmp_path) -> Callable[..., Recipe]:
    """The tiny recipe on a latent cache, with some values changed."""

    def made(**given: Any) -> Recipe:
        data = {"path": cache, **given.pop("data", {})}
        return tiny.recipe(data=data, autoencoder=kl_folder, out=tmp_path / "run", **given)

    return made


@pytest.fixture
def unprobed(monkeypatch) -> None:
    """A made-up speed for plans, in tests that are about something else."""
    speed = Speed(0.5, 0.15, 0.1, 10**9, 6e9, "nothing", True)
    monkeypatch.setattr(plan, "probe", lambda config, runtime, **given: speed)


@pytest.fixture(scope="session")
def segmented(tmp_path_factory) -> Path:
    """Images of 3 classes with 4 images each, and their semantic maps."""
    return tiny.write_segmented(tmp_path_factory.mktemp("segmented") / "fruit")


@pytest.fixture(scope="session")
def segmented_cache(tmp_path_factory, segmented, kl) -> Path:
    """A latent cache of `segmented` with mirrored images and 3 mask variants, in shards of 5."""
    folder = tmp_path_factory.mktemp("caches") / "segmented"
    write_cache(open_images(segmented, tiny.IMAGE_SIZE), kl, folder, flips=True, shard_size=5, mask_variants=3)
    return folder


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (os.mknod, (str(self.file),))


@pytest.fixture
def bomb(tmp_path_factory) -> Iterator[Callable[[Path], Path]]:
    """Writes a pickle full of code to a path; the test fails if it ever goes off."""
    trace = tmp_path_factory.mktemp("traces") / "exploded"
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists(), "the bomb is a dud"
    trace.unlink()

    def write(file: Path) -> Path:
        file.write_bytes(pickle.dumps({"weight": Bomb(trace)}))
        return file

    yield write
    assert not trace.exists(), "a pickle was executed"

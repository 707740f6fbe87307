"""Two threads draw with one model: every picture is that of drawing alone, bit for bit."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.autoencoder import Autoencoder
from latentflow.runtime import LAUNCHING, Runtime, float32_products
from latentflow.sampling import guides
from latentflow.sampling.samples import Samples
from tests import tiny

ROUNDS = 3


def picture(seed: int) -> Image.Image:
    """Of 24 x 20 pixels, like no other."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def hole() -> np.ndarray:
    mask = np.zeros((20, 24), np.uint8)
    mask[6:14, 8:16] = 255
    return mask


def painted(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, (16, 16)).astype(np.uint8)


KINDS: dict[str, Callable[[LatentFlow, int], Samples]] = {
    "sample": lambda model, seed: model.sample(3, seed=seed, guidance=2, solver="heun"),
    "adaptive": lambda model, seed: model.sample(2, seed=seed, solver="bosh3", rtol=1e-2, atol=1e-2),
    "inpaint": lambda model, seed: model.inpaint(picture(seed), hole(), num=2, seed=seed, steps=3),
    "mask-to-image": lambda model, seed: model.mask_to_image(painted(seed), num=2, seed=seed, steps=3),
    "image-to-image": lambda model, seed: model.image_to_image(picture(seed), num=2, seed=seed, steps=3),
    "interpolate": lambda model, seed: model.interpolate(
        seeds=(seed, seed + 1), classes=["apple", "cherry"], num=3, steps=3
    ),
}


def opened(kl_folder) -> LatentFlow:
    """A model that nobody has drawn with, so that all that is computed at the first use is computed in the race."""
    return tiny.model(Autoencoder.from_pretrained(kl_folder), conditioning=tiny.SPATIAL)


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*tasks: Callable[[], object]) -> list[object]:
    """The results of tasks that begin at the same moment, each in a thread of its own."""
    gate = threading.Barrier(len(tasks))

    def begin(task: Callable[[], object]) -> object:
        gate.wait(60)
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(begin, tasks, timeout=300))


def equal(found: Samples, wanted: Samples) -> bool:
    return torch.equal(found.latents, wanted.latents) and torch.equal(found.pixels, wanted.pixels)


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.usefixtures("often")
def test_every_kind_beside_every_other(kl_folder, other):
    alone = opened(kl_folder)
    wanted = {kind: [draw(alone, 5 + turn) for turn in range(ROUNDS)] for kind, draw in KINDS.items()}
    assert not equal(wanted["sample"][0], wanted["sample"][1])
    shared = opened(kl_folder)

    def all_of(kind: str) -> list[Samples]:
        return [KINDS[kind](shared, 5 + turn) for turn in range(ROUNDS)]

    def every() -> list[list[Samples]]:
        return [all_of(kind) for kind in KINDS]

    beside, drawn = together(lambda: [all_of(other) for _ in KINDS], every)
    for kind, found in zip(KINDS, drawn, strict=True):
        assert all(map(equal, found, wanted[kind])), kind
    for found in beside:
        assert all(map(equal, found, wanted[other])), other


def test_a_model_is_loaded_while_another_draws(kl_folder, tmp_path):
    """Loading builds modules on the meta device, which must not reach the tensors of the other thread."""
    model = opened(kl_folder)
    model.save_pretrained(tmp_path / "model")
    wanted = [KINDS["sample"](model, seed) for seed in range(6)]
    drawn, loaded = together(
        lambda: [KINDS["sample"](model, seed) for seed in range(6)],
        lambda: [LatentFlow.from_pretrained(tmp_path / "model", device="cpu") for _ in range(4)],
    )
    assert all(map(equal, drawn, wanted))
    assert equal(KINDS["sample"](loaded[-1], 0), wanted[0])


def test_a_guide_is_opened_once(kl_folder, tmp_path, monkeypatch):
    model = opened(kl_folder)
    tiny.model(model.autoencoder, conditioning=tiny.SPATIAL, seed=1).save_pretrained(tmp_path / "guide")
    times, load = [], guides.FlowModel.from_pretrained
    monkeypatch.setattr(guides.FlowModel, "from_pretrained", lambda *a, **k: times.append(1) or load(*a, **k))
    guided = {"guide": str(tmp_path / "guide"), "guidance": 2, "seed": 3}
    first, second = together(*[lambda: model.sample(2, **guided)] * 2)
    assert len(times) == 1
    assert equal(first, second)
    assert not equal(first, model.sample(2, seed=3))


def test_the_widest_layer_is_measured_by_its_own_thread(kl_folder):
    """A large image that another thread encodes meanwhile would make slices, and so the rounding, others."""
    wanted = Autoencoder.from_pretrained(kl_folder)._widest
    fresh = Autoencoder(Autoencoder.from_pretrained(kl_folder).model, str(kl_folder))
    encode, large = fresh.model.encode, torch.zeros(1, 3, 256, 256)

    def slowly(*given, **options):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: encode(large)).result()
        return encode(*given, **options)

    fresh.model.encode = slowly
    assert fresh._widest == wanted


# What threads share on a GPU


def test_switches_for_float32_are_those_of_one_thread_at_a_time():
    found, inside = [], threading.Event()
    before = torch.get_float32_matmul_precision()

    def exact() -> None:
        inside.wait(60)
        with float32_products(tf32=False):
            found.append(torch.get_float32_matmul_precision())

    other = threading.Thread(target=exact)
    with float32_products(tf32=True):
        other.start()
        inside.set()
        other.join(0.2)
        assert found == []
        with float32_products(tf32=False):  # its own thread may nest them
            pass
        assert torch.get_float32_matmul_precision() == "high"
    other.join(60)
    assert found == ["highest"]
    assert torch.get_float32_matmul_precision() == before


def test_a_network_call_on_a_gpu_holds_the_switches():
    held = []

    def try_it() -> None:
        free = LAUNCHING.acquire(blocking=False)
        held.append(not free)
        if free:
            LAUNCHING.release()

    for device in ("cpu", "cuda"):
        with Runtime(torch.device(device)).float32_policy():
            thread = threading.Thread(target=try_it)
            thread.start()
            thread.join(60)
    assert held == [False, True]

"""Feature networks: one way to be called, no image looks at another, and distances grow with damage."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from latentflow.artifacts import write_tensors
from latentflow.autoencoder import to_unit_range
from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.metrics.features import extractors as features
from latentflow.metrics.features.extractors import InceptionFeatures, LatentFeatures, RandomFeatures, open_features
from latentflow.metrics.scores import frechet_distance
from latentflow.metrics.statistics import FeatureStatistics
from tests import tiny


@pytest.fixture(params=["inception", "latents", "random"])
def extractor(request, kl):
    if request.param == "inception":
        return InceptionFeatures(request.getfixturevalue("inception"))
    return LatentFeatures(kl, 32) if request.param == "latents" else RandomFeatures()


def test_features_of_an_image_depend_on_no_other(extractor, shapes):
    together = extractor(shapes[:3])
    assert together.shape == (3, extractor.dim)
    assert together.dtype == torch.float32
    alone = torch.cat([extractor(image[None]) for image in shapes[:3]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], rtol=1e-2)


def test_only_uint8_colour_images_are_taken(extractor, shapes):
    for wrong in (shapes[:1].float(), shapes[:1, :1], shapes[0]):
        with pytest.raises(DataError, match="uint8 images"):
            extractor(wrong)


def test_hashes_tell_networks_apart(kl, deterministic, inception):
    random = RandomFeatures()
    hashes = [random.hash, LatentFeatures(kl, 32).hash, LatentFeatures(kl, 16).hash]
    hashes += [LatentFeatures(deterministic, 32).hash, InceptionFeatures(inception).hash]
    assert len(set(hashes)) == 5
    assert all(len(hash) == 64 for hash in hashes)
    assert RandomFeatures().hash == random.hash


def test_random_weights_are_the_same_everywhere():
    weights = [weight.flatten()[:2].tolist() for weight in RandomFeatures().network.weights]
    expected = [[-0.02419, 0.06942], [-0.14323, 0.11866], [0.06690, -0.03781], [-0.04796, 0.13542]]
    for found, values in zip(weights, expected, strict=True):
        assert found == pytest.approx(values, abs=1e-5)


def test_inception_features_and_logits(inception, shapes):
    features = InceptionFeatures(inception)
    rows = features(shapes[:1])
    assert torch.equal(rows, inception(shapes[:1]))
    torch.testing.assert_close(features.logits(rows), rows @ inception.fc.weight.T)


def test_latents_are_means_as_the_flow_sees_them(kl, shapes):
    found = LatentFeatures(kl, 32)(shapes[:2])
    raw = kl.encode(to_unit_range(shapes[:2]))[:, : kl.num_channels]
    assert kl.normalisation.scale != [1.0] * kl.num_channels
    torch.testing.assert_close(found, kl.normalisation.normalise(raw).flatten(1))
    with pytest.raises(DataError, match=r"\[16, 16\] pixels do not fit"):
        LatentFeatures(kl, 32)(shapes[:2, :, :16, :16])


def test_features_by_name(kl, inception_weights, tmp_path):
    assert open_features("random").dim == 512
    assert open_features("latents", autoencoder=kl, image_size=16).dim == 4 * 8 * 8
    write_tensors(tmp_path / "inception.safetensors", inception_weights)
    assert open_features("inception", weights=tmp_path / "inception.safetensors").dim == 2048
    with pytest.raises(ConfigError, match="did you mean 'inception'"):
        open_features("incepton")
    with pytest.raises(ConfigError, match="give a model"):
        open_features("latents")


def test_features_are_float32_whatever_the_caller_computes_in(extractor, shapes):
    alone = extractor(shapes[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(shapes[:2]), alone)


@pytest.mark.parametrize("name", ["inception", "latents", "random"])
def test_another_precision_is_faster_near_and_another_network(name, kl, inception, shapes, monkeypatch):
    monkeypatch.setattr(features, "load_inception", lambda weights: inception)
    given = {"weights": "x", "autoencoder": kl, "image_size": 32}
    exact, tf32, rough = (open_features(name, precision=word, **given) for word in ("fp32", "tf32", "bf16"))
    assert (exact.precision, tf32.precision, rough.precision) == ("fp32", "fp32", "bf16")  # there is no TF32 on a CPU
    assert exact.hash == tf32.hash != rough.hash
    found, wanted = rough(shapes[:8]), exact(shapes[:8])
    assert found.dtype == torch.float32
    assert 1e-5 < float((found - wanted).norm() / wanted.norm()) < 0.03
    with pytest.raises(ConfigError, match="valid: fp32, tf32, bf16"):
        open_features(name, precision="fp64", **given)


@pytest.fixture(scope="session")
def reference():
    """What random features say of 600 other images of the built-in dataset."""
    source = SyntheticShapes(600, 32, seed=1)
    images = torch.from_numpy(np.stack([source[index].pixels for index in range(600)])).permute(0, 3, 1, 2)
    return FeatureStatistics.of(RandomFeatures()(images))


@pytest.fixture(scope="session")
def undamaged(shapes):
    return RandomFeatures()(shapes)


def assert_growing(reference, sets) -> None:
    """Distances grow by a sixth at least from each set of features to the next: far more than chance."""
    values = [frechet_distance(FeatureStatistics.of(features), reference) for features in sets]
    assert all(larger > 7 / 6 * smaller for smaller, larger in pairwise(values)), values


def test_distances_grow_with_noise(reference, shapes, undamaged):
    noise = torch.randn(shapes.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(shapes + level * noise).round().clamp(0, 255).to(torch.uint8) for level in (16, 32)]
    assert_growing(reference, [undamaged, *map(RandomFeatures(), noisy)])


def test_distances_grow_with_blur(reference, shapes, undamaged):
    blurred = [shapes]
    for _ in range(2):
        smooth = F.avg_pool2d(F.pad(blurred[-1].float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        blurred.append(smooth.round().to(torch.uint8))
    assert_growing(reference, [undamaged, *map(RandomFeatures(), blurred[1:])])


def test_distances_grow_with_dropped_classes(reference, undamaged):
    """Twelve classes come in turn; images of those that are left are repeated, so that all sets hold 600."""
    labels = torch.arange(600) % 12
    kept = [undamaged[labels < num_classes] for num_classes in (12, 9, 6, 3, 1)]
    assert_growing(reference, [rows.repeat(-(-600 // len(rows)), 1)[:600] for rows in kept])


def test_dinov2_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'latentflow\[dinov2\]'"):
        open_features("dinov2")


def test_dinov2(tmp_path, shapes):
    transformers = pytest.importorskip("transformers", reason="transformers is an optional library")
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**shape)).eval()
    model.save_pretrained(tmp_path / "dino", safe_serialization=True)
    features = open_features("dinov2", weights=tmp_path / "dino")
    found = features(shapes[:2])
    assert found.shape == (2, features.dim) == (2, 24)

    def channel(values):
        return np.asarray(Image.fromarray(values.astype(np.float32), "F").resize((224, 224), Image.Resampling.BICUBIC))

    resized = np.stack([[channel(values) for values in image] for image in shapes[:2].numpy()]).clip(0, 255) / 255
    pixels = (torch.from_numpy(resized) - features.mean) / features.std
    expected = model(pixel_values=pixels.float()).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArtifactError, match="cannot load DINOv2"):
        open_features("dinov2", weights=tmp_path)


def test_the_tiny_images_of_other_tests_can_be_compared(images):
    """Random features take any size."""
    assert RandomFeatures()(torch.zeros(1, 3, tiny.IMAGE_SIZE, 40, dtype=torch.uint8)).isfinite().all()

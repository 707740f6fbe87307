"""The Inception network against published features of random weights, and its weights on disk."""

from __future__ import annotations

import hashlib

import pytest
import torch

from latentflow.artifacts import write_tensors
from latentflow.errors import ArtifactError
from latentflow.metrics.features import inception as module
from latentflow.metrics.features.inception import (
    BLOCK_DIMS,
    build_inception,
    default_weights,
    download_weights,
    load_inception,
    preprocess,
)
from tests.metrics import published


@pytest.fixture(scope="session")
def fixture(shared):
    return published.tensors(shared, "fid_inception")


def test_the_tensors_are_those_of_the_published_file(shared, inception_weights):
    recipe = published.entry(shared, "fid_inception")["weights_recipe"]
    assert {name: list(tensor.shape) for name, tensor in inception_weights.items()} == recipe["shapes"]
    digest = hashlib.sha256()
    for name in sorted(inception_weights):
        if not name.endswith("num_batches_tracked"):
            digest.update(inception_weights[name].numpy().tobytes())
    assert digest.hexdigest() in recipe["sha256_all"]


@pytest.mark.parametrize("side", [32, 64, 299])
def test_features_of_every_block_are_the_published_ones(fixture, inception, side):
    blocks = inception.blocks(fixture[f"inputs/images_{side}"])
    found = {f"features_{dim}_{side}": block for dim, block in zip(BLOCK_DIMS, blocks, strict=True)}
    found[f"logits_{side}"] = inception.logits(blocks[-1])
    for name, values in found.items():
        torch.testing.assert_close(values, fixture[f"outputs/{name}"], rtol=1e-5, atol=1e-5, msg=name)
    without_bias = found[f"logits_{side}"] - inception.fc.bias
    torch.testing.assert_close(inception.logits(blocks[-1], bias=False), without_bias)


@pytest.mark.parametrize("side", [32, 64, 299])
def test_images_are_prepared_as_published(fixture, side):
    prepared = preprocess(fixture[f"inputs/images_{side}"])
    crop = fixture[f"outputs/preprocessed_{side}_crop"]
    torch.testing.assert_close(prepared[..., :12, :12], crop, rtol=0, atol=2e-6)
    found = torch.stack([prepared.double().mean((1, 2, 3)), prepared.double().std((1, 2, 3), correction=0)])
    torch.testing.assert_close(found, fixture[f"outputs/preprocessed_{side}_mean_std"], rtol=0, atol=2e-6)


def test_weights_are_read_from_both_formats(inception_weights, tmp_path):
    write_tensors(tmp_path / "weights.safetensors", inception_weights)
    torch.save({name: x for name, x in inception_weights.items() if "tracked" not in name}, tmp_path / "weights.pth")
    for file in ("weights.safetensors", "weights.pth"):
        loaded = load_inception(tmp_path / file).state_dict()
        assert all(torch.equal(loaded[name], inception_weights[name]) for name in inception_weights)


def test_other_tensors_are_refused(inception_weights, tmp_path):
    few = {name: x for name, x in inception_weights.items() if not name.startswith("Mixed_7c.branch1x1")}
    with pytest.raises(ArtifactError, match=r"Mixed_7c\.branch1x1\.conv\.weight"):
        build_inception(few)
    with pytest.raises(ArtifactError, match="AuxLogits"):
        build_inception({**inception_weights, "AuxLogits.conv0.conv.weight": torch.zeros(1)})
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ArtifactError, match=r"list\.pth.*does not hold named tensors"):
        load_inception(tmp_path / "list.pth")
    with pytest.raises(ArtifactError, match="does not exist"):
        load_inception(tmp_path / "absent.safetensors")


def test_a_program_in_the_weights_is_not_run(bomb, tmp_path):
    with pytest.raises(ArtifactError, match=r"bomb\.pth"):
        load_inception(bomb(tmp_path / "bomb.pth"))


def test_offline_the_message_says_where_the_file_belongs(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(module.torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ArtifactError) as caught:
        download_weights()
    assert str(default_weights()) in str(caught.value)
    assert default_weights().is_relative_to(tmp_path)
    assert module.WEIGHTS_URL in str(caught.value)


def test_another_file_in_the_cache_is_refused_and_the_right_one_is_not_fetched_again(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = default_weights()
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a downlo")
    with pytest.raises(ArtifactError, match="delete it"):
        download_weights()
    monkeypatch.setattr(module, "WEIGHTS_HASH", hashlib.sha256(b"half a downlo").hexdigest()[:8])
    monkeypatch.setattr(module.torch.hub, "download_url_to_file", None)
    assert download_weights() == file

"""One's own networks: named, saved, loaded where they are registered, and refused in one line elsewhere."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from latentflow import RegisteredNetwork, register_network
from latentflow.api import LatentFlow
from latentflow.artifacts import read_json
from latentflow.convert.diffusers.export import export_diffusers
from latentflow.errors import ArtifactError, ConfigError
from latentflow.model.conditioning import Conditioning
from latentflow.networks import registered
from latentflow.networks.dit import DiTConfig
from latentflow.shapes import Condition
from tests import tiny


@pytest.fixture(autouse=True)
def own_names(monkeypatch) -> None:
    """Names that a test registers are gone afterwards."""
    monkeypatch.setattr(registered, "_MAKERS", {})


class Own(nn.Module):
    """One convolution, and a vector for each class."""

    def __init__(self, channels: int = 4, num_classes: int = 3, width: int = 8):
        super().__init__()
        self.inside, self.outside = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 1)
        self.classes = nn.Embedding(num_classes + 1, width)

    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        own = self.classes(condition.labels) + time.to(latents.dtype)[:, None]
        return self.outside(torch.tanh(self.inside(latents) + own[:, :, None, None]))


def assembled(kl, network=None) -> LatentFlow:
    own = network or RegisteredNetwork(name="own", options={"channels": kl.num_channels})
    conditions = Conditioning(class_names=list(tiny.CLASSES))
    return LatentFlow.assemble(own, kl, image_size=tiny.IMAGE_SIZE, conditioning=conditions, device="cpu")


def test_a_registered_network_is_saved_and_loaded(kl, tmp_path):
    register_network("own")(Own)
    model = assembled(kl)
    model.save_pretrained(tmp_path / "model")
    stored = read_json(tmp_path / "model" / "config.json")["network"]
    assert stored == {"kind": "registered", "name": "own", "options": {"channels": 4}, "size_multiple": 1}
    assert "registered network own" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    loaded = LatentFlow.from_pretrained(tmp_path / "model", device="cpu")
    assert type(loaded.network) is Own
    drawn, again = (one.sample(3, guidance=2, solver="heun", steps=3, seed=1) for one in (model, loaded))
    assert torch.equal(drawn.pixels, again.pixels)
    assert drawn.captions == list(tiny.CLASSES[1:] + tiny.CLASSES[:1])


def test_a_folder_is_refused_where_its_network_is_not_registered(kl, tmp_path):
    register_network("own")(Own)
    assembled(kl).save_pretrained(tmp_path / "model")
    registered._MAKERS.clear()
    register_network("owl")(Own)
    with pytest.raises(ArtifactError, match=r"'own' in this program; did you mean 'owl'.*register_network\('own'\)"):
        LatentFlow.from_pretrained(tmp_path / "model", device="cpu")


def test_a_module_without_a_name_draws_and_is_not_saved(kl, tmp_path):
    torch.manual_seed(0)
    model = assembled(kl, Own())
    assert model.sample(2, steps=2).pixels.shape == (2, 3, 16, 16)
    with pytest.raises(ConfigError, match=r"the network is a Own without a name.*register_network") as refused:
        model.save_pretrained(tmp_path / "model")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "model").exists()


def test_a_module_that_the_config_does_not_name_is_not_saved(kl, tmp_path):
    """It used to be written as a DiT, which could not be loaded."""
    model = tiny.model(kl)
    with pytest.raises(ConfigError, match=r"the config names a DiT.*, but the network is a Own.*register_network"):
        LatentFlow(model.config, Own(), kl).save_pretrained(tmp_path / "model")
    other = model.config.model_copy(update={"network": DiTConfig(**{**tiny.RECIPE["network"], "depth": 3})})
    with pytest.raises(ConfigError, match=r"missing.*give the config that it was built by"):
        LatentFlow(other, model.network, kl).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_average_of_ones_own_loop_is_saved_without_building_a_network(kl, tmp_path):
    """A run's checkpoints are written by a thread, which must not disturb the compiler of the one that trains."""
    built = []
    register_network("own")(partial(lambda **given: built.append(1) or Own(**given)))
    model = assembled(kl)
    average = {name: 2 * tensor for name, tensor in model.network.state_dict().items()}
    model.save_pretrained(tmp_path / "model", weights=average)
    assert len(built) == 1
    loaded = LatentFlow.from_pretrained(tmp_path / "model", device="cpu")
    assert all(torch.equal(tensor, average[name]) for name, tensor in loaded.network.state_dict().items())
    with pytest.raises(ConfigError, match="without a name"):
        assembled(kl, Own()).save_pretrained(tmp_path / "other", weights=average)


def test_names_are_one_line_and_belong_to_one_network():
    for wrong in ("", "two words", "../up", "a" * 101, "-x"):
        with pytest.raises(ConfigError, match=r"the network name"):
            register_network(wrong)(Own)
    assert register_network("own")(Own) is Own
    assert register_network("own")(Own) is Own  # the cell of a notebook is repeated
    with pytest.raises(ConfigError, match=r"'own' belongs to .*\.Own; give torch\..*Identity another name"):
        register_network("own")(nn.Identity)
    register_network("small")(partial(Own, width=2))
    assert RegisteredNetwork(name="small").build().outside.in_channels == 2


def test_options_that_do_not_fit_are_named():
    register_network("own")(Own)
    with pytest.raises(ConfigError, match=r"'own' cannot be built with the options \{'widht': 3\}: .*widht"):
        RegisteredNetwork(name="own", options={"widht": 3}).build()


def test_parts_that_do_not_fit_are_named(kl):
    register_network("own")(Own)
    with pytest.raises(ConfigError, match="image_size 18 is not a multiple of 8"):
        LatentFlow.assemble(RegisteredNetwork(name="own", size_multiple=4), kl, image_size=18)


def test_a_network_of_the_package_is_assembled_and_saved(kl, tmp_path):
    model = assembled(kl, DiTConfig(**tiny.RECIPE["network"]))
    model.save_pretrained(tmp_path / "model")
    loaded = LatentFlow.from_pretrained(tmp_path / "model", device="cpu")
    assert loaded.config == model.config


def test_it_is_not_exported_to_diffusers(kl, tmp_path):
    register_network("own")(Own)
    with pytest.raises(ArtifactError, match="cannot be exported to diffusers: its network is one's own"):
        export_diffusers(assembled(kl), tmp_path / "out")

"""The facts about a checkpoint that are not in its weights, and the options that say it."""

from __future__ import annotations

import pytest
import torch

from latentflow.autoencoder import Autoencoder
from latentflow.convert.assemble import assemble
from latentflow.convert.families.lfm import EXPERIMENTS, find_experiment
from latentflow.convert.families.registry import FAMILIES, architecture
from latentflow.convert.published import class_names_of, imagenet_synsets, published
from latentflow.errors import ConfigError
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.networks.velocity_network import DenoiserPrediction, NoisePrediction, VelocityPrediction
from tests import tiny
from tests.convert import foreign

SMALL = {"hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
EDM = {
    "model_type": "adm",
    "img_resolution": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": "1 2",
    "num_blocks": 1,
    "attn_resolutions": "8,4",
}


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        published(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# LFM


def test_an_experiment_replaced_in_part():
    found = published("lfm", {"nf": 32, "ch_mult": "1 2"}, experiment="church_f8_adm", image_size=64)
    assert (found.image_size, found.architecture.network.channels) == (64, 32)
    assert found.architecture.network.multipliers == (1, 2)
    assert found.training.data == "LSUN church 256, the first 120,000 (LFM's church_f8_adm)"


def test_what_a_training_state_says_of_itself():
    said = {"exp": "mine", "model_type": "DiT-S/4", "num_classes": 5, "label_dropout": 0.1, "image_size": 64}
    said |= {"num_in_channels": 4, "num_out_channels": 4, "lr": 1e-4, "datadir": "/data", "num_epoch": 500}
    found = published("lfm", {}, found=said)
    assert found.architecture.num_classes == 5
    assert (found.architecture.network.depth, found.architecture.network.patch_size) == (12, 4)
    assert (found.image_size, found.label_dropout, found.latent_scale) == (64, 0.1, 0.18215)
    assert found.training.data == ""
    replaced = published("lfm", {"num_classes": 3, "scale_factor": 0.5}, found=said)
    assert (replaced.architecture.num_classes, replaced.latent_scale) == (3, 0.5)


def test_an_experiment_is_believed_before_the_file():
    found = published("lfm", {}, experiment="ffhq_f8_dit", found={"model_type": "DiT-S/2", "num_classes": 5})
    assert found.architecture.network.depth == 24
    assert found.architecture.num_classes == 0


def test_scripts_for_painting_are_told_by_their_channels():
    said = {"num_in_channels": 9, "num_out_channels": 4, "nf": 32, "ch_mult": [1, 2], "image_size": 64}
    assert published("lfm", {}, found=said).architecture.inpainting
    assert not published("lfm", {"num_in_channels": 4}, found=said).architecture.inpainting
    assert "semantic_kl" in refusal("lfm", {"num_in_channels": 8}, found=said)


def test_labels_are_dropped_where_there_are_labels():
    flags = {"model_type": "DiT-S/2", "num_in_channels": 4, "num_out_channels": 4, "label_dropout": 0.2}
    assert published("lfm", {**flags, "num_classes": 3}).label_dropout == 0.2
    unconditional = {**flags, "model_type": "adm", "use_origin_adm": True, "nf": 32}
    assert published("lfm", unconditional).label_dropout == 0


def test_arguments_of_the_class_of_lfm():
    found = published("lfm", {**SMALL, "img_resolution": 8, "label_dropout": 0.1})
    assert (found.image_size, found.architecture.num_classes, found.label_dropout) == (64, 3, 0.1)
    assert found.sampling.solver == "dopri5"


def test_an_autoencoder_of_another_factor():
    assert "factor 8" in refusal("lfm", {}, experiment="ffhq_f8_dit", factor=4)
    assert published("lfm", {"f": 4}, experiment="ffhq_f8_dit", factor=4).architecture.channels == 4
    assert published("lfm", {}, experiment="ffhq_f8_dit").image_size == 256


@pytest.mark.parametrize(
    ("options", "how", "said"),
    [
        ({}, {}, "--experiment NAME"),
        ({}, {"image_size": 256}, "--experiment NAME"),
        ({}, {"found": {"lr": 1e-4}}, "--experiment NAME"),
        ({}, {"experiment": "ffhq_f8_dti"}, "did you mean 'ffhq_f8_dit'?"),
        ({"num_clases": 3}, {}, "unknown option 'num_clases' of the published network; did you mean 'num_classes'?"),
        ({"nff": 32}, {"experiment": "ffhq_f8_adm"}, "unknown option 'nff'"),
        ({"nf": "wide"}, {"experiment": "ffhq_f8_adm"}, "published network: nf = 'wide'"),
        ({"nf": 0}, {"experiment": "ffhq_f8_adm"}, "published network: nf = 0"),
        ({"layout": True}, {"experiment": "ffhq_f8_adm"}, "--layout"),
        ({"model_type": "DiT-M/2"}, {}, "model_type 'DiT-M/2'"),
        ({"model_type": "DiT-S/2"}, {}, "needs num_classes"),
        ({"num_in_channels": 8}, {"experiment": "inpainting_kl"}, "this task needs 9"),
        ({"num_in_channels": 9}, {"experiment": "semantic_kl"}, "this task needs 8"),
        (
            {"model_type": "ddpm++", "use_origin_adm": False},
            {"experiment": "inpainting_kl"},
            "leave out model_type=ddpm++",
        ),
    ],
)
def test_what_lfm_has_not(options, how, said):
    assert said in refusal("lfm", options, **how)


def test_experiments_by_name():
    assert find_experiment("imnet_f8_ditb2") is EXPERIMENTS["imnet_f8_ditb2"]
    with pytest.raises(ConfigError, match="did you mean 'celeb_f8_dit'"):
        find_experiment("celebs_f8_dit")


# SiT and DiT


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_names_of_transformers(family):
    prefix = {"sit": "SiT", "dit": "DiT"}[family]
    found = published(family, {"name": f"{prefix}-XL/2"}, image_size=512)
    network = found.architecture.network
    assert (network.depth, network.hidden_size, network.num_heads, network.patch_size) == (28, 1152, 16, 2)
    assert (found.image_size, found.architecture.num_classes, found.label_dropout) == (512, 1000, 0.1)
    positions = next(constant for constant in found.architecture.keys.constants if constant.theirs == "pos_embed")
    assert positions.value.shape == (1, 1024, 1152)
    assert class_names_of(found.architecture) == imagenet_synsets()
    assert (found.sampling.guidance, found.sampling.guided_channels) == (1.5, 3)
    message = refusal(family, {"name": f"{prefix}-XL/3"})
    assert f"no {family} network '{prefix}-XL/3'; did you mean '{prefix}-" in message
    assert "no sit network 'DiT-XL/2'; did you mean 'SiT-XL/2'?" in refusal("sit", {"name": "DiT-XL/2"})


def test_sizes_replace_those_of_a_name():
    found = published("sit", {"name": "SiT-B/2", "depth": 3, "num_classes": 10})
    assert (found.architecture.network.depth, found.architecture.network.hidden_size) == (3, 768)
    assert class_names_of(found.architecture) == []


def test_paths_and_predictions_of_sit():
    linear, gvp = published("sit", SMALL), published("sit", {**SMALL, "path_type": "GVP"})
    assert linear.path == LinearPath(sigma_min=0)
    assert gvp.path == CosinePath()
    assert linear.prediction == gvp.prediction == VelocityPrediction()
    assert "divide by a coefficient that vanishes" in refusal("sit", {**SMALL, "prediction": "noise"})
    assert "prediction 'score'" in refusal("sit", {**SMALL, "prediction": "score"})
    assert "path_type 'VP'" in refusal("sit", {**SMALL, "path_type": "VP"})


def test_dit_predicts_noise_on_the_cosine_path():
    found = published("dit", SMALL)
    assert (found.path, found.prediction) == (CosinePath(), NoisePrediction())
    assert found.sampling.solver == "heun"
    assert "1000 steps" in found.notes[0]


def test_transformers_without_guidance():
    found = published("sit", {**SMALL, "class_dropout_prob": 0})
    assert (found.sampling.guidance, found.sampling.guided_channels) == (1, None)


def test_the_size_of_images_and_that_of_latents():
    for family in ("sit", "dit"):
        assert published(family, {**SMALL, "input_size": 8}, factor=2).image_size == 16
        assert published(family, {**SMALL, "input_size": 8}, factor=2, image_size=16).image_size == 16
        assert "image size 64" in refusal(family, {**SMALL, "input_size": 8}, factor=2, image_size=64)
        assert "image size 257" in refusal(family, SMALL, image_size=257)
    for name in ("input_size", "img_resolution"):
        assert published("lfm", {**SMALL, name: 8}, factor=2).image_size == 16
        assert "image size 64" in refusal("lfm", {**SMALL, name: 8}, factor=2, image_size=64)
    assert published("lfm", SMALL, factor=2, image_size=16).image_size == 16
    assert published("edm", EDM, factor=2, image_size=16).image_size == 16
    assert "image size 64" in refusal("edm", EDM, factor=2, image_size=64)


def test_options_of_transformers():
    assert "did you mean 'num_heads'?" in refusal("dit", {**SMALL, "num_head": 2})
    assert "needs hidden_size" in refusal("dit", {"depth": 1, "num_heads": 2})
    assert "published network: depth = 0" in refusal("dit", {**SMALL, "depth": 0})
    assert "--experiment names one of LFM's" in refusal("sit", {}, experiment="ffhq_f8_dit")


# EDM


def test_edm():
    options = {**EDM, "sigma_data": 0.25, "sigma_max": 40.0, "label_dim": 3, "label_dropout": 0.1}
    found = published("edm", options, factor=4)
    assert found.prediction == DenoiserPrediction(sigma_data=0.25, sigma_max=40.0)
    assert found.path == LinearPath(sigma_min=0)
    assert (found.image_size, found.label_dropout, found.latent_scale) == (32, 0.1, None)
    assert found.architecture.network.attention_factors == (1, 2)
    assert published("edm", {**EDM, "label_dropout": 0.1}).label_dropout == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "adm++"}, "published network: model_type"),
        ({"channel_mult_emb": 2}, "channel_mult_emb 2"),
        ({"model_type": "ddpm++", "encoder_type": "skip"}, "'skip' are not supported"),
        ({"decoder_type": "skip"}, "'skip' are not supported"),
        ({"encoder_type": "residual"}, "arguments of SongUNet"),
        ({"model_type": "ddpm++", "resample_filter": "1 2 1"}, "resample_filter (1, 2, 1)"),
        ({"num_block": 1}, "did you mean 'num_blocks'?"),
        ({"attn_resolutions": "wide"}, "published network: attn_resolutions"),
    ],
)
def test_what_edm_has_not(options, said):
    assert said in refusal("edm", {**EDM, **options})


@pytest.mark.parametrize(("given", "meant"), [("8 4", (8, 4)), ("8,4", (8, 4)), (8, (8,)), ([8, 4], (8, 4))])
def test_lists_on_a_command_line(given, meant):
    found = architecture("edm", {**EDM, "attn_resolutions": given})
    assert found.network.attention_factors == tuple(8 // side for side in meant)


@pytest.mark.parametrize(
    ("family", "option"), [("sit", "name=SiT-XL/2"), ("dit", "name=DiT-XL/2"), ("edm", "model_type=adm")]
)
def test_only_lfm_has_experiments(family, option):
    """The option that the message suggests is one the family has."""
    with pytest.raises(ConfigError, match=f"for {family}, give options such as {option}"):
        published(family, {}, experiment="ffhq_f8_dit")
    key, value = option.split("=")
    others = {} if key == "name" else {name: EDM[name] for name in EDM.keys() - {key}}
    assert published(family, {key: value, **others}).architecture.channels == 4


# Families and models


def test_families():
    assert FAMILIES == ("lfm", "sit", "dit", "edm")
    assert "unknown family 'sti': did you mean 'sit'?" in refusal("sti", {})
    with pytest.raises(ConfigError, match="unknown family 'sti'"):
        architecture("sti", {})


def test_synsets_are_in_the_order_of_folders():
    names = imagenet_synsets()
    assert len(names) == len(set(names)) == 1000
    assert names == sorted(names)
    assert (names[0], names[207], names[999]) == ("n01440764", "n02099601", "n15075141")  # tench, golden retriever


@pytest.mark.parametrize(
    ("num_channels", "names", "said"),
    [(3, (), "has 3 latent channels, the network 4"), (4, ("a", "b"), "2 class names for a network of 3 classes")],
)
def test_what_does_not_fit_a_network(num_channels, names, said):
    known = published("sit", {**SMALL, "input_size": 8}, factor=2)
    network = known.architecture.load(foreign.draw(known.architecture))
    autoencoder = Autoencoder(tiny.kl(latent_channels=num_channels), "somewhere")
    with pytest.raises(ConfigError, match=said):
        assemble(known, network, autoencoder, class_names=names)


def test_an_image_size_that_the_network_cannot_take():
    known = published("lfm", {"nf": 32}, experiment="church_f8_adm", image_size=8 * 12)
    with torch.device("meta"):
        network = known.architecture.empty()
    with pytest.raises(ConfigError, match="latents of 12 x 12; this network needs multiples of 8"):
        assemble(known, network, Autoencoder(foreign.vae(), "somewhere"))


def test_a_training_state_of_sit_says_what_it_is():
    found = {"model": "SiT-S/2", "image_size": 256, "num_classes": 10, "path_type": "GVP", "prediction": "velocity"}
    known = published("sit", {}, found=found)
    assert known.path.kind == "cosine" and known.image_size == 256 and known.architecture.num_classes == 10
    assert known.architecture.network.hidden_size == 384
    with pytest.raises(ConfigError, match="prediction 'noise': of SiT, networks that predict the velocity"):
        published("sit", {}, found={**found, "prediction": "noise"})
    with pytest.raises(ConfigError, match="path_type=Linear: the file says that it was trained with GVP"):
        published("sit", {"path_type": "Linear"}, found=found)


def test_a_table_without_a_null_row_cannot_guide():
    flags = {"num_in_channels": 4, "num_out_channels": 4, "num_classes": 10, "nf": 32, "ch_mult": "1 2"}
    known = published("lfm", {**flags, "use_origin_adm": True, "model_type": "adm", "label_dropout": 0.1})
    assert known.architecture.num_classes == 10 and known.label_dropout == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision(dtype):
    network = architecture("sit", {"hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 3, "input_size": 8})
    theirs = network.keys.theirs(network.empty("cpu").state_dict())
    assert network.load({key: tensor.to(dtype) for key, tensor in theirs.items()}) is not None

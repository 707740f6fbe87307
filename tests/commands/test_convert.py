"""`latentflow convert`: a published file becomes a model folder that means the same, or is refused in one line."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.commands.convert import convert
from latentflow.convert.families.registry import architecture
from latentflow.convert.request import ConvertRequest
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.flow.path import CosinePath
from latentflow.model.flow_model import FlowModel
from latentflow.shapes import Condition, per_image
from latentflow.sizes import Size
from tests import tiny
from tests.convert import foreign
from tests.convert.parity import find, needs_parity, relative_error, tensors, weights
from tests.processes import run_here

SIZES = {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
SIT = [f"{key}={value}" for key, value in SIZES.items()]
PUBLISHED = ("hidden_size=96", "depth=3", "num_heads=4", "num_classes=10")  # the fixture dit_cls10
EDM = {
    "model_type": "adm",
    "img_resolution": 8,
    "in_channels": 4,
    "out_channels": 4,
    "label_dim": 3,
    "model_channels": 64,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
}


@pytest.fixture(scope="module")
def sit_weights() -> dict[str, torch.Tensor]:
    """Of a small SiT on latents of 8 x 8."""
    return foreign.draw(architecture("sit", {**SIZES, "input_size": 8}))


@pytest.fixture
def sit_file(tmp_path, sit_weights) -> Path:
    return foreign.save(sit_weights, tmp_path / "sit.pt")


@pytest.fixture
def run(tmp_path, kl_folder, sit_file):
    """Convert the small SiT with one thing changed; the model folder is `tmp_path`/model."""

    def convert_it(family="sit", checkpoint=sit_file, out=tmp_path / "model", options=SIT, **changed):
        how = {"autoencoder": kl_folder, "image_size": tiny.IMAGE_SIZE, **changed}
        request = ConvertRequest(family=family, checkpoint=checkpoint, options=list(options), **how)
        return convert(request, out, runtime=tiny.CPU)

    return convert_it


def reloaded(result_folder: Path) -> LatentFlow:
    return LatentFlow.from_pretrained(result_folder, runtime=tiny.CPU)


# What the models mean


@torch.no_grad()
def test_sit_flows_the_other_way_round(run, tmp_path):
    """The published network has its noise at 0, so its velocity at 1 - t is minus ours at t."""
    fixture = find("sit")
    given = tensors(fixture)
    file = foreign.save(weights(fixture), tmp_path / "sit.pt", prefix="module.")
    run(checkpoint=file, options=[f"{key}={fixture['constructor'][key]}" for key in SIZES])
    model = reloaded(tmp_path / "model")
    x, t, y = (given[f"inputs/{name}"] for name in "xty")
    error = relative_error(model.velocity(x, 1 - t, Condition(y)), -given["outputs/base"])
    print(f"parity sit folder: largest error {error:.1e} of the largest velocity")
    assert error <= 1e-5
    assert model.config.path.sigma_min == 0
    assert (model.config.sampling.guidance, model.config.sampling.guided_channels) == (1.5, 3)
    assert model.config.normalisation == model.autoencoder.normalisation


@needs_parity
@pytest.mark.parametrize("case", ["base", "gain2", "frac_t", "frac_t_gain2"])
@torch.no_grad()
def test_dit_predicts_the_noise_of_a_chain(run, tmp_path, case):
    """At the time of a step, v = pi/2 (cos(a) noise - sin(a) data) with data = (x - sin(a) noise) / cos(a)."""
    fixture = find("dit_cls10")
    about = next(c for c in fixture["cases"] if c["name"] == case)
    given = tensors(fixture)
    file = foreign.save(weights(fixture, about.get("weight_gain", 1.0)), tmp_path / "dit_cls10.pt")
    run("dit", checkpoint=file, options=PUBLISHED)
    model = reloaded(tmp_path / "model")
    assert model.config.path == CosinePath()

    x, step, y = (given[about["inputs"][name]] for name in "xty")
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    angles = alpha_bar.sqrt().acos()
    low = step.double().floor().long().clamp(max=998)
    angle = angles[low] + (step.double() - low) * (angles[low + 1] - angles[low])
    noise = given[about["output"]][:, :4].double()
    sine, cosine = per_image(angle.sin(), noise), per_image(angle.cos(), noise)
    data = (x.double() - sine * noise) / cosine
    expected = math.pi / 2 * (cosine * noise - sine * data)
    found = model.velocity(x, (angle * 2 / math.pi).float(), Condition(y))
    for number in range(len(x)):
        error = relative_error(found[number].double(), expected[number])
        print(f"parity dit folder {case}, step {step[number]:g}: largest error {error:.1e} of the largest velocity")
        assert error <= 2e-4


@pytest.mark.parametrize("extra", [(), ("learn_sigma=true",)])
@torch.no_grad()
def test_the_velocity_is_the_first_half_of_what_lfm_learned_with_sigma(run, tmp_path, extra):
    """The file's shapes say so; both halves of the last layer hold [row][column][velocity, sigma]."""
    options = {**SIZES, "input_size": 8, "label_dropout": 0.1}
    both = foreign.draw(architecture("lfm", {**options, "learn_sigma": True}))
    both["final_layer.linear.weight"] = torch.randn(both["final_layer.linear.weight"].shape)
    both["final_layer.linear.bias"] = torch.randn(both["final_layer.linear.bias"].shape)
    single = {
        key: value.unflatten(0, (4, 8))[:, :4].flatten(0, 1) if key.startswith("final_layer.linear") else value
        for key, value in both.items()
    }
    given = [f"{key}={value}" for key, value in options.items()]
    run("lfm", foreign.save(both, tmp_path / "both.pth"), options=[*given, *extra], image_size=None)
    run("lfm", foreign.save(single, tmp_path / "single.pth"), tmp_path / "other", options=given, image_size=None)
    model, other = reloaded(tmp_path / "model"), reloaded(tmp_path / "other")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([0, 2])
    assert torch.equal(model.velocity(x, t, Condition(y)), other.velocity(x, t, Condition(y)))


@torch.no_grad()
def test_edm_is_a_preconditioned_denoiser(run, tmp_path):
    """D(y, sigma) = c_skip y + c_out F(c_in y, ln(sigma) / 4) of arXiv 2206.00364, table 1; v = (x - D) / t."""
    published = architecture("edm", EDM)
    theirs = foreign.draw(published)
    file = foreign.save(theirs, tmp_path / "edm.pt", prefix="model.")
    options = [f"{key}={' '.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in EDM.items()]
    run("edm", checkpoint=file, options=[*options, "sigma_data=0.7"])
    model = reloaded(tmp_path / "model")
    assert model.config.normalisation == model.autoencoder.normalisation

    inner = published.load(theirs)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, condition = torch.tensor([0.2, 0.5, 0.9]), Condition(torch.tensor([0, 2, 3]))
    sigma, data = per_image(t / (1 - t), x), 0.7
    y = x / per_image(1 - t, x)
    total = (sigma**2 + data**2).sqrt()
    output = inner(y / total, sigma.flatten().log() / 4, condition)
    denoised = data**2 / total**2 * y + sigma * data / total * output
    error = relative_error(model.velocity(x, t, condition), (x - denoised) / per_image(t, x))
    print(f"parity edm folder: largest error {error:.1e} of the largest velocity")
    assert error <= 1e-5


def test_sit_on_the_curved_path(run, tmp_path):
    result = run(options=[*SIT, "path_type=GVP"])
    assert reloaded(tmp_path / "model").config.path == CosinePath()
    assert result.check.slope is None
    assert reloaded(tmp_path / "model").sample(num=1, steps=2, solver="euler").pixels.shape == (1, 3, 16, 16)


# What is found in files


def test_the_average_of_a_training_state(run, tmp_path, sit_weights):
    torch.save({"model": {k: x + 1 for k, x in sit_weights.items()}, "ema": sit_weights, "opt": {}}, tmp_path / "s.pt")
    result = run(checkpoint=tmp_path / "s.pt", out=tmp_path / "from-state")
    plain = run()
    assert (result.part, plain.part) == ("ema", "")
    state, expected = result.model.network.state_dict(), plain.model.network.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


LFM = {"model_type": "adm", "use_origin_adm": True, "image_size": 16, "f": 2, "num_in_channels": 4}
LFM |= {"num_out_channels": 4, "nf": 32, "num_res_blocks": 1, "ch_mult": [1, 2], "attn_resolutions": [2]}


def test_a_training_state_of_lfm_says_what_it_is(run, tmp_path):
    """The flags of the run are in the file, in config.yaml in its folder, or given."""
    theirs = foreign.draw(architecture("lfm", LFM))
    args = Namespace(**LFM, exp="mine", lr=2e-5, datadir="/data", scale_factor=0.5, label_dropout=0.0, num_classes=None)
    content = {"epoch": 3, "global_step": 9, "args": args, "model_dict": theirs, "optimizer": {}, "scheduler": {}}
    torch.save(content, tmp_path / "content.pth")
    how = {"options": (), "image_size": None}
    result = run("lfm", checkpoint=tmp_path / "content.pth", **how)
    config = reloaded(tmp_path / "model").config
    assert result.part == "model_dict"
    assert (config.image_size, config.normalisation.scale) == (Size(16, 16), [0.5] * 4)
    assert config.network.attention_factors == (2,)

    (tmp_path / "run").mkdir()
    file = foreign.save(theirs, tmp_path / "run" / "model_3.pth", prefix="module.")
    with pytest.raises(ConfigError, match="does not say which network it is"):
        run("lfm", checkpoint=file, out=tmp_path / "b", **how)
    given = [f"{key}={' '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in LFM.items()]
    by_hand = run("lfm", checkpoint=file, out=tmp_path / "c", options=given, image_size=None)
    assert by_hand.model.config.network == config.network
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in LFM.items())
    (tmp_path / "run" / "config.yaml").write_text(text, encoding="utf-8")
    found = run("lfm", checkpoint=file, out=tmp_path / "d", **how)
    assert found.model.config.network == config.network


@pytest.mark.parametrize("inside", [True, False])
def test_the_encoder_of_semantic_maps(run, tmp_path, inside):
    options = ["nf=32", "num_res_blocks=1", "f=2"]
    given = {"nf": 32, "num_res_blocks": 1, "num_in_channels": 8, "ch_mult": (1, 2, 3, 4), "image_size": 16, "f": 2}
    published = architecture("lfm", {**given, "num_out_channels": 4, "attn_resolutions": (16, 8)}, num_map_classes=19)
    theirs = foreign.draw(published)
    mixed = theirs.pop("cond_stage_model.channel_mapper.weight")
    assert mixed.shape == (4, 19, 1, 1)
    encoder = {"channel_mapper.weight": mixed}
    torch.save({"model_dict": theirs, "cond_stage_model_dict": encoder}, tmp_path / "content.pth")
    torch.save(theirs, tmp_path / "model.pth")
    torch.save(encoder, tmp_path / "encoder.pth")
    how = {"options": options, "experiment": "semantic_kl"}
    if inside:
        result = run("lfm", checkpoint=tmp_path / "content.pth", **how)
    else:
        result = run("lfm", checkpoint=tmp_path / "model.pth", encoder=tmp_path / "encoder.pth", **how)
        with pytest.raises(ArtifactError, match=r"lacks 'cond_stage_model\.channel_mapper\.weight'"):
            run("lfm", checkpoint=tmp_path / "model.pth", out=tmp_path / "other", **how)
    assert torch.equal(result.model.network.spatial.map_encoder.mix.weight, mixed)


def test_class_names(run, tmp_path):
    assert run().model.config.conditioning.class_names == ["0", "1", "2"]
    (tmp_path / "names.txt").write_text("ape\n\nbear \ncat\n", encoding="utf-8")
    named = run(out=tmp_path / "named", class_names=tmp_path / "names.txt")
    assert reloaded(tmp_path / "named").config.conditioning.class_names == ["ape", "bear", "cat"]
    assert named.model.config.conditioning.label_dropout == 0.1
    (tmp_path / "names.txt").write_text("ape\nbear\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="2 class names for a network of 3 classes"):
        run(out=tmp_path / "other", class_names=tmp_path / "names.txt")
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        run(out=tmp_path / "other", class_names=tmp_path / "nowhere.txt")


def test_the_probe_can_be_left_out(run, tmp_path):
    assert run(check=False).check is None
    assert run(out=tmp_path / "probed").check.verdict.startswith("does not look trained")


def test_a_wrong_sign_leaves_no_folder(run, tmp_path, monkeypatch):
    """A model that flows backwards is refused before anything is written."""
    monkeypatch.setattr(FlowModel, "velocity", lambda self, x, t, condition: -x)
    with pytest.raises(ArtifactError, match="its sign or its time is reversed"):
        run()
    assert not (tmp_path / "model").exists()
    run(check=False)


# Refusals


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"family": "sti"}, "did you mean 'sit'?"),
        ({"experiment": "ffhq_f8_dit"}, "--experiment names one of LFM's"),
        ({"family": "lfm", "experiment": "ffhq_f8_dti"}, "did you mean 'ffhq_f8_dit'?"),
        ({"options": ["hidden_size"]}, "'hidden_size' is not of the form key=value"),
        ({"options": ["=3"]}, "'=3' is not of the form key=value"),
        ({"options": ["hidden_size=[1"]}, "not valid YAML"),
        ({"options": [*SIT, "num_head=2"]}, "did you mean 'num_heads'?"),
        ({"options": ["name=SiT-XL/3"]}, "no sit network 'SiT-XL/3'; did you mean 'SiT-"),
        ({"options": [*SIT, "prediction=noise"]}, "divide by a coefficient that vanishes"),
        ({"options": [*SIT, "path_type=VP"]}, "path_type 'VP'"),
        ({"autoencoder": "/nowhere"}, "no such folder"),
    ],
)
def test_what_cannot_be(run, tmp_path, changed, said):
    before = tiny.tree(tmp_path)
    with pytest.raises((ConfigError, ArtifactError)) as caught:
        run(**changed)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tiny.tree(tmp_path) == before


def test_another_image_size(run, tmp_path):
    with pytest.raises(
        ArtifactError, match=r"'pos_embed' has the shape \[1, 16, 32\], this network needs \[1, 64, 32\]"
    ):
        run(image_size=32)
    assert not (tmp_path / "model").exists()


def test_an_autoencoder_of_other_channels(run, tmp_path):
    tiny.kl(latent_channels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(ConfigError, match=r"has 3 latent channels, the network 4; .*--autoencoder"):
        run(autoencoder=tmp_path / "three")


def test_an_autoencoder_of_another_factor(run, tmp_path):
    """The network's latents are 8 x 8 pixels of factor 2; of factor 8 they would be those of other images."""
    foreign.vae().save_pretrained(tmp_path / "f8")
    theirs = foreign.draw(architecture("lfm", LFM))
    file = foreign.save(theirs, tmp_path / "lfm.pth")
    given = [f"{key}={' '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in LFM.items()]
    with pytest.raises(ConfigError, match="factor"):
        run("lfm", checkpoint=file, options=given, autoencoder=tmp_path / "f8", image_size=None)


def test_arguments_of_the_class_of_lfm_with_another_factor(run, tmp_path):
    """The side of the images follows from the latents and the autoencoder that is given."""
    sizes = {**SIZES, "img_resolution": 8, "label_dropout": 0.1}
    file = foreign.save(foreign.draw(architecture("lfm", sizes)), tmp_path / "lfm.pth")
    given = [f"{key}={value}" for key, value in sizes.items()]
    config = run("lfm", checkpoint=file, options=given, image_size=None).model.config
    assert (config.image_size, config.latent_shape) == (Size(16, 16), (4, 8, 8))


def test_an_image_size_that_contradicts_the_options(run):
    with pytest.raises((ConfigError, ArtifactError)):
        run(options=[*SIT, "input_size=8"], image_size=64)


def test_edm_takes_its_size_from_its_options(run, tmp_path):
    file = foreign.save(foreign.draw(architecture("edm", EDM)), tmp_path / "edm.pt")
    options = [f"{key}={' '.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in EDM.items()]
    assert run("edm", checkpoint=file, options=options, image_size=None).model.config.image_size == (16, 16)
    with pytest.raises(ConfigError):
        run("edm", checkpoint=file, options=options, image_size=64, out=tmp_path / "other")


def test_a_folder_that_is_there(run, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"is not empty \(mine\.txt, .*give a new folder"):
        run()
    assert (tmp_path / "model" / "mine.txt").read_text(encoding="utf-8") == "keep me"
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ArtifactError, match="is a file"):
        run(out=tmp_path / "file")
    (tmp_path / "empty").mkdir()
    run(out=tmp_path / "empty")
    assert reloaded(tmp_path / "empty").config.image_size == (tiny.IMAGE_SIZE,) * 2


def test_mistakes_are_told_before_the_file_is_read(run, tmp_path):
    """Which may hold gigabytes; here it is not even there."""
    nowhere = tmp_path / "nowhere.pth"
    for changed in ({"family": "sti"}, {"experiment": "ffhq_f8_dit"}, {"family": "lfm", "experiment": "ffhq"}):
        with pytest.raises(ConfigError):
            run(checkpoint=nowhere, **changed)


# The command line


@pytest.fixture
def command(capsys, monkeypatch, tmp_path, kl_folder):
    """`latentflow convert ARGS` into `tmp_path`/model."""
    where = ("--out", tmp_path / "model", "--autoencoder", kl_folder, "--image-size", tiny.IMAGE_SIZE)
    return lambda *args: run_here(("convert", *args, *where, "--device", "cpu"), capsys, monkeypatch)


def test_command(command, sit_file, tmp_path):
    done = command("sit", sit_file, *SIT, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["model"] == str(tmp_path / "model")
    assert report["weights of"] == "the file itself"
    assert report["classes"] == 3
    assert report["self-check"].startswith("does not look trained")
    expected = sum(tensor.numel() for tensor in reloaded(tmp_path / "model").network.state_dict().values())
    assert report["parameters"] == f"{expected:,}"


def test_command_without_a_probe_prints_its_notes(command, tmp_path):
    file = foreign.save(foreign.draw(architecture("dit", {**SIZES, "input_size": 8})), tmp_path / "dit.pt")
    done = command("dit", file, *SIT, "--no-check")
    assert done.code == 0, done.err
    assert "left out" in done.out
    assert "the learned variance is left out" in done.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("sti",), "did you mean 'sit'?"),
        (("sit", "--experiment", "ffhq_f8_dit"), "--experiment names one of LFM's"),
        (("lfm", "--experiment", "ffhq_f8_dti"), "did you mean 'ffhq_f8_dit'?"),
        (("lfm",), "--experiment NAME"),
        (("sit", "hidden_size"), "not of the form key=value"),
        (("sit", "name=SiT-L/2"), "is not a checkpoint of this network"),
    ],
)
def test_command_refuses_in_one_line(command, sit_file, tmp_path, args, said):
    before = tiny.tree(tmp_path)
    family, *rest = args
    done = command(family, sit_file, *rest)
    assert done.code == 2, done
    assert done.error.startswith("latentflow: ")
    assert said in done.error
    assert tiny.tree(tmp_path) == before


def test_command_runs_no_code(command, bomb, tmp_path):
    done = command("sit", bomb(tmp_path / "model.pth"), *SIT)
    assert done.code == 2
    assert done.error.startswith("latentflow: ")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("value", [10**9, 10**30, -1, "much", "nan", "[[[1]]]", "{a: 1}"])
@pytest.mark.parametrize("family", ["sit", "edm", "lfm"])
def test_options_beyond_reason(run, tmp_path, family, value):
    """Refused before anything is built from them, whichever it is."""
    flags = {"model_type": "adm", "image_size": 16, "num_in_channels": 4, "num_out_channels": 4, "nf": 32}
    flags |= {"f": 2, "num_res_blocks": 1, "ch_mult": "1 2", "attn_resolutions": "4"}
    sound = {"sit": SIZES, "edm": EDM, "lfm": flags}[family]
    for key in sound.keys() - {"model_type"}:
        options = [f"{name}={value if name == key else given}" for name, given in sound.items()]
        with pytest.raises((ConfigError, ArtifactError)) as caught:
            run(family, options=options, image_size=None)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()

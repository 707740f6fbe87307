"""Which network a config asks for, what its output means, and a model with a U-Net from training to disk."""

import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from latentflow.api import LatentFlow
from latentflow.artifacts import read_tensors
from latentflow.commands.train import train as train_command
from latentflow.errors import ConfigError, LatentFlowError
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.flow.solvers import integrate
from latentflow.model.config import ModelConfig
from latentflow.model.flow_model import read_config
from latentflow.networks.dit import DiT, DiTConfig
from latentflow.networks.running import set_memory
from latentflow.networks.unet import UNet, UNetConfig
from latentflow.networks.velocity_network import (
    Denoiser,
    DenoiserPrediction,
    NetworkConfig,
    NoisePrediction,
    NoisePredictor,
    PredictionConfig,
    VelocityPrediction,
    build_network,
)
from latentflow.shapes import Condition, per_image
from latentflow.training.checkpoint import newest_checkpoint
from latentflow.training.config import load_recipe
from tests import tiny
from tests.dispatch import watched
from tests.exact import GaussianData

NETWORK, PREDICTION = TypeAdapter(NetworkConfig), TypeAdapter(PredictionConfig)
UNET = {"kind": "unet", "channels": 8, "multipliers": [1, 2], "blocks_per_level": 1, "norm_groups": 4, "num_heads": 2}
NOTHING = Condition()


# Configs ---------------------------------------------------------------------------------------------------------


def test_the_kind_says_which_network():
    dit, unet = tiny.RECIPE["network"], NETWORK.validate_python(UNET)
    assert type(unet) is UNetConfig and NETWORK.validate_python(unet) is unet
    assert type(NETWORK.validate_python({"kind": "dit", **dit})) is DiTConfig
    assert type(NETWORK.validate_python(dit)) is DiTConfig  # nothing said, as in recipes before there were two
    for made in (unet, NETWORK.validate_python(dit)):
        assert NETWORK.validate_json(made.model_dump_json()) == made


def test_the_kind_says_what_is_predicted():
    assert PREDICTION.validate_python({}) == VelocityPrediction()
    assert PREDICTION.validate_python({"kind": "noise", "num_steps": 10}) == NoisePrediction(num_steps=10)
    assert PREDICTION.validate_python({"kind": "edm"}) == DenoiserPrediction()
    for made in (VelocityPrediction(), NoisePrediction(first_beta=0.01), DenoiserPrediction(sigma_max=10)):
        assert PREDICTION.validate_python(made.model_dump(mode="json")) == made
    with pytest.raises(ValidationError, match="Extra inputs"):
        PREDICTION.validate_python({"num_steps": 10})


@pytest.mark.parametrize("kind", ["unte", "UNet", None, ["unet"], 3])
def test_an_unknown_kind_names_those_there_are(kind):
    with pytest.raises((ConfigError, ValidationError), match=r"kind|tag.*'dit', 'unet'|discriminator"):
        NETWORK.validate_python({**UNET, "kind": kind})
    with pytest.raises((ConfigError, ValidationError), match=r"kind|tag.*'velocity', 'noise', 'edm'|discriminator"):
        PREDICTION.validate_python({"kind": kind})


@pytest.mark.parametrize("value", ["unet", None, 3, [], 1.5])
def test_what_is_no_section_is_refused(value):
    for adapter in (NETWORK, PREDICTION):
        with pytest.raises((ConfigError, ValidationError)):
            adapter.validate_python(value)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("{kind: unte}", "unknown kind 'unte'; did you mean 'unet'"),
        ("{kind: unet, channels: 8}", "network without multipliers"),
        ("{kind: unet, channels: x, multipliers: [1]}", r"network\.channels = 'x' is not a whole number"),
        ("{kind: unet, channels: 8, multipliers: [1], depth: 3}", "unknown network option 'depth'"),
        ("unet", "'unet'"),
    ],
)
def test_a_recipe_explains_what_is_wrong_with_its_network(network, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe("demo", [f"network={network}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prediction", "kind"),
    [(VelocityPrediction(), UNet), (NoisePrediction(), NoisePredictor), (DenoiserPrediction(), Denoiser)],
)
def test_what_is_built(prediction, kind):
    facts = {"channels": 4, "num_classes": 3, "inpainting": True, "num_map_classes": 2}
    made = build_network(UNetConfig(**UNET), prediction, **facts)
    assert type(made) is kind
    inner = made if kind is UNet else made.network
    assert (inner.in_channels, inner.out_channels, inner.vectors.num_classes) == (4, 4, 3)
    assert inner.spatial.num_channels == 13
    assert isinstance(build_network(DiTConfig(**tiny.RECIPE["network"]), VelocityPrediction(), channels=4), DiT)
    # Nothing of the wrapper is saved: the weights are the network's own.
    assert {key.removeprefix("network.") for key in made.state_dict()} == inner.state_dict().keys()


# Published sizes -------------------------------------------------------------------------------------------------

FOUR = {"kind": "unet", "channels": 256, "multipliers": [1, 2, 3, 4]}
ADM = {**FOUR, "variant": "adm", "attention_factors": [8]}
DHARIWAL = {**FOUR, "variant": "dhariwal", "attention_sizes": [16, 8, 4], "latent_size": 32}


@pytest.mark.parametrize(
    ("name", "network", "facts", "millions"),
    [
        ("celeb256_f8_adm", {**ADM, "multipliers": [1, 2, 2, 2]}, {}, 153.1),
        ("ffhq_f8_adm", DHARIWAL, {}, 406.4),
        ("bed_f8_adm", DHARIWAL, {}, 406.4),
        ("church_f8_adm", ADM, {}, 356.1),
        ("imnet_f8_adm", DHARIWAL, {"num_classes": 1000}, 407.4),
        ("celeb512_f8_adm", {**ADM, "multipliers": [1, 2, 2, 2, 4], "attention_factors": [8, 16]}, {}, 352.2),
        (
            "celeb1024_f8_adm",
            {**DHARIWAL, "multipliers": [1, 1, 2, 2, 4, 4], "attention_sizes": [16, 8], "latent_size": 128},
            {},
            531.8,
        ),
        ("inpainting_kl", ADM, {"inpainting": True}, 356.1),
        ("semantic_kl", ADM, {"num_map_classes": 19}, 356.1),
        ("imnet_f8_ditb2", {"name": "DiT-B/2"}, {"num_classes": 1000}, 130.5),
        ("celeb_f8_dit", {"name": "DiT-L/2"}, {}, 457.1),
        ("ffhq_f8_dit", {"name": "DiT-L/2"}, {}, 457.1),
        ("bed_f8_dit", {"name": "DiT-L/2"}, {}, 457.1),
        ("church_f8_dit", {"name": "DiT-L/2"}, {}, 457.1),
    ],
)
def test_parameters_of_the_published_experiments(name, network, facts, millions):
    with torch.device("meta"):
        made = build_network(NETWORK.validate_python(network), VelocityPrediction(), channels=4, **facts)
    count = sum(parameter.numel() for parameter in made.parameters())
    if isinstance(made, DiT):  # counted there: frozen positions of 256 tokens
        count += 256 * made.config.hidden_size
    assert round(count / 1e6, 1) == millions


# Noise prediction ------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A stand-in for a network that records its inputs and returns `answer(latents, time)`."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.time = None

    def forward(self, latents, time, condition):
        assert condition is NOTHING
        self.time = time
        return self.answer(latents, time)


def chain(config: NoisePrediction) -> np.ndarray:
    """sqrt(abar) of every step of the chain."""
    betas = np.linspace(config.first_beta, config.last_beta, config.num_steps)
    return np.sqrt(np.cumprod(1 - betas))


def best_noise(config: NoisePrediction, std: float) -> Recorder:
    """E[noise | x] of N(0, std^2) on the chain; between its steps the angle changes evenly."""
    angles = np.arccos(chain(config))

    def answer(latents, step):
        assert step.min() >= 0 and step.max() <= config.num_steps - 1
        angle = np.interp(step.double().numpy(), np.arange(config.num_steps), angles)
        gain = np.sin(angle) / (np.cos(angle) ** 2 * std**2 + np.sin(angle) ** 2)
        return per_image(torch.from_numpy(gain), latents) * latents

    return Recorder(answer)


def points(num: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, 2, 3, 3, dtype=dtype, generator=torch.Generator().manual_seed(seed))


CHAINS = pytest.mark.parametrize(
    "chain_of",
    [NoisePrediction(), NoisePrediction(num_steps=250, first_beta=4e-4, last_beta=0.08), NoisePrediction(num_steps=2)],
    ids=["ddpm", "250 steps", "2 steps"],
)


@CHAINS
def test_the_best_noise_gives_the_exact_velocity(chain_of):
    gaussian = GaussianData(CosinePath(), mean=0.0, std=0.4)
    first, last = 2 / math.pi * np.arccos(chain(chain_of)[[0, -1]])
    time = torch.linspace(first, last, 301, dtype=torch.float64)
    predictor = NoisePredictor(best_noise(chain_of, 0.4), chain_of)
    x = points(301)
    torch.testing.assert_close(predictor(x, time, NOTHING), gaussian.velocity(x, time), rtol=0, atol=1e-4)
    # float32, as models run; the noise is divided by cos(angle), at the end of the usual chain by 0.0064.
    narrow = predictor(x.float(), time.float(), NOTHING)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), gaussian.velocity(x, time), rtol=0, atol=1e-3)


@CHAINS
def test_outside_the_chain_the_network_gets_its_ends(chain_of):
    std, x = 0.4, points(2)
    network = best_noise(chain_of, std)
    velocity = NoisePredictor(network, chain_of)(x, torch.tensor([0.0, 1.0], dtype=torch.float64), NOTHING)
    assert network.time.tolist() == [0, chain_of.num_steps - 1]
    alpha = torch.tensor(chain(chain_of)[[0, -1]])
    sigma = (1 - alpha**2).sqrt()
    noise = per_image(sigma / (alpha**2 * std**2 + sigma**2), x) * x
    # At t = 0 the angle is 0; after the end of the chain it stays the last.
    expected = [math.pi / 2 * noise[0], math.pi / 2 * (noise[1] - sigma[1] * x[1]) / alpha[1]]
    torch.testing.assert_close(velocity, torch.stack(expected), rtol=1e-4, atol=1e-4)


@CHAINS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 5e-3)])
def test_at_the_time_of_a_step_the_network_gets_that_step(chain_of, dtype, tolerance):
    # In float32 neighbouring times near 1 lie 0.002 steps of the usual chain apart.
    network = Recorder(lambda latents, step: latents)
    time = torch.from_numpy(2 / math.pi * np.arccos(chain(chain_of))).to(dtype)
    NoisePredictor(network, chain_of)(points(len(time), dtype), time, NOTHING)
    expected = torch.arange(chain_of.num_steps, dtype=torch.float64)
    torch.testing.assert_close(network.time.double(), expected, rtol=0, atol=tolerance)


@CHAINS
def test_steps_grow_with_time(chain_of):
    network = Recorder(lambda latents, step: latents)
    time = torch.linspace(0, 1, 5001)
    NoisePredictor(network, chain_of)(points(5001, torch.float32), time, NOTHING)
    steps = network.time
    assert (steps.diff() >= 0).all()
    inside = (steps > 0) & (steps < chain_of.num_steps - 1)
    assert (steps.diff()[inside[:-1]] > 0).all() and inside.sum() > 400
    assert (steps[0], steps[-1]) == (0, chain_of.num_steps - 1)


# A denoiser ------------------------------------------------------------------------------------------------------

DENOISERS = pytest.mark.parametrize(
    "made_for",
    [DenoiserPrediction(), DenoiserPrediction(sigma_data=1.3, sigma_min=0.01, sigma_max=50)],
    ids=["usual", "other"],
)


def best_denoiser(config: DenoiserPrediction, std: float) -> Recorder:
    """F of the denoiser D(y) = std^2 / (std^2 + sigma^2) y that is best for N(0, std^2): (D - c_skip y) / c_out."""
    d = config.sigma_data

    def answer(scaled, log_sigma):
        sigma = (4 * log_sigma).exp()
        assert sigma.min() >= config.sigma_min * 0.999 and sigma.max() <= config.sigma_max * 1.001
        c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2).sqrt()
        y = scaled * per_image((sigma**2 + d**2).sqrt(), scaled)  # c_in = 1 / sqrt(sigma^2 + d^2)
        denoised = per_image(std**2 / (std**2 + sigma**2), y) * y
        return (denoised - per_image(c_skip, y) * y) / per_image(c_out, y)

    return Recorder(answer)


@DENOISERS
def test_the_best_denoiser_gives_the_exact_velocity(made_for):
    gaussian = GaussianData(LinearPath(sigma_min=0), mean=0.0, std=0.4)
    first, last = (sigma / (1 + sigma) for sigma in (made_for.sigma_min, made_for.sigma_max))
    time = torch.linspace(first, last, 301, dtype=torch.float64)
    denoiser, x = Denoiser(best_denoiser(made_for, 0.4), made_for), points(301)
    torch.testing.assert_close(denoiser(x, time, NOTHING), gaussian.velocity(x, time), rtol=0, atol=1e-9)
    narrow = denoiser(x.float(), time.float(), NOTHING)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), gaussian.velocity(x, time), rtol=0, atol=1e-4)


@DENOISERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_denoiser_at_both_ends(made_for, dtype):
    std, d = 0.4, made_for.sigma_data
    network, time, x = best_denoiser(made_for, std), torch.tensor([0.0, 1.0], dtype=dtype), points(2, dtype)
    velocity = Denoiser(network, made_for)(x, time, NOTHING)
    ends = (made_for.sigma_min, made_for.sigma_max)
    assert network.time.tolist() == pytest.approx([math.log(sigma) / 4 for sigma in ends], rel=1e-6)
    # v = -x - F(x / d) at t = 0 and x - d F(x) at t = 1; the exact velocities there are -x and x.
    inner = [sigma * (std**2 - d**2) / (d * (std**2 + sigma**2)) for sigma in ends]
    expected = torch.stack([-x[0] - inner[0] / d * x[0], x[1] - d * inner[1] * x[1]])
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)


def exact_noise(std: float):
    return NoisePredictor(best_noise(NoisePrediction(), std), NoisePrediction())


def exact_denoiser(std: float):
    return Denoiser(best_denoiser(DenoiserPrediction(), std), DenoiserPrediction())


@pytest.mark.parametrize("std", [0.4, 2.0])
@pytest.mark.parametrize("made", [exact_noise, exact_denoiser])
def test_from_noise_to_data(made, std):
    network = made(std)
    noise = points(400)
    solution = integrate(lambda x, t: network(x, t, NOTHING), noise, torch.linspace(1, 0, 201, dtype=torch.float64))
    data = solution.x
    assert (data / noise).mean().item() == pytest.approx(std, rel=0.01)
    assert data.std().item() == pytest.approx(std * noise.std().item(), rel=0.01)


@pytest.mark.parametrize("wrapper", [exact_noise, exact_denoiser])
def test_wrapped_gradients_reach_latents(wrapper):
    x = points(3).requires_grad_()
    wrapper(0.4)(x, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), NOTHING).sum().backward()
    assert x.grad.isfinite().all()


# Models ----------------------------------------------------------------------------------------------------------


def model_config(kl, **changes) -> ModelConfig:
    values = {**tiny.model(kl).config.model_dump(), "network": UNET, **changes}
    return ModelConfig.model_validate(values)


@pytest.mark.parametrize(
    ("prediction", "path", "message"),
    [
        ({"kind": "noise"}, {"kind": "linear"}, "predicts noise needs the cosine path, not linear"),
        ({"kind": "edm"}, {"kind": "cosine"}, "denoiser needs the linear path with sigma_min 0"),
        ({"kind": "edm"}, {"kind": "linear"}, "denoiser needs the linear path with sigma_min 0"),
        ({"kind": "noise"}, {"kind": "cosine"}, None),
        ({"kind": "edm"}, {"kind": "linear", "sigma_min": 0}, None),
        ({}, {"kind": "cosine"}, None),
    ],
)
def test_predictions_and_their_paths(kl, prediction, path, message):
    if message is None:
        made = model_config(kl, prediction=prediction, path=path)
        assert ModelConfig.model_validate_json(made.model_dump_json()) == made
        return
    with pytest.raises((ConfigError, ValidationError), match=message):
        model_config(kl, prediction=prediction, path=path)


def test_the_pixel_multiple(kl):
    assert model_config(kl).pixel_multiple == tiny.FACTOR * 2
    assert model_config(kl, network={**UNET, "multipliers": [1, 1, 1, 2]}).pixel_multiple == tiny.FACTOR * 8


@pytest.mark.parametrize(
    ("variant", "prediction", "path"),
    [
        ("adm", {}, {"kind": "linear"}),
        ("ncsn++", {"kind": "edm"}, {"kind": "linear", "sigma_min": 0}),
        ("ddpm++", {"kind": "noise"}, {"kind": "cosine"}),
    ],
)
def test_a_model_with_a_unet_survives_the_disk(kl, tmp_path, variant, prediction, path):
    config = model_config(kl, network={**UNET, "variant": variant}, prediction=prediction, path=path)
    network = tiny.randomise(config.build_network()).eval().requires_grad_(False)
    made = LatentFlow(config, network, kl)
    made.save_pretrained(tmp_path / "model")
    torch.manual_seed(99)  # nothing of the reloaded model is drawn
    loaded = LatentFlow.from_pretrained(tmp_path / "model", device="cpu")
    assert loaded.config == read_config(tmp_path / "model") == config
    x, time = torch.randn(3, 4, 8, 12), torch.tensor([0.0, 0.5, 1.0])
    condition = Condition(torch.tensor([0, 2, 3]))
    assert torch.equal(made.velocity(x, time, condition), loaded.velocity(x, time, condition))
    assert made.velocity(x, time, condition).isfinite().all()
    request = {"num": 2, "classes": [0, 1], "seed": 3}
    for one, other in zip(made.sample(**request).images, loaded.sample(**request).images, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


STATE = ("network.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


@pytest.mark.parametrize("variant", ["adm", "ncsn++"])
def test_a_resumed_training_drops_out_the_same(tmp_path, cache, kl_folder, variant):
    network = UNetConfig(**{**UNET, "variant": variant, "attention_factors": [2], "dropout": 0.1})

    def train(name: str, steps: int, **training):
        recipe = tiny.recipe(
            autoencoder=kl_folder,
            data={"path": cache},
            out=tmp_path / name,
            network=network,
            training={"steps": steps, "memory": "recompute-cheap", **training},
        )
        return train_command(recipe, runtime=tiny.CPU).run

    whole = train("whole", 6)
    torch.manual_seed(99)  # what a process has drawn before is no matter
    train("parts", 2)
    torch.rand(7)
    parts = train("parts", 6)
    for file in STATE:
        assert (newest_checkpoint(whole) / file).read_bytes() == (newest_checkpoint(parts) / file).read_bytes()
    for file in ("velocity.safetensors", "config.json"):
        assert (whole / "model" / file).read_bytes() == (parts / "model" / file).read_bytes()
    assert read_config(whole / "model").network == network
    weights = read_tensors(newest_checkpoint(whole) / "network.safetensors")
    assert weights["out_conv.weight"].any()  # it has learned
    loaded = LatentFlow.from_pretrained(whole, device="cpu")
    assert len(loaded.sample(num=2, seed=0).images) == 2
    if variant == "ncsn++":  # frequencies are drawn once and never averaged away
        assert torch.equal(weights["embedding.frequencies"], loaded.network.embedding.frequencies)


def test_training_refuses_images_that_a_unet_cannot_halve(tmp_path, cache, kl_folder):
    network = UNetConfig(**{**UNET, "multipliers": [1, 1, 1, 1, 2]})  # latents of 8 x 8 cannot be halved 4 times
    recipe = tiny.recipe(autoencoder=kl_folder, data={"path": cache}, out=tmp_path / "run", network=network)
    with pytest.raises(LatentFlowError, match=r"latents of 8 x 8 do not fit a U-Net \(adm\) .* multiples of 16"):
        train_command(recipe, runtime=tiny.CPU)
    assert not (tmp_path / "run").exists()


# On a device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", [VelocityPrediction(), NoisePrediction(), DenoiserPrediction()])
@pytest.mark.parametrize(
    "network",
    [
        DiTConfig(depth=2, hidden_size=16, num_heads=2, patch_size=2, variant="classic"),
        DiTConfig(depth=2, hidden_size=16, num_heads=2, patch_size=2, variant="modern"),
        *(UNetConfig(**{**UNET, "variant": variant, "attention_factors": [2]}) for variant in ("adm", "ncsn++")),
    ],
    ids=["classic", "modern", "adm", "ncsn++"],
)
def test_nothing_waits_for_the_device(network, prediction):
    with torch.device("meta"):
        made = build_network(network, prediction, channels=4, num_classes=3, inpainting=True, num_map_classes=2)
        x, time = torch.empty(2, 4, 8, 12), torch.empty(2)
        labels = torch.empty(2, dtype=torch.long)
        condition = Condition(labels, masked_latents=x, mask=torch.empty(2, 1, 8, 12), class_fractions=x[:, :2])
    for mode in ("none", "recompute-cheap"):
        set_memory(made, mode)
        with watched() as waits:
            made(x, time, condition).square().mean().backward()
            with torch.inference_mode():
                made(x, time, condition)
        assert not waits


def test_the_weight_of_a_noise_predictor_makes_its_loss_that_of_the_noise():
    """Over the chain; from its end to t = 1, where the network is asked for its last step, the weight stays finite."""
    generator = torch.Generator().manual_seed(0)
    data, noise, guess = torch.randn(3, 7, 2, 4, 4, generator=generator, dtype=torch.float64)
    time = torch.linspace(0.0, 0.99, 7, dtype=torch.float64)
    predictor = NoisePredictor(lambda latents, step, condition: guess, NoisePrediction()).double()
    path = CosinePath()
    velocity = predictor(path.interpolate(data, noise, time), time, NOTHING)
    of_velocity = (velocity - path.target(data, noise, time)).square().mean((1, 2, 3))
    of_noise = (guess - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(predictor.loss_weight(time) * of_velocity, of_noise, rtol=1e-5, atol=0)
    assert predictor.loss_weight(torch.ones(1)).item() > 0

"""Plans: exact numbers are those of a run, advice that is followed fits, and data need not be here."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentflow.api import LatentFlow
from latentflow.artifacts import read_tensors
from latentflow.autoencoder import Autoencoder
from latentflow.commands import plan as plan_module
from latentflow.commands.plan import plan as plan_command
from latentflow.commands.plan import recipe_to_plan
from latentflow.commands.train import prepare, train
from latentflow.data.sources.images import open_images
from latentflow.errors import ConfigError
from latentflow.networks.dit import DiTConfig
from latentflow.networks.running import MEMORY_MODES
from latentflow.planning import estimate
from latentflow.planning import probe as plan_probe
from latentflow.planning.advice import advice
from latentflow.planning.estimate import cached_bytes
from latentflow.planning.plan import Plan
from latentflow.planning.planned_run import KNOWN_STAGES, PUBLISHED_DATA
from latentflow.planning.probe import RECOMPUTED, Speed, probe
from latentflow.planning.report import numbers, tables
from latentflow.planning.request import PlanRequest
from latentflow.planning.units import gib
from latentflow.training.checkpoint import newest_checkpoint
from latentflow.training.config import FinetuningConfig, Recipe, load_recipe, recipe_names
from latentflow.training.finetuning import trained_share
from latentflow.training.memory import forward_flops
from latentflow.training.optim import OptimizerConfig
from latentflow.training.student_recipe import StudentRecipe
from tests import tiny

NETWORKS = {
    "dit": tiny.RECIPE["network"],
    "modern": {**tiny.RECIPE["network"], "variant": "modern", "value_residual": True},
    "unet": {"kind": "unet", "variant": "ncsn++", "channels": 8, "multipliers": [1, 2], "norm_groups": 4},
}


def planned(recipe: Recipe | StudentRecipe | str, *overrides: str, **options) -> Plan:
    """The plan of a recipe, given by name or as it is."""
    name = recipe if isinstance(recipe, str) else "fruit"
    given = recipe_to_plan(name, overrides) if isinstance(recipe, str) else recipe
    return plan_command(given, name, PlanRequest(**options), tiny.CPU)


def num_bytes(file: Path) -> int:
    return sum(tensor.nbytes for tensor in read_tensors(file).values())


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(
    ("network", "optimizer", "align_weight"),
    [
        *((network, {}, 0.0) for network in NETWORKS),
        *((network, {"kind": "muon"}, 0.0) for network in NETWORKS),
        *((network, {"kind": "muon", "orthogonalise_every": 2}, 0.0) for network in NETWORKS),
        ("modern", {}, 1.0),
        ("dit", {"kind": "muon"}, 1.0),
    ],
)
def test_what_is_exact_is_what_a_run_has_and_writes(recipe, network, optimizer, align_weight):
    chosen = Recipe.model_validate({"network": NETWORKS[network]}).network
    training = {"steps": 3, "align_weight": align_weight}
    given = recipe(training=training, optimizer=optimizer).model_copy(update={"network": chosen})
    found = planned(given)
    run = train(given, runtime=tiny.CPU).run
    folder = run / "checkpoints" / "step-00000003"
    assert found.disk.checkpoint == sum(num_bytes(file) for file in folder.glob("*.safetensors"))
    assert found.memory.exact["optimizer's moments"] == num_bytes(folder / "optimizer.safetensors")
    assert found.memory.exact["moving average"] == num_bytes(folder / "ema.safetensors")
    stage = sum(num_bytes(file) for file in (run / "model" / "autoencoder").glob("*.safetensors"))
    assert found.disk.model == num_bytes(run / "model" / "velocity.safetensors") + stage
    assert found.memory.estimated["autoencoder"] == stage
    model = LatentFlow.from_pretrained(run, device="cpu")
    assert found.num_parameters == sum(parameter.numel() for parameter in model.network.parameters())
    trained = read_tensors(folder / "network.safetensors").items()
    head = sum(tensor.nbytes for name, tensor in trained if name.startswith("head."))
    assert (head > 0) is (align_weight > 0)
    assert found.memory.exact["weights"] == found.memory.exact["gradients"] == 4 * found.num_parameters + head
    assert found.subject.config.latent_shape == model.config.latent_shape
    assert found.subject.config.network == model.config.network
    assert found.subject.assumed == []


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("method", ["full", "lora", "biases"])
def test_a_finetuned_model_is_planned_as_it_is_trained(tmp_path, cache, kl, method):
    """Exact numbers against a run on one class that the source knows and two that it does not."""
    tiny.model(kl, class_names=("pear", "apple")).save_pretrained(tmp_path / "source")
    given = Recipe.model_validate(
        {
            "fit": True,
            "init_from": str(tmp_path / "source"),
            "finetuning": {"method": method},
            "data": {"path": str(cache), "held_out": 0.2},
            "training": {"steps": 2, "precision": "fp32", "preview_every": 0},
            "out": str(tmp_path / "run"),
        }
    )
    found = planned(given)
    prepared = prepare(given, tiny.CPU)
    run = train(given, runtime=tiny.CPU).run
    folder, model = newest_checkpoint(run), run / "model"
    assert found.disk.checkpoint == sum(num_bytes(file) for file in folder.glob("*.safetensors"))
    assert found.memory.exact["optimizer's moments"] == num_bytes(folder / "optimizer.safetensors")
    assert found.memory.exact["moving average"] == num_bytes(folder / "ema.safetensors")
    trained = [one for one in prepared.model.network.parameters() if one.requires_grad]
    assert found.memory.exact["gradients"] == sum(one.nbytes for one in trained)
    assert found.memory.exact["weights"] == sum(one.nbytes for one in prepared.model.network.parameters())
    written = [
        *model.glob("velocity.safetensors"),
        *model.glob("adapter/*.safetensors"),
        *model.glob("autoencoder/*.s*"),
    ]
    assert found.disk.model == sum(num_bytes(file) for file in written)
    assert (found.recipe.training, found.recipe.optimizer) == (prepared.recipe.training, prepared.recipe.optimizer)
    assert (found.recipe.finetuning, found.recipe.sampling) == (prepared.recipe.finetuning, prepared.recipe.sampling)
    assert found.num_parameters == num_bytes(model / "velocity.safetensors") // 4


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("classes", [("cherry", "apple", "berry"), ("pear", "apple")])
def test_what_is_new_is_found_by_the_names_of_classes(tmp_path, cache, kl, classes):
    """A class that the source knows keeps its vector, which low rank leaves as it is."""
    tiny.model(kl, class_names=classes).save_pretrained(tmp_path / "source")
    own = {"method": "lora", "class_from": ["berry=pear"] if "pear" in classes else []}
    data, base = {"path": str(cache), "held_out": 0.0}, str(tmp_path / "source")
    given = recipe_of(fit=True, init_from=base, finetuning=own, data=data, out=str(tmp_path / "run"))
    trained, prepared = planned(given).subject.network, prepare(given, tiny.CPU).model.network
    assert trained_share(trained) == trained_share(prepared)
    unknown = given.model_copy(update={"finetuning": FinetuningConfig(class_from=["kiwi=apple"])})
    with pytest.raises(ConfigError, match="the data have no class 'kiwi'"):
        planned(unknown)


@pytest.mark.parametrize(("method", "least", "most"), [("full", 2.99, 3.0), ("lora", 2.1, 2.6), ("biases", 2.0, 2.4)])
def test_frozen_weights_take_no_time_for_their_gradients(tmp_path, cache, kl, method, least, most):
    """A step of a stated speed takes its operations, and of the update only what is trained is timed."""
    wide = tiny.model(kl).config.model_copy(update={"network": DiTConfig(name="DiT-S/2")})
    LatentFlow(wide, wide.build_network(), kl).save_pretrained(tmp_path / "source")
    given = recipe_of(
        fit=True,
        init_from=str(tmp_path / "source"),
        finetuning={"method": method},
        data={"path": str(cache)},
        training={"preview_every": 0},
    )
    speed = planned(given, device_memory=80, device_tflops=100).speed
    assert least < speed.seconds_per_image * 0.4 * 100e12 / speed.forward_flops < most
    assert speed.seconds_per_forward == pytest.approx(speed.forward_flops / (0.4 * 100e12))


def test_what_is_timed_trains_as_much_as_the_run(tmp_path, cache, kl, monkeypatch):
    tiny.model(kl).save_pretrained(tmp_path / "source")
    built, updated, real = [], [], plan_probe._with_values
    monkeypatch.setattr(
        plan_probe, "_with_values", lambda network, device: built.append(network) or real(network, device)
    )
    monkeypatch.setattr(plan_probe, "_seconds_per_update", lambda number, *rest: updated.append(number) or 0.0)
    given = recipe_of(
        fit=True, init_from=str(tmp_path / "source"), finetuning={"method": "biases"}, data={"path": str(cache)}
    )
    found = planned(given)
    assert found.speed.whole and [trained_share(one) for one in built] == [trained_share(found.subject.network)]
    assert updated == [trained_share(found.subject.network)[0]]


def test_data_for_another_autoencoder_than_that_of_the_source(tmp_path, cache, deterministic):
    tiny.model(deterministic).save_pretrained(tmp_path / "source")
    with pytest.raises(ConfigError, match=r"was trained with autoencoder .*; encode the images with --autoencoder"):
        planned(recipe_of(init_from=str(tmp_path / "source"), data={"path": str(cache)}))


def recipe_of(**given) -> Recipe:
    return Recipe.model_validate(given)


def test_a_head_takes_the_time_of_its_operations(recipe):
    elsewhere = {"device_memory": 80, "device_tflops": 989}
    plain, aligned = (planned(recipe(training={"align_weight": weight}), **elsewhere) for weight in (0.0, 1.0))
    config = plain.subject.config
    ratio = forward_flops(config, aligned=True) / forward_flops(config)
    assert aligned.speed.seconds_per_image / plain.speed.seconds_per_image == pytest.approx(ratio)
    assert aligned.num_parameters == plain.num_parameters


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(
    ("every", "keep", "keep_every", "most", "milestones"),
    [(5, 2, None, 2, 0), (2, 2, None, 3, 0), (5, 1, 3, 5, 3), (4, 2, 4, 3, 2), (3, 1, 5, 4, 2)],
)
def test_checkpoints_on_disk_are_counted_with_milestones(recipe, every, keep, keep_every, most, milestones):
    """Of 10 steps: no more than are ever saved, and no fewer than stay."""
    training = {"checkpoint_every": every, "keep_checkpoints": keep, "keep_every": keep_every}
    disk = planned(recipe(training=training)).disk
    assert (disk.num_checkpoints, disk.num_milestones) == (most, milestones)
    assert disk.run == disk.checkpoint * most + disk.model * (1 + milestones) + disk.previews


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(
    ("every", "keep", "snapshots", "most"), [(100, 2, 2, 2), (100, 2, 4, 3), (5, 2, 3, 3), (1, 9, 8, 10)]
)
def test_averages_are_counted_in_memory_and_on_disk(recipe, every, keep, snapshots, most):
    """Against a run: its folder of averages, and its checkpoints with two of them."""
    lengths, kept = [0.05, 0.1], {"checkpoint_every": every, "keep_checkpoints": keep}
    asked = recipe(training={**kept, "ema_lengths": lengths, "ema_snapshots": snapshots})
    run, found = train(asked, runtime=tiny.CPU).run, planned(asked)
    averages = sum(num_bytes(file) for file in (run / "averages").rglob("*.safetensors"))
    assert found.disk.averages * found.disk.averages_kept == averages
    assert found.disk.checkpoint == sum(num_bytes(file) for file in newest_checkpoint(run).glob("*.safetensors"))
    assert found.disk.num_checkpoints == most
    alone = planned(recipe(training=kept))
    assert alone.disk.averages_kept == alone.disk.averages == 0
    assert found.memory.exact["moving average"] == 3 * alone.memory.exact["moving average"]
    assert found.disk.run - averages - found.disk.model == most * found.disk.checkpoint


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(
    ("steps", "keep_every", "most", "models"),
    [(80, None, 3, 2), (80, 10, 11, 9), (4, None, 2, 0), (16, None, 3, 2)],
)
def test_models_at_shares_of_a_run_are_counted(recipe, steps, keep_every, most, models):
    """Each once, and only those that the run is long enough for; their checkpoints do not stay."""
    training = {"steps": steps, "checkpoint_every": 3, "keep_checkpoints": 2, "keep_every": keep_every}
    disk = planned(recipe(training={**training, "keep_at": [0.0625, 0.125]})).disk
    assert (disk.num_checkpoints, disk.num_milestones) == (most, models)
    assert disk.run == disk.checkpoint * most + disk.model * (1 + models) + disk.previews


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("flip", [False, True])
def test_a_cache_takes_what_its_tensors_take(recipe, cache, flip):
    """The moments that training reads, mirrored ones included where it mirrors; labels."""
    shards = [read_tensors(file) for file in sorted(cache.glob("*.safetensors"))]
    read = ("moments", "labels", *(["moments_flipped"] if flip else []))
    wanted = sum(shard[name].nbytes for shard in shards for name in read)
    found = planned(recipe(data={"flip": flip}))
    assert cached_bytes(found.subject) == found.memory.estimated["latent cache"] == wanted
    assert found.disk.cache_is_here
    assert wanted < found.disk.cache <= sum(file.stat().st_size for file in cache.glob("*.safetensors"))


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("flip", [False, True])
def test_variants_in_a_cache_and_their_input_are_counted(recipe, images, kl, tmp_path, flip):
    cache = tmp_path / "varied"
    tiny.write_cache(open_images(images, tiny.IMAGE_SIZE), kl, cache, flips=True, variants=2)
    shards = [read_tensors(file) for file in sorted(cache.glob("*.safetensors"))]
    read = ["moments", "variant_moments"]
    read += [f"{name}_flipped" for name in read if flip] + ["labels", "variant_numbers"]
    found, plain = (planned(recipe(data={"path": cache, "flip": flip, "augment": share})) for share in (0.5, 0))
    assert cached_bytes(found.subject) == sum(shard[name].nbytes for shard in shards for name in read)
    assert cached_bytes(plain.subject) < cached_bytes(found.subject) / 2
    assert found.num_parameters == plain.num_parameters + 4 * tiny.RECIPE["network"]["hidden_size"]


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "finetune"])
def test_every_recipe_has_a_plan_without_its_data(name):
    """Whatever is not there is assumed, and said to be; but not the model that is finetuned."""
    with pytest.raises(ConfigError, match="add init_from=MODEL"):
        planned("finetune")
    found = planned(name)
    there = name == "demo"
    assert bool(found.subject.assumed) is not there
    record = json.loads(json.dumps(numbers(found)))
    assert record["parameters"] > 10**5
    assert record["memory"]["peak"] > sum(record["memory"]["exact"].values())
    assert record["time"]["seconds"] > 0
    kept = [record["memory"]["kept_for_backward"][mode] for mode in MEMORY_MODES]
    assert kept == sorted(kept, reverse=True)
    for rows in tables(found).values():
        assert all(value and all(isinstance(part, str) for part in (row, value, known)) for row, value, known in rows)


@pytest.mark.parametrize("name", ["celeb1024_f8_adm", "imnet_f8_ditb2", "demo"])
def test_ten_seconds_are_enough(name):
    """Of the processor: the largest network of each kind, and a small one, with the steps that are probed."""
    began = time.process_time()
    found = planned(name)
    assert time.process_time() - began < 10
    assert found.speed.flops_per_second > 0
    assert found.speed.whole == (name == "demo")


def test_recipes_are_for_data_of_known_sizes():
    """A thousand epochs of 30,000 images, say their comments; others are of round numbers of epochs, too."""
    for name, epochs in (("celeb512_f8_adm", 1000), ("ffhq_f8_dit", 500), ("celeb_f8_dit", 500), ("semantic_kl", 175)):
        recipe = load_recipe(name)
        facts = next(facts for start, facts in PUBLISHED_DATA.items() if name.startswith(start))
        assert recipe.training.steps * recipe.training.batch_size / facts.num_images == pytest.approx(epochs, rel=5e-3)


def test_published_autoencoders_are_of_known_sizes(shared):
    """Compared with those that are here, and with what their configs build."""
    for name in ("taesd", "taesd3"):
        known, autoencoder = (
            KNOWN_STAGES[f"madebyollin/{name}"],
            Autoencoder.from_pretrained(shared / "autoencoders" / name),
        )
        assert known.num_bytes == sum(4 * tensor.numel() for tensor in autoencoder.model.state_dict().values())
        found = (autoencoder.factor, autoencoder.num_channels, autoencoder.num_moments)
        assert (known.factor, known.num_channels, known.num_moments) == found


@pytest.mark.usefixtures("unprobed")
def test_what_is_assumed_may_be_said():
    found = planned(tiny.LARGE_RECIPE, images=5000, classes=3, latents=(16, 64, 64))
    assert found.subject.config.latent_shape == (16, 64, 64)
    assert found.subject.config.conditioning.num_classes == 3
    assert found.subject.data.num_images == 5000
    fewer = planned(tiny.LARGE_RECIPE, classes=2, latents=(16, 64, 64)).num_parameters
    assert found.num_parameters - fewer == 768  # one row of the labels' embedding


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("free", [10**6, 10**15])
def test_a_disk_that_is_too_small_is_named(free, monkeypatch):
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    lines = advice(planned(tiny.LARGE_RECIPE, device_memory=80))
    assert any("set out=... to another disk" in line for line in lines) is (free == 10**6)


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("memory", [24, 40, 80])
@pytest.mark.parametrize("name", [tiny.LARGE_RECIPE, "celeb512_f8_adm", "ffhq_f8_dit"])
def test_what_is_advised_fits(name, memory, monkeypatch):
    """Each line of advice, followed, makes a plan that fits; and so does every larger micro-batch not."""
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**15))
    found = planned(name, "training.preview_every=0", device_memory=memory)
    assert found.memory.fits(found.machine.memory) is not any("would fit" in line for line in advice(found))
    for line in advice(found):
        changes = re.findall(r"\S+=\S+", line)
        assert changes, line
        settled = [change for change in changes if not change.startswith("training.memory=")]
        mode = next((change.split("=")[1] for change in changes if change.startswith("training.memory=")), None)
        again = planned(name, "training.preview_every=0", *settled, device_memory=memory)
        assert again.memory.largest_micro_batch(mode or again.memory.mode, again.machine.memory) >= (
            again.memory.micro_batch_size
        )


@pytest.mark.usefixtures("unprobed")
def test_a_network_that_fits_nowhere_has_a_smaller_one_named():
    found = planned("ffhq_f8_dit", device_memory=7)
    assert any("not even one image" in line for line in advice(found))
    line = next(line for line in advice(found) if "network.name" in line)
    smaller = re.search(r"network.name=(\S+)", line)[1]
    assert planned("ffhq_f8_dit", f"network.name={smaller}", device_memory=7).memory.largest_micro_batch(
        "none", 7 << 30
    )


@pytest.mark.usefixtures("unprobed")
def test_processes_share_a_batch():
    one, four = (planned(tiny.LARGE_RECIPE, processes=number, device_memory=80) for number in (1, 4))
    assert four.memory.share * 4 == one.memory.share == 1280
    assert four.memory.exact == one.memory.exact
    assert four.memory.kept("none") * 4 == one.memory.kept("none")
    assert four.memory.estimated["gradients on their way"] == four.memory.exact["gradients"]
    assert four.seconds_per_step < one.seconds_per_step


def test_a_deep_transformer_is_as_slow_as_its_blocks(monkeypatch):
    """With a clock that goes by the blocks, what is found from two of them is what all of them take."""
    deep = planned_config("ffhq_f8_dit")

    def seconds(config, way, images, budget) -> float:
        return images * (0.3 + 0.7 * config.network.depth)

    monkeypatch.setattr(plan_probe, "_seconds_of_pass", seconds)
    monkeypatch.setattr(plan_probe, "_seconds_per_update", lambda config, runtime, lengths: 0.0)
    found = probe(deep, tiny.CPU, images=32, seconds=0.5)
    assert not found.whole
    assert found.seconds_per_image == pytest.approx(0.3 + 0.7 * deep.network.depth)


def test_a_large_unet_is_as_slow_as_its_operations(monkeypatch):
    """With a clock that goes by operations, what is found on smaller latents is what the whole takes."""
    large = planned_config("celeb512_f8_adm")
    monkeypatch.setattr(plan_probe, "_seconds_of_pass", lambda config, *rest: rest[1] * forward_flops(config) / 1e10)
    monkeypatch.setattr(plan_probe, "_seconds_per_update", lambda config, runtime, lengths: 0.0)
    found = probe(large, tiny.CPU, images=8, seconds=0.5)
    assert not found.whole
    assert found.seconds_per_image == pytest.approx(forward_flops(large) / 1e10)


def test_a_speed_may_be_stated():
    """40 % of it is what training is taken to reach: an image of DiT-XL/2 is 712 GFLOP forwards and backwards."""
    sizes = (
        "network={name: DiT-XL/2, variant: modern}",
        "training.batch_size=128",
        "training.preview_every=0",
        "optimizer.kind=adamw",
    )
    found = planned("own_images", *sizes, device_memory=80, device_tflops=989)
    slower = 1 + RECOMPUTED[found.memory.mode] / 3
    assert found.seconds_per_step == pytest.approx(128 * 711.7e9 * slower / (0.4 * 989e12), rel=1e-3)
    assert not found.speed.measured
    assert found.seconds == pytest.approx(found.recipe.training.steps * found.seconds_per_step)


def test_orthogonalisation_takes_time():
    """Per step, whatever the batch: 13.27 TFLOP for the matrices of DiT-XL/2, at the same share of the stated speed."""
    sizes = ("network={name: DiT-XL/2, variant: modern}", "training.batch_size=128", "training.preview_every=0")
    adamw, muon, seldom = (
        planned("own_images", *sizes, *given, device_memory=80, device_tflops=989)
        for given in (
            ["optimizer.kind=adamw"],
            ["optimizer.kind=muon"],
            ["optimizer.kind=muon", "optimizer.orthogonalise_every=4"],
        )
    )
    more = muon.seconds_per_step - adamw.seconds_per_step
    assert more == pytest.approx(13.27e12 / (0.4 * 989e12), rel=1e-3)
    assert seldom.seconds_per_step - adamw.seconds_per_step == pytest.approx(more / 4)


def test_orthogonalisation_is_measured_where_it_is_asked_for():
    config, found = planned_config("demo"), plan_probe.seconds_of_orthogonalisation
    without, measured = (found(config, OptimizerConfig(kind=kind), tiny.CPU) for kind in ("adamw", "muon"))
    assert without == 0
    assert measured > 0


def planned_config(name: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "probe", lambda config, runtime, **given: Speed(1, 1, 1, 1, 1, "", True))
        return planned(name).subject.config


def test_a_small_network_is_probed_as_it_is(recipe):
    """The speed that is found is that of training, to the accuracy of a loaded machine."""
    found = planned(recipe(training={"batch_size": 8}))
    assert found.speed.whole
    assert 1e-6 < found.speed.seconds_per_image < 1
    assert found.seconds_per_step == pytest.approx(8 * found.speed.seconds_per_image + found.speed.seconds_per_update)


@pytest.mark.usefixtures("unprobed")
def test_data_that_went_missing_are_assumed(tmp_path):
    found = planned(tiny.LARGE_RECIPE, f"data.path={tmp_path / 'gone'}")
    assert "gone is not there" in found.subject.assumed[0]
    with pytest.raises(ConfigError, match="no semantic maps"):
        planned("semantic_kl", f"data.path={tiny.write_images(tmp_path / 'flat')}")


def test_bytes_are_said_in_a_unit_that_suits():
    assert [gib(number) for number in (12, 3 << 10, 5 << 20, 6 << 30, 3000 << 30)] == [
        "12 bytes",
        "3 KiB",
        "5 MiB",
        "6.0 GiB",
        "3,000.0 GiB",
    ]


@pytest.mark.usefixtures("unprobed")
def test_more_steps_than_the_images_allow(recipe):
    """30 steps for each of 14 of 18 images; the model of the lowest held-out loss is counted."""
    safe, far = (planned(recipe(data={"held_out": 0.2}, training={"steps": steps})) for steps in (420, 421))
    assert safe.subject.num_trained == 14 and safe.memorisation == ""
    assert far.memorisation.startswith("421 steps for 14 images, 30 per image: it overfits, and may reproduce training")
    assert "training.steps=420 stays below" in far.memorisation
    assert numbers(far)["memorisation"] == far.memorisation
    assert ("memorisation", far.memorisation, "estimate") in tables(far)[""]
    assert numbers(safe)["trained_on"] == 14
    without = planned(recipe(data={"held_out": 0}, training={"steps": 420}))
    assert without.subject.num_trained == 18
    assert safe.disk.num_milestones == without.disk.num_milestones + 1

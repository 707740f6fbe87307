"""What a student draws: in few calls, with guidance for nothing, in all tasks; and what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.errors import ConfigError
from latentflow.evaluation.request import SweepRequest
from latentflow.evaluation.sweep import candidates_of
from latentflow.flow import solvers
from latentflow.model.card import model_card
from latentflow.requests import RequestError
from latentflow.sampling import request as requests
from latentflow.sampling.cost import cost_of_guide, network_calls
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.pipeline import Given, conditioned_velocity, initial_noise
from latentflow.sampling.request import InvertRequest, SampleRequest
from tests import tiny

CONDITIONS = {**tiny.SPATIAL}


@pytest.fixture(scope="module")
def teacher(kl) -> LatentFlow:
    return tiny.model(kl, conditioning=CONDITIONS, time_scale=20.0)


@pytest.fixture(scope="module")
def fresh(teacher) -> LatentFlow:
    """A student that has learned nothing yet."""
    return tiny.student(teacher)


@pytest.fixture(scope="module")
def student(teacher) -> LatentFlow:
    return tiny.student(teacher, seed=1)


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))


def test_the_name_of_the_solver_is_the_same_without_torch():
    assert requests.JUMPS == solvers.JUMPS


@pytest.mark.parametrize("evaluations", [1, 2, 4, 8])
def test_takes_as_many_calls_as_asked_for_with_guidance(student, evaluations):
    drawn = student.sample(num=3, evaluations=evaluations, guidance=3.0)
    assert drawn.evaluations.tolist() == [evaluations] * 3
    assert (drawn.drawing.sampling.solver, drawn.drawing.sampling.steps) == ("jumps", evaluations)
    assert network_calls(drawn.drawing, cost_of_guide(student, drawn.drawing)) == evaluations


def test_preset_is_four_evaluations(student):
    assert student.sample(num=2).evaluations.tolist() == [4, 4]


def test_before_it_has_learned_a_jump_is_an_euler_step_of_its_teacher(fresh, teacher):
    drawn = fresh.sample(num=3, evaluations=4, guidance=5.0)
    assert torch.equal(drawn.latents, teacher.sample(num=3, solver="euler", steps=4, guidance=1.0).latents)


@pytest.mark.parametrize("solver", ["heun", "ab2", "dopri5"])
def test_solvers_of_the_teacher_draw_the_same_before_it_has_learned(fresh, teacher, solver):
    asked = {"num": 2, "solver": solver}
    drawn = fresh.sample(**asked, guidance=2.0)
    assert drawn.drawing.sampling.steps == 25
    steps = {} if solver == "dopri5" else {"steps": 25}
    wanted = teacher.sample(**asked, **steps, guidance=1.0)
    assert torch.equal(drawn.latents, wanted.latents)
    assert torch.equal(drawn.evaluations, wanted.evaluations)  # guidance costs nothing


def test_scale_and_span_matter(student):
    drawn = [
        student.sample(num=2, evaluations=n, guidance=g).latents for n, g in ((2, 1.0), (2, 2.0), (1, 1.0), (1, 8.0))
    ]
    assert all(not torch.allclose(one, other) for i, one in enumerate(drawn) for other in drawn[:i])


def test_an_image_is_the_same_in_any_batch(student):
    together = student.sample(num=5, evaluations=2, guidance=2.0)
    alone = student.sample(num=1, seed=3, evaluations=2, guidance=2.0)
    torch.testing.assert_close(together.latents[3:4], alone.latents)


@pytest.mark.parametrize("method", ["condition", "replacement"])
def test_painting_keeps_known_pixels(student, photo, method):
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    drawn = student.inpaint(photo, Image.fromarray(mask), method=method, classes="berry", evaluations=2)
    (found,) = drawn.arrays
    assert np.array_equal(found[mask == 0], np.asarray(photo)[mask == 0])
    assert not np.array_equal(found[mask > 0], np.asarray(photo)[mask > 0])
    assert drawn.evaluations.tolist() == [2]


def test_edits(student, photo):
    changed = student.image_to_image(photo, strength=0.5, classes="berry", evaluations=2)
    assert changed.evaluations.tolist() == [2]
    assert student.vary(seed=3, num=2, evaluations=1).evaluations.tolist() == [1, 1]
    frames = student.interpolate(seeds=(1, 2), classes=["apple", "berry"], num=3, evaluations=2)
    assert frames.evaluations.tolist() == [4, 4, 4]  # two classes, two velocities
    painted = student.mask_to_image(Image.fromarray(np.zeros((16, 16), np.uint8)), num=2, evaluations=4)
    assert painted.evaluations.tolist() == [4, 4]


def test_inversion_takes_a_solver_of_the_teacher(fresh, teacher, photo):
    found = fresh.invert(photo, steps=4)
    assert found.drawing.sampling.solver == "heun"
    assert torch.equal(found.noise, teacher.invert(photo, solver="heun", steps=4).noise)
    with pytest.raises(RequestError, match="from noise to data, not back; give --solver heun"):
        fresh.invert(photo, evaluations=4)
    with pytest.raises(RequestError, match="from noise to data, not back; use heun"):
        fresh.invert(photo, solver="jumps")
    assert InvertRequest(evaluations=4).preset() == {"solver": "jumps", "steps": 4}


def test_calls_are_one_shape_for_one_graph(student):
    """Times, span and scale are tensors of every call, so that a CUDA graph of one call serves all."""
    seen: list[dict[str, torch.Size]] = []

    def calls(flow):
        def velocity(latents, time, condition):
            seen.append({name: getattr(condition, name).shape for name in condition.names})
            return flow.velocity(latents, time, condition)

        return velocity

    for guidance, solver in ((1.0, "jumps"), (2.0, "jumps"), (2.0, "heun")):
        drawing = make_drawing(student, SampleRequest(num=2, guidance=guidance, solver=solver, steps=2))
        noise = initial_noise(student, drawing)
        velocity = conditioned_velocity(student, drawing, Given().on(student.device, 2), noise.shape, calls)
        solvers.integrate(velocity, noise, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), solver=solver)
    assert {"span", "guidance"} < set(seen[0])
    assert all(one == seen[0] for one in seen)


def test_is_drawn_again_from_its_metadata(student, tmp_path):
    drawn = student.sample(num=1, evaluations=2, guidance=2.0)
    (file,) = drawn.save(tmp_path)
    facts = json.loads(Image.open(file).text["latentflow"])
    assert (facts["sampling"]["solver"], facts["sampling"]["steps"], facts["evaluations"]) == ("jumps", 2, 2)
    again = student.sample(num=1, **{name: facts["sampling"][name] for name in ("solver", "steps", "guidance")})
    assert torch.equal(again.latents, drawn.latents)


def test_is_saved_with_its_teacher(student, tmp_path):
    student.save_pretrained(tmp_path / "model")
    loaded = LatentFlow.from_pretrained(tmp_path / "model", device="cpu")
    assert loaded.config.student == student.config.student
    asked = {"num": 2, "evaluations": 2, "guidance": 2.0}
    assert torch.equal(loaded.sample(**asked).latents, student.sample(**asked).latents)
    assert f"| student of | teacher, weights {student.config.student.weights[:12]} |" in model_card(student.config)


def test_sweep_compares_numbers_of_jumps(student, teacher):
    asked = {"model": "model", "data": "data", "guidance": [1.0, 2.0]}
    names = list(candidates_of(SweepRequest(**asked), student.config))
    assert names == [f"jumps-{n}{g}" for n in (1, 2, 4, 8) for g in ("", "_g2")]
    assert "heun-4" in candidates_of(SweepRequest(**asked), teacher.config)
    default = {name: SweepRequest.model_fields[name].default for name in ("solvers", "steps")}
    assert list(candidates_of(SweepRequest(**asked, **default), student.config)) == names  # as the command line asks
    assert "heun-8" in candidates_of(SweepRequest(**asked, solvers=["heun"], steps=[8]), student.config)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"guidance": 0.5}, "guidance 0.5: a student knows scales from 1 to 8"),
        ({"guidance": 9.0}, "guidance 9: a student knows scales from 1 to 8"),
        ({"guidance": 2.0, "guidance_interval": (0.1, 0.8)}, "guidance_interval 0.1,0.8: a student is guided as"),
        ({"guidance": 2.0, "guided_by": ["label"], "guided_channels": 1}, "guided_by label: a student is guided as"),
        ({"guidance": 2.0, "guided_channels": 1}, "guided_channels 1: a student is guided as"),
        ({"solver": "jumps", "steps": 17}, "steps 17: a student jumps at most 16 times"),
        ({"evaluations": 0}, "evaluations 0: give a whole number from 1 to 16; 2 to 4 are usual"),
        ({"evaluations": 17}, "evaluations 17: give a whole number from 1 to 16"),
        ({"evaluations": 4, "steps": 3}, "evaluations 4: the jumps of a student, which take no steps; leave one out"),
        ({"evaluations": 4, "solver": "heun"}, "evaluations 4: the jumps of a student, which take no solver"),
    ],
)
def test_refused(student, asked, named):
    with pytest.raises(RequestError, match=named):
        student.sample(num=1, **asked)


def test_guide_is_refused(student, teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(RequestError, match="a student takes the guidance scale as an input, and no guide; leave it"):
        student.sample(num=1, guidance=2.0, guide=str(tmp_path / "teacher"))


def test_a_model_that_is_no_student_cannot_jump(teacher):
    with pytest.raises(RequestError, match=r"evaluations 4: the model is no student.*make a student by latentflow dis"):
        teacher.sample(num=1, evaluations=4)
    with pytest.raises(RequestError, match="solver jumps: those of a student, and the model is none; use heun"):
        teacher.sample(num=1, solver="jumps")


def test_without_guidance_in_training_there_is_none(kl):
    unguided = tiny.student(tiny.model(kl, class_names=()), seed=1)
    config = unguided.config
    record = config.student.model_copy(update={"guided": False})
    config = config.model_copy(update={"student": record})
    network = config.build_network()
    assert network.jump_embedding.guidance is None
    plain = LatentFlow(config, tiny.randomise(network).eval(), kl)
    assert plain.sample(num=1, evaluations=2).evaluations.tolist() == [2]
    with pytest.raises(ConfigError, match="this student learned without guidance"):
        plain.sample(num=1, guidance=2.0)

"""The server in one process: pictures, fields, limits and refusals."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.studio.guarding import Guard
from latentflow.studio.queue import DrawingQueue
from latentflow.studio.request import ServeRequest
from latentflow.studio.server import Service, make_app
from tests import tiny


@pytest.fixture(scope="module")
def model(kl) -> LatentFlow:
    return tiny.model(kl, time_scale=20.0)


@pytest.fixture
def client(model) -> Iterator[TestClient]:
    with served(model) as made:
        yield made


class served:
    """A client of a server with some limits."""

    def __init__(self, model: LatentFlow, **limits):
        self.queue = DrawingQueue(most_waiting=limits.get("most_waiting", 64))
        request = ServeRequest(**limits)
        self.service = Service(model, request, self.queue)
        hosts, origins = frozenset(request.hosts), frozenset(request.origins)
        self.guard = Guard(make_app(self.service), request.host, request.token, origins, hosts)
        self.client = TestClient(self.guard, base_url="http://127.0.0.1:8000")

    def __enter__(self) -> TestClient:
        return self.client

    def __exit__(self, *error) -> None:
        self.queue.close()
        self.service.threads.shutdown()


def test_a_picture_is_that_of_the_program(client, model):
    answer = client.post("/sample", json={"seed": 3, "classes": ["berry"], "guidance": 2})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert answer.content == model.sample(seed=3, classes=["berry"], guidance=2.0).png(0)


def test_several_pictures_as_json(client, model):
    answer = client.post("/sample", json={"seed": 3, "num": 4}).json()
    direct = model.sample(num=4, seed=3)
    assert [base64.b64decode(one["png"]) for one in answer["images"]] == [direct.png(row) for row in range(4)]
    assert [one["seed"] for one in answer["images"]] == [3, 4, 5, 6]
    assert answer["images"][1]["request"]["seeds"] == [4]
    assert answer["evaluations"] == direct.mean_evaluations


def test_an_image_is_filled_and_known_pixels_stay(client, model, tmp_path):
    picture = Image.effect_noise((24, 20), 64).convert("RGB")
    mask = Image.new("L", (24, 20))
    mask.paste(255, (4, 4, 10, 10))
    files = {name: (f"../{name}", png(one), "image/png") for name, one in (("image", picture), ("mask", mask))}
    answer = client.post("/inpaint", files=files, data={"request": '{"seed": 5, "classes": "apple"}'})
    assert answer.status_code == 200, answer.text
    filled = Image.open(io.BytesIO(answer.content))
    (direct,) = model.inpaint(picture, mask, seed=5, classes="apple", num=1).images
    assert filled.tobytes() == direct.tobytes()
    assert filled.crop((12, 0, 24, 20)).tobytes() == picture.crop((12, 0, 24, 20)).tobytes()
    in_text = {name: base64.b64encode(content).decode() for name, (_, content, _) in files.items()}
    again = client.post("/inpaint", json={**in_text, "seed": 5, "classes": "apple"})
    assert again.content == answer.content


def png(image: Image.Image) -> bytes:
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()

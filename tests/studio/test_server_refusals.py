"""What the server refuses, and how: one line, the right status, and nothing done."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.studio.tasks import TASKS
from tests import tiny
from tests.studio.test_queue import held
from tests.studio.test_server import client, model, png, served  # noqa: F401 - fixtures


def finished(coroutine) -> None:
    """Run it in a thread of its own: where a browser is open, this one has an event loop."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, coroutine).result()


@pytest.fixture(scope="module")
def painter(kl) -> LatentFlow:
    return tiny.model(kl, conditioning=tiny.SPATIAL)


PICTURE, MASK = png(Image.new("RGB", (24, 20), 90)), png(Image.new("L", (24, 20), 255))
HOLE = Image.new("L", (24, 20))
HOLE.paste(255, (4, 4, 10, 10))


POSTED = {
    "type": "http",
    "method": "POST",
    "path": "/sample",
    "raw_path": b"",
    "query_string": b"",
    "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
}


def refused(answer, status: int, *words: str) -> str:
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]
    assert "\n" not in message and all(word in message for word in words), message
    return message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sed": 1}, ["unknown field 'sed'", "did you mean 'seed'"]),
        ({"seed": -1}, ["seed -1", "give a whole number"]),
        ({"seed": 1.5}, ["seed 1.5", "whole number"]),
        ({"num": 17}, ["num 17", "at most 16 images"]),
        ({"num": 2, "format": "png"}, ["format png", "give json"]),
        ({"format": ["png"]}, ["format", "give png or json"]),
        ({"classes": "aple"}, ["aple", "apple"]),
        ({"classes": {"apple": 1}}, ["classes", "give a name, an index or a list"]),
        ({"classes": [["apple"]]}, []),
        ({"classes": [None]}, []),
        ({"classes": 10**30}, []),
        ({"conditions": {"age": 3}}, ["age"]),
        ({"solver": "../../etc/passwd"}, ["solver", "valid:"]),
        ({"solver": "fitted-../x"}, []),
        ({"steps": 10**9}, ["steps"]),
        ({"guide": "/etc"}, ["unknown field 'guide'"]),
        ({"image_size": "99999x99999"}, ["image_size"]),
        ({"image": "aGk="}, ["sample takes no image 'image'"]),
        ({"guided_by": ["label"] * 3}, []),
    ],
    ids=str,
)
def test_wrong_fields(client, fields, words):  # noqa: F811
    refused(client.post("/sample", json=fields), 422, *words)
    assert client.get("/metrics").text.count('task="sample",status="422"} 1') == 1


@pytest.mark.parametrize(
    "body", ["[1]", "{", "nul", '{"seed": NaN}', '{"seed": 1e999}', '"x"', "[" * 100_000, "9" * 9000]
)
def test_no_json(client, body):  # noqa: F811
    refused(client.post("/sample", content=body, headers={"content-type": "application/json"}), 422)


def test_deep_json(client):  # noqa: F811
    deep = '{"classes": ' + "[" * 200 + "]" * 200 + "}"
    refused(
        client.post("/sample", content=deep, headers={"content-type": "application/json"}), 422, "nested too deeply"
    )


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_types(client, kind):  # noqa: F811
    """Pages of other sites can send these without being asked for; they are not read."""
    refused(client.post("/sample", content=b'{"seed": 1}', headers={"content-type": kind}), 415, "application/json")


def test_every_field_of_a_request_was_looked_at():
    """A new field may name a file of this machine: then it belongs into `_NOT_SERVED`; if not, into this list."""
    drawing = {
        "guidance",
        "guidance_interval",
        "guided_by",
        "guided_channels",
        "solver",
        "steps",
        "shift",
        "rtol",
        "atol",
    }
    drawing |= {
        "num",
        "evaluations",
        "classes",
        "conditions",
        "seed",
        "image_size",
        "fit",
        "feather",
        "method",
        "native",
        "format",
    }
    assert {name for task in TASKS for name in task.fields} == drawing


PATHS = ["/etc/passwd", "../../../etc/passwd", "file:///etc/passwd", "data:image/png;base64,/etc/passwd", "C:\\x.png"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["image", "mask"])
def test_paths_are_not_read(client, path, name):  # noqa: F811
    images = {"image": base64.b64encode(PICTURE).decode(), "mask": base64.b64encode(png(HOLE)).decode()}
    answer = client.post("/inpaint", json={**images, name: path})
    message = refused(answer, answer.status_code, name)
    assert answer.status_code in (415, 422)
    assert "root:" not in message


@pytest.mark.parametrize("name", ["../../x.png", "/tmp/x.png", "x\0.png", "<script>.svg", "a" * 500])
def test_names_of_files_do_not_matter(client, name, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = {"image": (name, PICTURE, "image/png"), "mask": (name, png(HOLE), "image/png")}
    answer = client.post("/inpaint", files=files)
    assert answer.status_code == 200, answer.text
    facts = Image.open(io.BytesIO(answer.content)).info["latentflow"]
    assert json.loads(facts)["inputs"]["image"].startswith("image sha256:")
    assert list(tmp_path.iterdir()) == []


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    "content", [SVG, b"<html>", b"%PDF-1.7", b"PK\x03\x04zip", b"\x1f\x8bgz", b"hello", b"", b"%!PS\n"]
)
def test_what_is_no_image(client, content):  # noqa: F811
    files = {"image": ("a.png", content, "image/png"), "mask": ("b.png", png(HOLE), "image/png")}
    refused(client.post("/inpaint", files=files), 415, "cannot read the image image")


def bomb(side: int) -> bytes:
    """A small PNG file of many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("side", "words"), [(2000, "at most 1,000,000 are taken"), (17_000, "pixels")])
def test_a_small_file_of_many_pixels(model, side, words):  # noqa: F811
    content = bomb(side)
    assert len(content) < 400_000
    with served(model, most_megapixels=1) as limited:
        files = {"image": ("a.png", content, "image/png"), "mask": ("b.png", png(HOLE), "image/png")}
        refused(limited.post("/inpaint", files=files), 413, words)


def test_text_in_a_png_that_unpacks_to_much(client):  # noqa: F811
    packed = zlib.compress(bytes(100 << 20), 9)
    body = b"tEXtra\0\0" + packed
    chunk = struct.pack(">I", len(body) - 4 + 4) + b"zTXt" + b"note\0\0" + packed
    chunk = struct.pack(">I", len(chunk) - 8) + chunk[4:] + struct.pack(">I", zlib.crc32(chunk[4:]))
    content = PICTURE[:33] + chunk + PICTURE[33:]
    files = {"image": ("a.png", content, "image/png"), "mask": ("b.png", png(HOLE), "image/png")}
    assert client.post("/inpaint", files=files).status_code in (200, 422)


def test_a_body_that_is_too_large(model):  # noqa: F811
    with served(model, most_megabytes=1) as limited:
        large = {"image": ("a.png", bytes(1 << 20), "image/png"), "mask": ("b.png", MASK, "image/png")}
        refused(limited.post("/inpaint", files=large), 413, "more than 1,048,576 bytes")

        parts = (bytes(1 << 16) for _ in range(17))  # without a length that is said beforehand
        refused(limited.post("/sample", content=parts, headers={"content-type": "application/json"}), 413)


def test_forms_that_are_wrong(client):  # noqa: F811
    files = {"image": ("a.png", PICTURE, "image/png"), "mask": ("b.png", png(HOLE), "image/png")}
    refused(client.post("/inpaint", files={**files, "extra": ("c", b"x", "x/y")}), 422, "unexpected part 'extra'")
    refused(client.post("/inpaint", files=files, data={"request": "{"}), 422, "not JSON")
    refused(client.post("/inpaint", files=files, data={"seed": "1"}), 422, "unexpected part 'seed'")
    refused(client.post("/inpaint", files={"image": files["image"]}), 422, "inpaint needs the image 'mask'")
    headers = {"content-type": "multipart/form-data"}
    refused(client.post("/inpaint", content=b"x", headers=headers), 422, "form")
    headers = {"content-type": "multipart/form-data; boundary=x"}
    refused(client.post("/inpaint", content=b"--x\r\nbad", headers=headers), 422)


def test_what_the_model_cannot_do(client, painter):  # noqa: F811
    refused(client.post("/mask-to-image", files={"map": ("m.png", MASK, "image/png")}), 422, "semantic_map")
    refused(client.post("/translate", files={"image": ("m.png", PICTURE, "image/png")}), 422, "input")
    with served(painter) as other:
        files = {"map": ("m.png", png(Image.new("L", (16, 16), 77)), "image/png")}
        refused(other.post("/mask-to-image", files=files), 422, "77")


def test_a_map_is_painted(painter):
    semantic_map = Image.new("L", (16, 16), 1)
    with served(painter) as other:
        answer = other.post("/mask-to-image", files={"map": ("m.png", png(semantic_map), "image/png")})
    direct = painter.mask_to_image(semantic_map)
    assert Image.open(io.BytesIO(answer.content)).tobytes() == direct.images[0].tobytes()


# Who asks


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "attacker.example"}, 403),
        ({"host": "127.0.0.1.attacker.example:8000"}, 403),
        ({"host": "192.168.0.7:8000"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "https://attacker.example"}, 403),
        ({"origin": "http://127.0.0.1:9000"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
    ids=str,
)
def test_hosts_and_origins(client, headers, status):  # noqa: F811
    for answer in (client.get("/info", headers=headers), client.post("/sample", json={"seed": 1}, headers=headers)):
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_an_origin_that_is_allowed(model):  # noqa: F811
    site = "https://example.org"
    with served(model, origins=[site], token="secret-token") as open_to_one:
        asked = {"origin": site, "access-control-request-method": "POST"}
        preflight = open_to_one.options("/sample", headers=asked)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == site
        answer = open_to_one.post("/sample", json={}, headers={"origin": site, "authorization": "Bearer secret-token"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == site
        assert open_to_one.options("/sample", headers={**asked, "origin": "https://example.com"}).status_code == 403


def test_a_token(model):  # noqa: F811
    with served(model, token="secret-token") as guarded:
        for given in (
            None,
            "",
            "secret-token",
            "Bearer",
            "Bearer secret-toke",
            "Bearer secret-tokenn",
            "Basic secret-token",
        ):
            headers = {} if given is None else {"authorization": given}
            answer = guarded.post("/sample", json={"seed": 1}, headers=headers)
            refused(answer, 401, "Bearer")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert guarded.get("/info").status_code == 401 and guarded.get("/metrics").status_code == 401
        assert guarded.get("/health").status_code == 200 and guarded.get("/docs").status_code == 200
        headers = {"authorization": "bearer secret-token"}
        assert guarded.post("/sample", json={"seed": 1}, headers=headers).status_code == 200


# The queue


def test_a_full_queue(model):  # noqa: F811
    place = served(model, most_waiting=1)
    with place as limited, held(place.queue, model):
        answer = limited.post("/sample", json={"seed": 1})
        refused(answer, 429, "1 requests are waiting")
        assert int(answer.headers["retry-after"]) >= 1


def test_what_takes_too_long(model):  # noqa: F811
    place = served(model, most_seconds=1)
    with place as limited, held(place.queue, model):
        refused(limited.post("/sample", json={"seed": 1}), 504, "more than 1 s")
        assert place.queue.waiting == 1  # what held it up; the request was given up


def test_a_body_that_does_not_arrive(model):  # noqa: F811
    place = served(model, most_seconds=1)
    sent: list[dict] = []

    async def receive():
        await asyncio.sleep(30)

    async def send(message):
        sent.append(message)

    with place:
        finished(place.guard(POSTED, receive, send))
    assert sent[0]["status"] == 408


def test_more_open_requests_than_the_queue_could_take(model):  # noqa: F811
    place = served(model, most_waiting=1)
    with place as limited:
        place.service._open = 2
        refused(limited.post("/sample", json={"seed": 1}), 429, "3 requests are open")


def test_a_server_that_closes(model):  # noqa: F811
    place = served(model)
    with place as closing:
        place.queue.close()
        answer = closing.post("/sample", json={"seed": 1})
        refused(answer, 503, "being closed")
        assert answer.headers["retry-after"] == "10"
        assert closing.get("/health").status_code == 503
        assert "latentflow_up 0" in closing.get("/metrics").text


def test_a_dead_model(model, monkeypatch):  # noqa: F811
    def lost(*given):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("latentflow.studio.queue.draw_batches", lost)
    with served(model) as dead:
        refused(dead.post("/sample", json={"seed": 1}), 500, "unexpected RuntimeError; the log")
        refused(dead.post("/sample", json={"seed": 1}), 503, "the device failed")
        assert dead.get("/health").json()["status"] == "failed"


def test_a_client_that_leaves(model):  # noqa: F811
    """What nobody waits for any more is not drawn."""
    place = served(model)
    sent = iter([{"type": "http.request", "body": b'{"seed": 1}'}, {"type": "http.disconnect"}])

    async def receive():
        return next(sent)

    async def send(message):
        pass

    with place, held(place.queue, model):
        finished(place.guard(POSTED, receive, send))
        assert place.queue.waiting == 1
    assert place.queue.images_drawn == 1


# Its pages


def test_other_paths(client):  # noqa: F811
    refused(client.get("/nothing"), 404, "/docs")
    refused(client.get("/%2e%2e/%2e%2e/etc/passwd"), 404)
    refused(client.get("/sample"), 405)


def test_the_documentation_is_complete_and_asks_nothing_of_others(client):  # noqa: F811
    page = client.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text and "http://" not in page.text and "https://" not in page.text
    paths = client.get("/openapi.json").json()["paths"]
    for task in TASKS:
        schema = paths[f"/{task.name}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == {*task.fields, *task.images, *task.optional}
        assert all(field.get("description") for field in schema["properties"].values())
        for name in schema["properties"]:
            assert f"<span>{name}</span>" in page.text
    assert {"/info", "/health", "/metrics"} <= paths.keys()


def test_html_in_names_of_classes_stays_text(kl):
    name = "<img src=x onerror=alert(1)>"
    with served(tiny.model(kl, class_names=(name, "cat"))) as other:
        info = other.get("/info")
        assert (
            info.headers["content-type"] == "application/json" and info.headers["x-content-type-options"] == "nosniff"
        )
        assert info.json()["classes"] == [name, "cat"]
        answer = other.post("/sample", json={"classes": [name]})
        assert answer.status_code == 200
        assert "<" not in answer.headers["content-disposition"]
        assert name not in other.get("/docs").text
        refused(other.post("/sample", json={"classes": ["dog"]}), 422)


def test_nothing_names_a_folder_of_this_machine(model, tmp_path):  # noqa: F811
    with served(model) as other:
        for text in (other.get("/info").text, other.get("/openapi.json").text, other.get("/metrics").text):
            assert str(tmp_path.parent) not in text and str(Path(__file__).parents[2]) not in text

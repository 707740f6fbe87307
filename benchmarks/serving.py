"""`latentflow serve` under load, against the pipeline called directly; requests go to 127.0.0.1 alone.

1. Many clients, each with its own connection, ask for single pictures. Each picture is compared with that of
   `LatentFlow.sample` of its seed, byte for byte. Rounds of the server and of direct calls take turns: direct calls in
   batches as large as the server's, and one by one.
2. SIGTERM while all are waiting: every client gets a complete answer, or none.
3. More clients than may wait: some are answered with 429, and the others with right pictures.

    python benchmarks/serving.py [--clients 50] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from measuring import RESULTS, by_clock, setup, write_results
from torch import nn

import latentflow
from latentflow import LatentFlow
from latentflow.autoencoder import Autoencoder
from latentflow.flow.path import LinearPath
from latentflow.model.conditioning import Conditioning
from latentflow.model.config import AUTOENCODER_FOLDER, AutoencoderRecord, ModelConfig, SamplingPreset
from latentflow.networks.dit import DiTConfig
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.pipeline import draw
from latentflow.sampling.request import SampleRequest

_AUTOENCODER = Path(latentflow.__file__).parent / "assets" / "shapes_autoencoder"
_BATCH = 16
_SECONDS = 600  # after which a client gives up


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """A transformer of random weights with the built-in autoencoder."""
    torch.manual_seed(0)
    autoencoder = Autoencoder.from_pretrained(_AUTOENCODER)
    config = ModelConfig(
        image_size=options.image_size,
        network=DiTConfig(depth=options.depth, hidden_size=options.hidden_size, num_heads=2, patch_size=2),
        path=LinearPath(),
        conditioning=Conditioning(class_names=["cat", "dog"], label_dropout=0.1),
        autoencoder=AutoencoderRecord(
            reference=AUTOENCODER_FOLDER,
            content_hash=autoencoder.content_hash,
            factor=autoencoder.factor,
            num_channels=autoencoder.num_channels,
        ),
        normalisation=autoencoder.normalisation,
        sampling=SamplingPreset(solver="euler", steps=options.steps),
    )
    network = config.build_network()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
    LatentFlow(config, network.eval(), autoencoder).save_pretrained(folder)


@dataclass(frozen=True)
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    @property
    def seconds(self) -> np.ndarray:
        """Now, and the processor time that it has used: [2]."""
        times = psutil.Process(self.process.pid).cpu_times()
        return np.array([time.perf_counter(), times.user + times.system])


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    """A server of a model, until the block ends."""
    command = [sys.executable, "-m", "latentflow", "serve", str(model), "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+) ", line)
        if found is None:
            raise SystemExit(f"the server did not begin: {line}")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Server(process, int(found[1]))
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)


@dataclass(frozen=True)
class Answer:
    """What a client got: status 0 for a connection that was closed before anything came, -1 for half an answer."""

    seed: int
    status: int
    body: bytes = b""
    headers: str = ""
    seconds: float = 0.0


async def ask(port: int, seeds: Sequence[int]) -> list[Answer]:
    """One client: a request for each seed, one after the other, over one connection."""
    answers: list[Answer] = []
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return [Answer(seed, 0) for seed in seeds[:1]]
    try:
        for seed in seeds:
            answers.append(await asyncio.wait_for(_answer(reader, writer, seed), _SECONDS))
            if answers[-1].status <= 0:
                break
    finally:
        writer.close()
    return answers


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seed: int) -> Answer:
    body, began = json.dumps({"seed": seed}).encode(), time.perf_counter()
    head = "POST /sample HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, OSError) as error:
        return Answer(seed, -1 if getattr(error, "partial", b"") else 0)
    length = int(re.search(r"content-length: (\d+)", headers.lower())[1])
    try:
        content = await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        return Answer(seed, -1)
    return Answer(seed, int(headers.split(" ", 2)[1]), content, headers, time.perf_counter() - began)


async def ask_together(port: int, seeds: Sequence[Sequence[int]]) -> list[Answer]:
    """All clients at once, each with its own seeds."""
    return [answer for one in await asyncio.gather(*(ask(port, own) for own in seeds)) for answer in one]


class Direct:
    """The same pictures, drawn in this process."""

    def __init__(self, model: Path):
        self.flow = LatentFlow.from_pretrained(model, device="cpu")
        self.flow.reference = model.name

    def picture(self, seed: int) -> bytes:
        """That of `LatentFlow.sample`."""
        return self.flow.sample(num=1, seed=seed).png(0)

    def in_batches(self, first: int, num: int) -> None:
        """Files of `num` pictures in memory."""
        drawing = make_drawing(self.flow, SampleRequest(num=num, seed=first))
        for samples in draw(self.flow, drawing, batch_size=_BATCH):
            for row in range(len(samples.pixels)):
                samples.png(row)


def _clock() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def measure_load(server: Server, direct: Direct, options: argparse.Namespace) -> dict[str, Any]:
    """Part 1; the first round warms up."""
    num = options.clients * options.requests
    spent: dict[str, list[np.ndarray]] = {"served": [], "in batches": [], "one by one": []}
    answers: list[Answer] = []
    for number in range(1 + options.rounds):
        first = number * num
        seeds = [range(first + c, first + num, options.clients) for c in range(options.clients)]
        began = server.seconds
        found = asyncio.run(ask_together(server.port, seeds))
        laps = {"served": server.seconds - began}
        began = _clock()
        direct.in_batches(first, num)
        laps["in batches"] = _clock() - began
        began = _clock()
        expected = {seed: direct.picture(seed) for seed in range(first, first + num)}
        laps["one by one"] = _clock() - began
        answers += [
            Answer(one.seed, one.status, b"" if one.body == expected[one.seed] else b"wrong", "", one.seconds)
            for one in found
        ]
        if number:
            for name, lap in laps.items():
                spent[name].append(lap)
    each = {name: np.median(laps, axis=0) / num for name, laps in spent.items()}
    waited = np.quantile([one.seconds for one in answers[num:]], [0.5, 0.95])
    return {
        "requests": len(answers),
        "errors": sum(one.status != 200 for one in answers),
        "wrong_pictures": sum(one.status == 200 and one.body != b"" for one in answers),
        "seconds_per_picture": {name: by_clock(value) for name, value in each.items()},
        "speed_of_direct_calls_in_batches": by_clock(each["in batches"] / each["served"]),
        "speed_of_direct_calls_one_by_one": by_clock(each["one by one"] / each["served"]),
        "seconds_waited": {"median": float(waited[0]), "95 %": float(waited[1])},
    }


def measure_full_queue(model: Path, direct: Direct, options: argparse.Namespace) -> dict[str, Any]:
    """Part 3."""
    most = max(options.clients // 4, 1)
    with serving(model, "--most-waiting", str(most)) as server:
        seeds = [[client] for client in range(options.clients)]
        answers = asyncio.run(ask_together(server.port, seeds))
    return {
        "most_waiting": most,
        "statuses": _counted(answers),
        "without_retry_after": sum(one.status == 429 and "retry-after:" not in one.headers.lower() for one in answers),
        "wrong_pictures": sum(one.status == 200 and one.body != direct.picture(one.seed) for one in answers),
    }


def measure_end(server: Server, direct: Direct, options: argparse.Namespace) -> dict[str, Any]:
    """Part 2."""

    async def ended() -> list[Answer]:
        asked = asyncio.gather(*(ask(server.port, [client]) for client in range(options.clients)))
        await asyncio.sleep(options.seconds_to_term)
        server.process.send_signal(signal.SIGTERM)
        return [answer for one in await asked for answer in one]

    answers = asyncio.run(ended())
    began = time.perf_counter()
    code = server.process.wait(60)
    return {
        "statuses": _counted(answers),
        "half_answers": sum(one.status == -1 for one in answers),
        "wrong_pictures": sum(one.status == 200 and one.body != direct.picture(one.seed) for one in answers),
        "exit_code": code,
        "seconds_after_the_last_answer": time.perf_counter() - began,
    }


def _counted(answers: Sequence[Answer]) -> dict[str, int]:
    return {str(status): count for status, count in sorted(Counter(one.status for one in answers).items())}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=4, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--seconds-to-term", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", default=RESULTS)
    options = parser.parse_args(arguments)
    setup("cpu", options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        write_model(model, options)
        direct = Direct(model)
        sizes = ("clients", "steps", "depth", "hidden_size", "image_size")
        results: dict[str, Any] = {name: getattr(options, name) for name in sizes}
        with serving(model) as server:
            results["load"] = measure_load(server, direct, options)
            print("load", json.dumps(results["load"], indent=1), flush=True)
            results["sigterm"] = measure_end(server, direct, options)
        results["full_queue"] = measure_full_queue(model, direct, options)
    print(json.dumps({name: results[name] for name in ("sigterm", "full_queue")}, indent=1), flush=True)
    write_results("serving", torch.device("cpu"), results, options.results)
    return results


if __name__ == "__main__":
    main()

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

folder, num, steps, seed = Path(), 4, 50, 0
about = json.loads((folder / "onnx.json").read_text(encoding="utf-8"))
network, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("velocity", "decoder"))
sampling = about["sampling"]
guidance, channels, shift = (sampling[name] for name in ("guidance", "guided_channels", "shift"))
low, high = sampling["guidance_interval"]

conditions = about["conditions"]
nulls = {name: np.full((num, *c["shape"]), c["null"], c["type"]) for name, c in conditions.items()}
given = dict(nulls)  # put here what the images are drawn from
if "labels" in given:
    given["labels"] = np.arange(num) % len(about["class_names"])
unguided = {name: nulls[name] if c["guided"] else given[name] for name, c in conditions.items()}
x = np.random.default_rng(seed).standard_normal((num, *about["latent_shape"]), dtype=np.float32)


def velocity(x, t, inputs):
    return network.run(None, {"latents": x, "time": np.full(num, t, np.float32), **inputs})[0]


times = np.linspace(1, 0, steps + 1)
times = shift * times / (1 + (shift - 1) * times)
for t, t_next in pairwise(times):
    v = velocity(x, t, given)
    if guidance != 1 and low <= t <= high:
        v_null = velocity(x, t, unguided)[:, :channels]
        v[:, :channels] = v_null + np.float32(guidance) * (v[:, :channels] - v_null)
    x = x + np.float32(t_next - t) * v

pixels = decoder.run(None, {"latents": x})[0]
for i, image in enumerate(np.round((pixels + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)):
    Image.fromarray(image.squeeze()).save(f"image_{i}.png")

"""A latentflow model as a pipeline of diffusers, which draws the pictures that `latentflow sample` draws.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pipe(num_images=4, classes=["cat", "dog"], guidance_scale=1.5, seed=0).images[0].save("cat.png")

This file needs torch, numpy, Pillow and diffusers alone. Time is 1 at noise and 0 at data; the velocity is
noise - data, and dx/dt = velocity.
"""

import hashlib
import math
from itertools import pairwise

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

# Butcher tableaus: nodes, matrix, weights.
_RUNGE_KUTTA = {
    "euler": ((0,), ((),), (1,)),
    "midpoint": ((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk4": ((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
_ADAMS_BASHFORTH = {"ab2": 2, "ab3": 3, "ab4": 4}  # and their orders
_SOLVERS = (*_RUNGE_KUTTA, *_ADAMS_BASHFORTH)


def _philox(counter, key):
    """Philox 4x32-10 (Salmon et al. 2011): four words from a counter of four int64 tensors and a key of two."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) ^ c1 ^ k0) & low, p1 & low
        c2, c3 = ((p0 >> 32) ^ c3 ^ k1) & low, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _noise(seeds, shape, device):
    """Standard normal numbers by seed, [B, *shape]: those of latentflow, whatever the batch."""
    number = math.prod(shape)
    half = -(-number // 4) * 2
    purpose = int.from_bytes(hashlib.blake2b(b"str:sample", digest_size=8).digest(), "big") >> 1
    seeds = torch.tensor(seeds, dtype=torch.int64, device=device)[:, None]
    blocks, zero = torch.arange(half // 2, device=device)[None], torch.zeros(1, 1, dtype=torch.int64, device=device)
    counter = [blocks, zero, seeds & 0xFFFFFFFF, seeds >> 32]
    words = torch.stack(_philox(counter, (purpose & 0xFFFFFFFF, purpose >> 32)), dim=2).flatten(1)
    u = words[:, :half].float().mul_(2.0**-32).add_(2.0**-33)
    angle = words[:, half:].float().mul_(2 * math.pi * 2.0**-32)
    radius = u.log_().mul_(-2).sqrt_()
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :number].reshape(len(seeds), *shape)


def _times(steps, shift):
    """The grid from noise to data: `steps` + 1 numbers from 1 to 0."""
    times = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    times = (shift * times / (1 + (shift - 1) * times)).clamp(0, 1).tolist()
    return [1.0, *times[1:-1], 0.0]


def _combine(weights, slopes):
    return sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight != 0)


def _runge_kutta(velocity, x, pairs, nodes, matrix, weights):
    """x after all steps, from t to t_next of each of the pairs, by a tableau."""
    for t, t_next in pairs:
        h, slopes = t_next - t, []
        for node, row in zip(nodes, matrix, strict=True):
            time = (1 - node) * t + node * t_next if node else t
            slopes.append(velocity(x + h * _combine(row, slopes) if row else x, time))
        x = x + h * _combine(weights, slopes)
    return x


def _quadrature(nodes, begin, end):
    """The weights with which values at the nodes give the mean of their polynomial from begin to end."""
    s = (torch.tensor(nodes, dtype=torch.float64) - begin) / (end - begin)
    m = torch.arange(len(s), dtype=torch.float64)
    return torch.linalg.solve(s ** m[:, None], 1 / (m + 1)).tolist()


def _adams_bashforth(velocity, x, grid, pairs, order):
    """x after all steps, by the polynomial through the last `order` velocities.

    The first step is one of Heun's method. So is the second of order 3; that of order 4 begins at the start again, with
    the velocities at all three times.
    """
    first, past = x, []  # velocities, newest first
    for step, (t, t_next) in enumerate(pairs):
        h, past = t_next - t, [velocity(x, t), *past][:order]
        weights = _quadrature(grid[step + 1 - len(past) : step + 1][::-1], t, t_next)
        if step >= min(order - 1, 2):
            x = x + h * _combine(weights, past)
        elif step and order > 3:
            end = velocity(x + h * _combine(weights, past), t_next)
            whole = _quadrature([t_next, t, grid[0]], grid[0], t_next)
            x = first + (t_next - grid[0]) * _combine(whole, [end, *past])
        else:
            x = x + h * _combine((1 / 2, 1 / 2), [past[0], velocity(x + h * past[0], t_next)])
    return x


class LatentFlowPipeline(DiffusionPipeline):
    """Draws images by flow matching in the latent space of an autoencoder.

    Args:
        vae: the autoencoder.
        velocity: the network, called as velocity(latents, time, conditions).
        facts: what else the model is: sizes, latent normalisation, class names, null values, sampling preset.
    """

    model_cpu_offload_seq = "velocity->vae"

    def __init__(self, vae, velocity, facts: dict | None = None):
        super().__init__()
        self.register_modules(vae=vae, velocity=velocity)
        self.register_to_config(facts=facts)
        self.facts = facts or {}

    @torch.no_grad()
    def __call__(
        self,
        num_images: int = 1,
        classes: int | str | list | None = None,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        conditions: dict | None = None,
        size: tuple | None = None,
        latents: torch.Tensor | None = None,
        batch_size: int = 16,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Draw images; what is left out comes from the preset of the model.

        Args:
            classes: names or indices, repeated to the number of images; None: image i has the class of its seed.
            seed: image i has the seed `seed` + i, whatever the batch.
            num_inference_steps: intervals of the solver.
            guidance_scale: v = v_null + s (v_cond - v_null); 1: off.
            solver: "euler", "midpoint", "heun", "rk4", "ab2", "ab3" or "ab4".
            conditions: of the model besides labels, as tensors of one row for each image or one for all; see
                `known_part` and `map_fractions`. What is left out has its null value.
            size: height and width in pixels; None: the model's.
            latents: [num_images, C, h, w] to start from in place of the seeds' noise.
            batch_size: images drawn together; it does not change them.
            output_type: "pil", "np" ([n, H, W, P] in [0, 1]), "pt" ([n, P, H, W] in [-1, 1]) or "latent".

        Raises:
            ValueError: a class, condition, solver or number that the model cannot use.
        """
        facts, preset = self.facts, self.facts["sampling"]
        steps = preset["steps"] if num_inference_steps is None else num_inference_steps
        solver = solver or preset["solver"]
        if solver not in _SOLVERS:
            raise ValueError(f"solver {solver!r}: choose one of {', '.join(_SOLVERS)}")
        if steps < 1 or num_images < 1 or batch_size < 1:
            raise ValueError("num_images, num_inference_steps and batch_size must be 1 or more")
        if output_type == "pil" and not facts["is_8_bit"]:
            raise ValueError("the pixels of this model are no 8-bit gray or RGB: use output_type='np' or 'pt'")
        seeds = list(range(seed, seed + num_images))
        labels, conditions = self._labels(classes, seeds, conditions), dict(conditions or {})
        scale = self._scale(guidance_scale, labels, conditions)
        channels, *sides = facts["latent_shape"]
        sides = [side // facts["factor"] for side in size] if size else sides
        drawn = []
        for start in range(0, num_images, batch_size):
            rows = slice(start, start + batch_size)
            x = _noise(seeds[rows], (channels, *sides), self._execution_device)
            x = x if latents is None else latents[rows].to(x)
            given, null = self._conditions(x.shape, labels[rows], conditions, rows)
            drawn.append(self._solve(x.to(self.velocity.dtype), given, null, scale, steps, solver))
        images = self._output([self._decoded(x) if output_type != "latent" else x for x in drawn], output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def known_part(self, image, hole):
        """The conditions of an image with a hole: image [B, P, H, W] in [-1, 1], hole [B, 1, H, W], 1 where to fill."""
        facts = self.facts
        factor, place = facts["factor"], {"device": self._execution_device, "dtype": self.vae.dtype}
        image, hole = image.to(**place), hole.to(**place)
        encoded = self.vae.encode(torch.where(hole > 0, facts["hole_level"], image), return_dict=False)[0]
        raw = encoded.mode() if hasattr(encoded, "mode") else encoded
        if facts["hole_as_sign"]:
            mask = 2 * hole[:, :, ::factor, ::factor] - 1
        else:
            mask = torch.nn.functional.avg_pool2d(hole, factor)
        return {"masked_latents": (raw - self._channels("shift", raw)) * self._channels("scale", raw), "mask": mask}

    def map_fractions(self, semantic_map):
        """The condition of a semantic map [B, H, W] of class indices; indices past the last class are unlabelled."""
        number = len(self.facts["map_class_names"])
        known = torch.as_tensor(semantic_map).to(self._execution_device).long().clamp(0, number)
        one_hot = torch.nn.functional.one_hot(known, number + 1)[..., :number].permute(0, 3, 1, 2).float()
        return {"class_fractions": torch.nn.functional.avg_pool2d(one_hot, self.facts["factor"])}

    def _channels(self, name, like):
        return torch.tensor(self.facts[name], dtype=like.dtype, device=like.device)[:, None, None]

    def _labels(self, classes, seeds, conditions):
        """The label of each image; an empty list for no label."""
        names = self.facts["class_names"]
        if classes is None:
            seen = self.facts["seen_classes"]
            return [seen[seed % len(seen)] for seed in seeds] if seen and not conditions else []
        chosen = []
        for given in [classes] if isinstance(classes, int | str) else classes:
            if given not in names and (isinstance(given, str) or not 0 <= given < len(names)):
                raise ValueError(f"class {given!r}: this model knows {', '.join(names[:20]) or 'no classes'}")
            chosen.append(names.index(given) if given in names else int(given))
        return [chosen[place % len(chosen)] for place in range(len(seeds))] if chosen else []

    def _scale(self, asked, labels, conditions):
        """The guidance scale; the preset's where a condition that supports it is given."""
        of_fields = self.facts["conditions"]
        given = [*(["labels"] if labels else []), *conditions]
        for name in given:
            if name not in of_fields:
                raise ValueError(f"condition {name!r}: this model takes {', '.join(of_fields) or 'none'}")
        for name, one in of_fields.items():
            if one["required"] and name not in given:
                raise ValueError(f"this model was never trained without {name}: give it")
        guided = [name for name in given if of_fields[name]["guided"]]
        if asked is None:
            return self.facts["sampling"]["guidance"] if guided else 1.0
        if asked != 1 and not guided:
            raise ValueError(f"guidance_scale {asked}: no condition is given that guidance could strengthen; use 1")
        return asked

    def _conditions(self, shape, labels, conditions, rows):
        """The conditions of a batch, and the same without those that guidance strengthens."""
        device, num_images, sides = self._execution_device, shape[0], shape[2:]
        given, null = {}, {}
        for name, one in self.facts["conditions"].items():
            dtype = torch.int64 if name == "labels" else torch.float32
            value = torch.tensor(one["null"], dtype=dtype, device=device)
            if name not in ("labels", "columns"):
                value = value.expand(one["channels"], *sides)
            given[name] = value.expand(num_images, *value.shape).contiguous()
            null[name] = given[name]
            if name == "labels" and labels:
                given[name] = torch.tensor(labels, device=device)
            elif name in conditions:
                tensor = torch.as_tensor(conditions[name]).to(device, dtype)
                tensor = tensor if len(tensor) == 1 else tensor[rows]
                given[name] = tensor.expand(num_images, *[-1] * (tensor.dim() - 1))
            if not one["guided"]:
                null[name] = given[name]
        return given, null

    def _solve(self, x, given, null, scale, steps, solver):
        """The latents at t = 0 from the noise x."""
        grid = _times(steps, self.facts["sampling"]["shift"])
        pairs = self.progress_bar(list(pairwise(grid)))

        def velocity(x, t):
            return self._velocity(x, t, given, null, scale)

        if solver in _RUNGE_KUTTA:
            return _runge_kutta(velocity, x, pairs, *_RUNGE_KUTTA[solver])
        return _adams_bashforth(velocity, x, grid, pairs, _ADAMS_BASHFORTH[solver])

    def _velocity(self, x, t, given, null, scale):
        """v_null + scale (v_cond - v_null) inside the interval of guidance, else v_cond."""
        preset = self.facts["sampling"]
        low, high = preset["guidance_interval"]
        time = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        channels = preset["guided_channels"]
        if scale == 1 or not low <= t <= high:
            return self.velocity(x, time, given)
        if scale == 0 and channels is None:
            return self.velocity(x, time, null)
        both = {name: torch.cat([value, null[name]]) for name, value in given.items()}
        v, v_null = self.velocity(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
        mixed = v_null + scale * (v - v_null)
        return mixed if channels is None else torch.cat([mixed[:, :channels], v[:, channels:]], dim=1)

    def _decoded(self, latents):
        """latents [B, C, h, w] => pixels [B, P, H, W] in [-1, 1]."""
        raw = latents / self._channels("scale", latents) + self._channels("shift", latents)
        pixels = self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0].float().clamp(-1, 1)
        return pixels.mean(1, keepdim=True) if self.facts["is_gray"] and pixels.shape[1] > 1 else pixels

    def _output(self, batches, output_type):
        images = torch.cat(batches)
        if output_type in ("latent", "pt"):
            return images
        images = images.permute(0, 2, 3, 1).cpu()
        if output_type == "np":
            return (images.numpy() + 1) / 2
        levels = ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        return [Image.fromarray(np.squeeze(level, 2) if level.shape[2] == 1 else level) for level in levels]

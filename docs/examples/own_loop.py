"""Own loop: warm-up, clipped gradients, an average of the weights, pictures on the way, and a folder at the end."""

import torch

from latentflow import LatentFlow
from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.flow.times import TrainingTimes
from latentflow.networks.dit import DiTConfig
from latentflow.networks.running import borrowed_weights
from latentflow.training.ema import EMA

network = DiTConfig(depth=4, hidden_size=64, num_heads=2, patch_size=2, variant="modern")
model = LatentFlow.assemble(network, "shapes", image_size=32)
shapes, times = SyntheticShapes(128, 32), TrainingTimes(distribution="logit_normal")
pixels = torch.stack([torch.from_numpy(shapes[number].pixels) for number in range(128)]).permute(0, 3, 1, 2)
latents = model.latents(model.moments(pixels))
optimizer = torch.optim.AdamW(model.network.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)
warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
average = EMA(model.network, decay=0.95)
for step in range(61):
    model.network.train()
    data = latents[torch.randint(len(latents), (64,))]
    loss = model.loss(data, time=times.draw(torch.rand(64))).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
    optimizer.step()
    warm_up.step()
    average.update(step)
    if step % 20 == 0:
        print(f"step {step}  loss {loss.item():.3f}")
        with borrowed_weights(model.network, average.average):
            model.sample(num=4, solver="ab2", steps=8, seed=0).save(f"own_loop_pictures/{step:04d}")
model.save_pretrained("own_loop", weights=average.average)

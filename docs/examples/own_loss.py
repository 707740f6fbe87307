"""Own loss term: besides the velocity, the mean of the latents that the network predicts has to be right."""

import torch

from latentflow import LatentFlow
from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.flow.loss import flow_matching_loss
from latentflow.networks.dit import DiTConfig
from latentflow.shapes import Condition

network = DiTConfig(depth=4, hidden_size=64, num_heads=2, patch_size=2)
model = LatentFlow.assemble(network, "shapes", image_size=32)
path, shapes = model.config.path, SyntheticShapes(128, 32)
pixels = torch.stack([torch.from_numpy(shapes[number].pixels) for number in range(128)]).permute(0, 3, 1, 2)
latents = model.latents(model.moments(pixels))
optimizer = torch.optim.AdamW(model.network.parameters(), lr=2e-3)
for step in range(61):
    data = latents[torch.randint(len(latents), (64,))]
    noise, time = torch.randn_like(data), torch.rand(64)
    predicted = []

    def velocity(x, t, predicted=predicted):
        predicted.append(path.data_from_velocity(x, found := model.velocity(x, t, Condition()), t))
        return found

    flow = flow_matching_loss(velocity, path, data, noise, time)
    tint = (predicted[0].mean((2, 3)) - data.mean((2, 3))).square().mean(1)  # [B], of the predicted clean latents
    loss = (flow + 0.5 * (1 - time) * tint).mean()  # less where there is more noise, and less can be known
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}  loss {loss.item():.3f}  velocity {flow.mean().item():.3f}  tint {tint.mean().item():.3f}")
model.save_pretrained("own_loss")

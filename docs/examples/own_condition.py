"""Own condition: a vector for each image, such as the embedding of a text, guided away from the zero vector."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentflow import LatentFlow
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.loss import flow_matching_loss
from latentflow.flow.solvers import integrate
from latentflow.flow.times import sampling_times
from latentflow.shapes import Condition


@dataclass(frozen=True)
class WithVector(Condition):
    vector: Tensor | None = None  # [B, 3], here the colour of a plain picture


class Coloured(nn.Sequential):
    def forward(self, latents, time, condition):
        known = torch.cat([condition.vector, time[:, None]], 1)[:, :, None, None].expand(-1, -1, *latents.shape[2:])
        return super().forward(torch.cat([latents, known], 1))


network = Coloured(nn.Conv2d(8, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 4, 3, padding=1))
model = LatentFlow.assemble(network, "shapes", image_size=16)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
for step in range(201):
    colours, kept = torch.rand(32, 3) * 2 - 1, torch.rand(32, 1) > 0.1  # 1 in 10 is dropped, for guidance
    data = model.encode(colours[:, :, None, None].expand(-1, -1, 16, 16))
    velocity = ConditionedVelocity(model.velocity, WithVector(vector=colours * kept))
    loss = flow_matching_loss(velocity, model.config.path, data, torch.randn_like(data), torch.rand(32)).mean()
    optimizer.zero_grad(), loss.backward(), optimizer.step()
    print(f"step {step}  loss {loss.item():.3f}") if step % 50 == 0 else None
wanted, nothing = WithVector(vector=torch.tensor([[1.0, -1.0, -1.0]])), WithVector(vector=torch.zeros(1, 3))
guided = ConditionedVelocity(torch.inference_mode()(model.velocity), wanted, nothing, scale=1.5)
print("mean colour", model.decode(integrate(guided, torch.randn(1, 4, 4, 4), sampling_times(10)).x).mean((2, 3)))

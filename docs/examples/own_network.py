"""Own network: any module called as network(latents, time, condition), registered so that a folder can name it."""

import torch
from torch import nn

from latentflow import LatentFlow, RegisteredNetwork, register_network
from latentflow.data.sources.synthetic import CLASS_NAMES, SyntheticShapes
from latentflow.model.conditioning import Conditioning
from latentflow.shapes import Condition


@register_network("convnet")
class ConvNet(nn.Module):
    def __init__(self, channels, width, num_classes):
        super().__init__()
        self.known = nn.Embedding(num_classes + 1, width)  # the last label is "no label"
        self.enter, self.leave = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 5, padding=2) for _ in range(3))

    def forward(self, latents, time, condition):
        x, known = self.enter(latents), self.known(condition.labels) * (1 - time[:, None])
        for block in self.blocks:
            x = x + block(nn.functional.silu(x + known[:, :, None, None]))
        return self.leave(x)


shapes = [SyntheticShapes(96, 32)[number] for number in range(96)]
own = RegisteredNetwork(name="convnet", options={"channels": 4, "width": 48, "num_classes": len(CLASS_NAMES)})
model = LatentFlow.assemble(own, "shapes", image_size=32, conditioning=Conditioning(class_names=list(CLASS_NAMES)))
latents = model.encode(torch.stack([torch.from_numpy(one.pixels) for one in shapes]).permute(0, 3, 1, 2) / 127.5 - 1)
labels, optimizer = torch.tensor([one.label for one in shapes]), torch.optim.AdamW(model.network.parameters(), lr=2e-3)
for step in range(60):
    loss = model.loss(latents, Condition(labels=labels)).mean()
    optimizer.zero_grad(), loss.backward(), optimizer.step()
    print(f"step {step}  loss {loss.item():.3f}") if step % 20 == 0 or step == 59 else None
model.save_pretrained("own_network")
print(LatentFlow.from_pretrained("own_network").sample(num=4, classes=["red circle"], guidance=2, seed=0))

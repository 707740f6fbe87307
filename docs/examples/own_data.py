"""Own data: any dataset of tensors. Here pictures of two classes, a disc and a ring, drawn by a formula."""

import torch
from torch.utils.data import DataLoader, Dataset

from latentflow import LatentFlow
from latentflow.model.conditioning import Conditioning
from latentflow.networks.dit import DiTConfig
from latentflow.shapes import Condition


class Discs(Dataset):
    def __len__(self):
        return 256

    def __getitem__(self, index):
        """A picture [3, 32, 32] in [-1, 1], and its class."""
        random = torch.Generator().manual_seed(index)
        x, y, radius = torch.rand(3, generator=random) * torch.tensor([16, 16, 5]) + torch.tensor([8, 8, 4])
        rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        distance, label = ((rows - y) ** 2 + (columns - x) ** 2).sqrt(), index % 2
        inside = (distance < radius) & ((label == 0) | (distance > radius - 3))
        return torch.where(inside, torch.rand(3, 1, 1, generator=random), 1.0) * 2 - 1, label


network = DiTConfig(depth=4, hidden_size=64, num_heads=2, patch_size=2)
conditioning = Conditioning(class_names=["disc", "ring"])
model = LatentFlow.assemble(network, "shapes", image_size=32, conditioning=conditioning)
optimizer = torch.optim.AdamW(model.network.parameters(), lr=2e-3)
for epoch in range(6):
    for pixels, labels in DataLoader(Discs(), batch_size=64, shuffle=True):
        loss = model.loss(model.encode(pixels), Condition(labels=labels)).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    print(f"epoch {epoch}  loss {loss.item():.3f}")
model.save_pretrained("own_data")
print(model.sample(num=4, guidance=2, seed=0))

"""Mean and standard deviation of raw latents, channel by channel.

Legend: n images, C latent channels, h and w latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentflow.autoencoder import latent_mean


class ChannelSums:
    """Per-channel sums of raw latents, posterior variance included, from which the normalisation follows.

    They are kept on the device of the moments.
    """

    def __init__(self, num_channels: int):
        self.num_channels = num_channels
        self.num_values = 0
        self.sum = torch.zeros(num_channels, dtype=torch.float64)
        self.sum_of_squares = torch.zeros(num_channels, dtype=torch.float64)

    def add(self, moments: Tensor) -> None:
        """Count moments [n, C or 2C, h, w]. E[z^2] = mean^2 + variance for every latent value."""
        moments = (moments.cpu() if moments.device.type == "mps" else moments).double()
        mean = latent_mean(moments, self.num_channels)
        square = mean**2
        if moments.shape[1] > self.num_channels:
            square = square + moments[:, self.num_channels :].exp()
        if not self.num_values:
            self.sum, self.sum_of_squares = torch.zeros_like(mean[0, :, 0, 0]), torch.zeros_like(mean[0, :, 0, 0])
        self.num_values += mean[:, 0].numel()
        self.sum += mean.sum((0, 2, 3))
        self.sum_of_squares += square.sum((0, 2, 3))

    def add_sums(self, num_values: int, total: list[float], total_of_squares: list[float]) -> None:
        """Count what another instance has summed."""
        self.num_values += num_values
        self.sum += torch.tensor(total, dtype=torch.float64)
        self.sum_of_squares += torch.tensor(total_of_squares, dtype=torch.float64)

    def send_home(self) -> None:
        """Start copying the sums to the CPU; they arrive when all that is queued on the device is done."""
        for name in ("sum", "sum_of_squares"):
            home = torch.empty(self.num_channels, dtype=torch.float64, pin_memory=True)
            setattr(self, name, home.copy_(getattr(self, name), non_blocking=True))

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Per-channel mean and standard deviation, C numbers each."""
        mean = self.sum / self.num_values
        variance = (self.sum_of_squares / self.num_values - mean**2).clamp(min=1e-12)
        return mean.tolist(), variance.sqrt().tolist()

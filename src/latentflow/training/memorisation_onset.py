"""When a network begins to reproduce its training images, by the number of steps and images.

Bonnaire et al. (arXiv 2505.17638) find the first copies after about 300 optimizer steps per training image, in
proportion to the number of images, for a U-Net of 4 million parameters on 32-pixel faces, SGD, and batches of 512
images or of all there are. It is the number of steps that counts, not how often an image is seen: full batches are
alike. Wider networks begin sooner, and the held-out loss rises before copies appear.
"""

from __future__ import annotations

_COPIES_PER_IMAGE = 300
SAFE_PER_IMAGE = 150
"""Steps per image at half of that."""


def memorisation_warning(steps: int, num_images: int) -> str:
    """What to expect of a run whose steps are beyond half of that number; "" for a shorter one.

    Args:
        num_images: that it trains on.
    """
    onset, safe = _COPIES_PER_IMAGE * num_images, SAFE_PER_IMAGE * num_images
    if steps <= safe or not num_images:
        return ""
    about = f"copies of training images are to be expected from about {onset:,} steps on"
    return (
        f"{steps:,} steps for {num_images:,} images: {about if steps > onset else about + ', and overfitting before'} "
        f"({_COPIES_PER_IMAGE} steps per image, arXiv 2505.17638, with batches of 512 images or all; large networks "
        f"and AdamW sooner); training.steps={safe} is half of that"
    )

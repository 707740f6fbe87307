"""When a network begins to reproduce its training images, by the number of steps and images.

Bonnaire et al. (arXiv 2505.17638) find the first copies after about 300 optimizer steps per training image, in
proportion to the number of images, for a U-Net of 4 million parameters on 32-pixel faces, SGD, and batches of 512
images or of all there are. It is the number of steps that counts, not how often an image is seen: full batches are
alike. With AdamW copies come sooner: transformers trained on 20 and on 90 images had none after 63 and 16 steps per
image, and many after 125 and 39 (docs/how-to/few-images.md). The held-out loss rises before copies appear.
"""

from __future__ import annotations

_COPIES_PER_IMAGE = 40
SAFE_PER_IMAGE = 30
"""Steps per image after which no copies were seen."""


def memorisation_warning(steps: int, num_images: int) -> str:
    """What to expect of a run whose steps are beyond `SAFE_PER_IMAGE` per image; "" for a shorter one.

    Args:
        num_images: that it trains on.
    """
    safe = SAFE_PER_IMAGE * num_images
    if steps <= safe or not num_images:
        return ""
    return (
        f"{steps:,} steps for {num_images:,} images, {steps / num_images:,.0f} per image: it overfits, and may "
        f"reproduce training images. Copies were seen from about {_COPIES_PER_IMAGE} steps per image on; large "
        f"networks may be sooner. training.steps={safe} stays below"
    )

"""Mixup and cutmix: images of a batch mixed in pairs, and their labels likewise.

Sources: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization"; Yun et al.
2019, "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
Features".
"""

from dataclasses import dataclass

import numpy as np

from keras_transfer.config import Mixing

_MIXUP_ALPHA = 0.2  # of the beta distribution of shares, as for ImageNet in the paper
_CUTMIX_ALPHA = 1.0  # as in the paper: any share is as likely as any other


@dataclass(frozen=True)
class Pairs:
    """How the n images of a batch are mixed.

    Attributes:
        partners: int64 `[n]` index of the image that each is mixed with.
        shares: float32 `[n]` share of the image itself, from 0 to 1; the rest is the
            partner's.
        boxes: int64 `[n, 4]` top, bottom, left and right of the rectangle that is the
            partner's, in pixels; None if both images are blended.
    """

    partners: np.ndarray
    shares: np.ndarray
    boxes: np.ndarray | None = None

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """Mixes uint8 `[n, S, S, 3]` images."""
        if self.boxes is None:
            own = self.shares[:, None, None, None]
            mixed = own * images + (1 - own) * images[self.partners]
            return np.round(mixed).astype(np.uint8)
        mixed = images.copy()
        for row, (top, bottom, left, right) in enumerate(self.boxes):
            other = images[self.partners[row]]
            mixed[row, top:bottom, left:right] = other[top:bottom, left:right]
        return mixed

    def labels(
        self, targets: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mixes labels, so that losses are mixed in the same proportion.

        The loss of each class is linear in the product of its weight and its target,
        and in its weight. So the loss of a mixture is the share of one image's loss
        plus the rest of the other's, whatever weights both have.

        Args:
            targets: float32 `[n, C]` in [0, 1].
            weights: float32 `[n, C]` weights in the loss, at least 0.

        Returns:
            (targets, weights) of the mixtures, in the same form.
        """
        own = self.shares[:, None] * weights
        other = (1 - self.shares)[:, None] * weights[self.partners]
        total = own + other
        mixed = own * targets + other * targets[self.partners]
        none = np.zeros_like(mixed)
        return np.divide(mixed, total, out=none, where=total > 0), total


def draw_pairs(
    mixing: Mixing, images: int, size: int, rng: np.random.Generator
) -> Pairs | None:
    """Draws how the images of a batch are mixed; None if they are not.

    Args:
        mixing: The kind of mixture.
        images: Number of images.
        size: Side of the images in pixels.
        rng: The random numbers to use.
    """
    if mixing == "none":
        return None
    partners = rng.permutation(images)
    if mixing == "mixup":
        shares = rng.beta(_MIXUP_ALPHA, _MIXUP_ALPHA, images)
        return Pairs(partners, shares.astype(np.float32))
    shares = rng.beta(_CUTMIX_ALPHA, _CUTMIX_ALPHA, images)
    half = np.sqrt(1 - shares)[:, None] * size / 2
    centers = rng.uniform(0, size, (images, 2))
    ends = np.stack([centers - half, centers + half], axis=2)  # rows, then columns
    boxes = np.round(np.clip(ends, 0, size)).astype(np.int64)
    areas = np.prod(boxes[:, :, 1] - boxes[:, :, 0], axis=1)
    shares = 1 - areas / size**2  # a rectangle beyond the border is cut off
    return Pairs(partners, shares.astype(np.float32), boxes.reshape(images, 4))

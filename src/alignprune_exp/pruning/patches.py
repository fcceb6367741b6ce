"""Features of images that no label has had a say in.

Shape legend: B images, C channels, (H, W) pixels, P patches, D values of a patch, F filters, L places, K features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 32  # pixels that larger images are averaged down to
PATCH, STRIDE, CELLS = 6, 2, 2  # pixels of a patch, and between two; cells a side that responses are averaged in
FILTERS, DRAWN = 128, 20_000  # patches that are filters, and that whitening is learned from
FLOOR, SMOOTH = 0.05, 0.1  # beside a patch's variance, and beside those along the axes of whitening
THRESHOLD = 0.25  # that responses are shrunk by
AT_ONCE = 64  # images


class Patches:
    """How strongly images respond to whitened patches of their like (Coates and Ng, ICML 2011), for a `readout`.

    A patch is taken less its mean, over its deviation, and whitened. Random ones, brought to length 1, are the filters:
    their responses to an image, shrunk towards zero by a threshold, are averaged in each of four cells, as they are and
    in magnitude. Features are these, standardised over the images that the patches are from.

    Args:
        images: (n, C, H, W) floating point, a thousand or more, like those that are to come.
        mirrored: whether an image and its mirror image mean the same; features are then the mean of both's.
        rng: draws the patches.

    Raises ValueError for images of another shape or type, and for such as are not finite.
    """

    def __init__(self, images: Tensor, mirrored: bool, rng: np.random.Generator) -> None:
        if images.dim() != 4 or images.numel() == 0 or not images.is_floating_point():
            what = f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}"
            raise ValueError(f"images are {what}; pass floating point of shape (n, channels, height, width)")
        if not images.isfinite().all():
            raise ValueError("the images are not finite")
        self.mirrored = mirrored
        patches_PCHW = _patches(small(images), rng)
        patches_PD = patches_PCHW.flatten(1)
        patches_PD = patches_PD - patches_PD.mean(1, keepdim=True)
        patches_PD = patches_PD / (patches_PD.square().mean(1, keepdim=True) + FLOOR).sqrt()
        mean_D = patches_PD.mean(0)
        variance_D, axes_DD = torch.linalg.eigh((patches_PD - mean_D).T.cov())
        whitening_DD = (axes_DD / (variance_D.clamp(min=0) + SMOOTH).sqrt()) @ axes_DD.T
        filters_FD = F.normalize((patches_PD[:FILTERS] - mean_D) @ whitening_DD) @ whitening_DD
        self._filters = filters_FD.view_as(patches_PCHW[: len(filters_FD)])
        self._sums, self._shifts = (each[:, None, None] for each in (filters_FD.sum(1), filters_FD @ mean_D))
        self._mean, self._deviation = torch.zeros(()), torch.ones(())
        features = self(images)
        deviation = features.std(0, correction=0)
        self._mean, self._deviation = features.mean(0), torch.where(deviation > 0, deviation, 1.0)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features (B, K), float32, of images (B, C, H, W)."""
        views = [images, images.flip(3)] if self.mirrored else [images]
        found = [torch.cat([self._responses(few) for few in view.split(AT_ONCE)]) for view in views]
        return (torch.stack(found).mean(0) - self._mean) / self._deviation

    def _responses(self, images: Tensor) -> Tensor:
        """(B, K). Filters are whitened twice, so that no patch need be, and their means put right afterwards."""
        x, mean_of = small(images), torch.full_like(self._filters[:1], 1 / self._filters[0].numel())
        mean, square, found = (
            F.conv2d(values, kernels, stride=STRIDE)
            for values, kernels in ((x, mean_of), (x.square(), mean_of), (x, self._filters))
        )
        deviation = ((square - mean.square()).clamp(min=0) + FLOOR).sqrt()
        places = mean[0, 0].numel()
        cells_L4 = F.adaptive_avg_pool2d(torch.eye(places, device=x.device).view(-1, *mean.shape[2:]), CELLS).flatten(1)
        shrunk_BFL = F.softshrink((found - mean * self._sums) / deviation - self._shifts, THRESHOLD).flatten(2)
        return torch.cat([shrunk_BFL @ cells_L4, shrunk_BFL.abs() @ cells_L4], 1).flatten(1)


def small(images: Tensor) -> Tensor:
    """Return images (B, C, H, W), float32, in which no side is longer than ``SIDE``: all that `Patches` look at."""
    height, width = images.shape[2:]
    return F.adaptive_avg_pool2d(images.float(), (min(height, SIDE), min(width, SIDE)))


def _patches(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw patches (P, C, h, w) of images (n, C, H, W), with equal chances."""
    size = [min(PATCH, side) for side in images.shape[2:]]
    bounds = [len(images), *(side - length + 1 for side, length in zip(images.shape[2:], size, strict=True))]
    image, top, left = (torch.from_numpy(rng.integers(bound, size=DRAWN)).to(images.device) for bound in bounds)
    return images.unfold(2, size[0], 1).unfold(3, size[1], 1)[image, :, top, left]

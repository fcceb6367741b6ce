"""Crops, flips and colours that are functions of (seed, epoch, sample), drawn by a hash.

Shape legend: B samples of a batch, C channels, H and W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..pruning.seeding import generator

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_BITS_24 = (1 << 24) - 1
ATTEMPTS = 10  # at a random resized crop, as in torchvision


class Augmentation:
    """Draws each image's crop and flip from a hash, and applies them by gathering pixels.

    Args:
        seed: of the draws.
        flip: whether to mirror with probability ½.
        crop: pixels of reflect padding; 0 for no crop.
        cuts: whether each image is a random cut of a photograph, made as it is decoded, by `uniforms`.
    """

    def __init__(self, seed: int, *, flip: bool, crop: int, cuts: bool = False) -> None:
        self.seed, self.flip, self.crop, self.cuts = seed, flip, crop, cuts

    def draw(self, sample: Tensor, epoch: int, view: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return for samples, int64 (B,): the crop's top and left, int64 (B,) in 0..2·crop, and bool flips.

        Every ``view`` of an epoch is drawn on its own. A place of ``crop`` is the image itself.
        """
        bits = self._bits(sample, epoch, view)
        top = ((bits & _BITS_24) * (2 * self.crop + 1)) >> 24
        left = (((bits >> 24) & _BITS_24) * (2 * self.crop + 1)) >> 24
        flip = (((bits >> 48) & 1) == 1) & self.flip
        return top, left, flip

    def places(self, sample: Tensor, epoch: int | None, views: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `draw` does for every view, (views, B) each; without an epoch the images as they are, once."""
        if epoch is None:
            as_it_is = torch.full((1, len(sample)), self.crop)
            return as_it_is, as_it_is, torch.zeros_like(as_it_is, dtype=torch.bool)
        top, left, flip = zip(*(self.draw(sample, epoch, view) for view in range(views)), strict=True)
        return torch.stack(top), torch.stack(left), torch.stack(flip)

    def uniforms(self, sample: Tensor, epoch: int, view: int = 0) -> np.ndarray:
        """Return for samples, int64 (B,), what a view is cut out by: float64 (B, ATTEMPTS, 4), in [0, 1)."""
        steps = _GOLDEN * torch.arange(1, 4 * ATTEMPTS + 1)
        draws = _shifted(splitmix64(self._bits(sample, epoch, view)[:, None] + steps), 11)
        return (draws.double() / (1 << 53)).view(-1, ATTEMPTS, 4).numpy()

    def _bits(self, sample: Tensor, epoch: int, view: int) -> Tensor:
        where = (epoch, view) if view else (epoch,)
        key = int(generator(self.seed, "augmentation", *where).integers(1 << 63))
        return splitmix64(sample * _GOLDEN + key)

    @property
    def _around(self) -> tuple[tuple[int, int], ...]:
        return (self.crop, self.crop), (self.crop, self.crop), (0, 0)

    def pad(self, images: Tensor) -> Tensor:
        """Reflect-pad images, uint8 (n, C, H, W), for `apply`: (n, H + 2·crop, W + 2·crop, C)."""
        return torch.from_numpy(np.pad(images.permute(0, 2, 3, 1).numpy(), ((0, 0), *self._around), "reflect"))

    def cut(self, image: np.ndarray, top: int, left: int, flip: int) -> Tensor:
        """Crop one image, uint8 (H, W, C), out of its padded self, as `apply` does, and mirror it."""
        if (top, left) != (self.crop, self.crop):
            height, width, _ = image.shape
            image = np.pad(image, self._around, "reflect")[top : top + height, left : left + width]
        cut = torch.from_numpy(image if image.flags.writeable else image.copy())
        return cut.flip(1) if flip else cut

    def apply(self, padded: Tensor, begin: Tensor, flip: Tensor) -> Tensor:
        """Cut images out of ``padded``; return them as uint8 (B, H, W, C).

        Args:
            padded: as `pad` returns them.
            begin: the pixel that each image begins at, int64 (B,), where ``padded`` lies.
            flip: which to mirror, bool (B,), on the CPU, so that nothing waits for the device.
        """
        _, height, width, channels = padded.shape
        h, w = height - 2 * self.crop, width - 2 * self.crop
        count = padded.numel() // channels - (h - 1) * width - w + 1
        # Overlapping views of what is in memory: for each pixel, the image that begins there.
        windows = padded.as_strided((count, h, w * channels), (channels, width * channels, 1))
        images = windows.index_select(0, begin).view(len(begin), -1)
        if len(flipped := flip.nonzero().squeeze(1)):
            place = torch.arange(len(begin))
            place[flipped] = torch.arange(len(begin), len(begin) + len(flipped))
            flipped, place = (each.to(padded.device, non_blocking=True) for each in (flipped, place))
            mirrored = images.index_select(0, flipped).view(-1, h, w, channels).flip(2).view(len(flipped), -1)
            images = torch.cat([images, mirrored]).index_select(0, place)
        return images.view(-1, h, w, channels)


def rand_augment(images: Tensor, sample: Tensor, seed: int, epoch: int) -> Tensor:
    """Apply RandAugment (Cubuk et al., 2020; torchvision's, 2 operations of magnitude 9) to uint8 (B, H, W, C).

    What it does to an image is a function of (seed, epoch, sample) alone.
    """
    from torchvision.transforms import RandAugment

    augment, device = RandAugment(), images.device
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, number in zip(images.cpu().permute(0, 3, 1, 2), sample.tolist(), strict=True):
            key = int(generator(seed, "strong augmentation", epoch, number).integers(1 << 63))
            torch.default_generator.manual_seed(key)
            changed.append(augment(image.contiguous()))
    return torch.stack(changed).permute(0, 2, 3, 1).contiguous().to(device)


def splitmix64(z: Tensor) -> Tensor:
    """Hash int64 values by the finaliser of SplitMix64 (Steele, Lea, Flood 2014), in wrapping arithmetic."""
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)

"""Crops, flips and colours that are functions of (seed, epoch, sample), drawn by a hash.

Shape legend: B samples of a batch, C channels, H and W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from alignprune_exp.pruning.seeding import generator

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

        Every ``view`` of an epoch is drawn on its own.

        A place of ``crop`` is the image itself.
        """
        bits = self._bits(sample, epoch, view)
        top = ((bits & _BITS_24) * (2 * self.crop + 1)) >> 24
        left = (((bits >> 24) & _BITS_24) * (2 * self.crop + 1)) >> 24
        flip = (((bits >> 48) & 1) == 1) & self.flip
        return top, left, flip

    def uniforms(self, sample: Tensor, epoch: int, view: int = 0) -> np.ndarray:
        """Return for samples, int64 (B,), what a view is cut out by: float64 (B, ATTEMPTS, 4), in [0, 1)."""
        steps = _GOLDEN * torch.arange(1, 4 * ATTEMPTS + 1)
        draws = _shifted(mix(self._bits(sample, epoch, view)[:, None] + steps), 11)
        return (draws.double() / (1 << 53)).view(-1, ATTEMPTS, 4).numpy()

    def _bits(self, sample: Tensor, epoch: int, view: int) -> Tensor:
        where = (epoch, view) if view else (epoch,)
        key = int(generator(self.seed, "augmentation", *where).integers(1 << 63))
        return mix(sample * _GOLDEN + key)

    def pad(self, images: Tensor) -> Tensor:
        """Reflect-pad images, uint8 (n, C, H, W), for `apply`: (n, H + 2·crop, W + 2·crop, C)."""
        n, channels, height, width = images.shape
        p = self.crop
        padded = images.new_empty(n, height + 2 * p, width + 2 * p, channels)
        rows = padded[:, p : p + height]
        rows[:, :, p : p + width] = images.permute(0, 2, 3, 1)
        for x in range(p):
            rows[:, :, x] = rows[:, :, 2 * p - x]
            rows[:, :, -1 - x] = rows[:, :, x - 1 - 2 * p]
        for y in range(p):
            padded[:, y] = padded[:, 2 * p - y]
            padded[:, -1 - y] = padded[:, y - 1 - 2 * p]
        return padded

    def cut(self, image: Tensor, top: int, left: int, flip: int) -> Tensor:
        """Crop one image, uint8 (H, W, C), out of its reflect-padded self, as `apply` does, and mirror it."""
        if (top, left) != (self.crop, self.crop):
            shifted = torch.empty_like(image)
            to_y, from_y = _overlap(top - self.crop, image.shape[0])
            to_x, from_x = _overlap(left - self.crop, image.shape[1])
            shifted[to_y, to_x] = image[from_y, from_x]
            _mirror_edges(shifted, to_y)
            _mirror_edges(shifted.transpose(0, 1), to_x)
            image = shifted
        return image.flip(1) if flip else image

    def plan(
        self, rows: Tensor, sample: Tensor, epoch: int | None, padded: tuple[int, ...], views: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Say where each image begins and whether it is mirrored.

        Args:
            rows: place of each image among the padded ones, int64 (B,).
            sample: what it is augmented as, int64 (B,).
            epoch: likewise; without one nothing is augmented.
            padded: shape (n, H + 2·crop, W + 2·crop, C) of the padded images.
            views: how many times each is augmented.

        Returns:
            The pixel that each begins at, int64 (views, B), and the bool flips (views, B).
        """
        if epoch is None:
            top = left = torch.full_like(rows, self.crop)[None]
            flip = torch.zeros_like(rows, dtype=torch.bool)[None]
        else:
            drawn = [self.draw(sample, epoch, view) for view in range(views)]
            top, left, flip = (torch.stack(each) for each in zip(*drawn, strict=True))
        return (rows * padded[1] + top) * padded[2] + left, flip

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


def _overlap(by: int, size: int) -> tuple[slice, slice]:
    """Return which places a shift by ``by`` fills, and from which."""
    return slice(max(0, -by), size - max(0, by)), slice(max(0, by), size + min(0, by))


def _mirror_edges(image: Tensor, filled: slice) -> None:
    """Fill the rows before and after the ``filled`` ones with their reflections."""
    first, end = filled.start, filled.stop
    for y in range(first):
        image[y] = image[2 * first - y]
    for y in range(end, len(image)):
        image[y] = image[2 * (end - 1) - y]


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


def mix(z: Tensor) -> Tensor:
    """Hash int64 values by the finaliser of SplitMix64 (Steele, Lea, Flood 2014), in wrapping arithmetic."""
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)

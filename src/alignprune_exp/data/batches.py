"""Batches on the device, augmented by a hash of (seed, epoch, sample).

Shape legend: B samples of a batch, C channels, H and W pixels.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from alignprune_exp.data.split import Split
from alignprune_exp.errors import UsageError
from alignprune_exp.pruning.seeding import generator

Batch = tuple[Tensor, Tensor, Tensor]

PIECE = 1 << 20  # values that are normalised at a time, so that they stay in the processor's cache


class Batches:
    """Turns samples of a split into normalised batches.

    An image's augmentation is a function of (seed, epoch, sample index) alone: neither the other samples of
    the batch, nor the order, the device or the number of workers can change it.

    Args:
        split: the samples.
        batch_size: samples a batch; the last one of an epoch may hold fewer, or one more.
        device: where batches, and images held in memory, lie.
        mean: by channel, (C,), in 0..1 units.
        std: likewise.
        seed: of the augmentation.
        train: whether ``epoch`` augments.
        flip: mirror each image left to right with probability ½.
        crop: pixels of reflect padding around each image, out of which its own size is cropped at a uniformly
            drawn place; 0 for none.
        channels_last: the memory format of the images.
        dtype: of the images, rounded to it at the end.
        workers: processes that decode images that are not held in memory; 0 decodes in this one.

    Raises UsageError where ``crop`` is not smaller than the images.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        device: torch.device | str,
        mean: np.ndarray,
        std: np.ndarray,
        seed: int,
        train: bool,
        flip: bool,
        crop: int,
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
        workers: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.channels_last, self.dtype = channels_last, dtype
        self._n, self._seed = len(split), seed
        self._labels = torch.from_numpy(split.labels).to(self.device)
        cuts = train and split.source.cuts
        augmentation = Augmentation(seed, flip=train and flip, crop=crop if train else 0, cuts=cuts)
        _, height, width = split.source.shape
        if augmentation.crop >= min(height, width):
            raise UsageError(
                f"a crop padding of {crop} pixels does not fit images of {width}x{height}: type a smaller "
                "one, or 0 for none"
            )
        self._pixels: _Resident | _OnDisk
        if split.images is not None:
            self._pixels = _Resident(split.images, augmentation, self.device)
        else:
            self._pixels = _OnDisk(split, augmentation, self.device, workers)
        # One entry per value of an image row, so that the inner loop runs over W·C values and not over C.
        scale = np.tile(1 / (255 * std), width)
        shift = np.tile(-mean / std, width)
        self._scale = torch.from_numpy(scale).to(self.device, torch.float32)
        self._shift = torch.from_numpy(shift).to(self.device, torch.float32)

    def epoch(
        self, order: Tensor | np.ndarray, epoch: int, start: int = 0, rank: int = 0, ranks: int = 1, views: int = 1
    ) -> Iterator[Batch]:
        """Yield (index, x, labels) for the samples of ``order``, int (k,), from batch number ``start`` on.

        Of ``ranks`` that share every batch, in consecutive parts whose sizes differ by one at the most, this is
        number ``rank``. Where a last batch has fewer samples than ranks, some get none of it.

        ``index`` is int64 (B,) on the CPU; on the device are ``x`` (B, C, H, W) and ``labels``,
        int64 (B,). Finish or drop one iteration before the next begins: they share the workers.

        With several ``views``, ``x`` is (views · B, C, H, W): every image in one augmentation, then every image in the
        next. The first is what one view gives.
        """
        return self._batches(order, epoch, start, rank, ranks, views)

    def evaluation(self, order: Tensor | np.ndarray | None = None) -> Iterator[Batch]:
        """Yield the same without augmentation; all samples, in order, if no ``order`` is given."""
        return self._batches(torch.arange(self._n) if order is None else order, None, 0)

    def strong(self, order: Tensor | np.ndarray, epoch: int) -> Iterator[Batch]:
        """Yield the same as a training epoch would show them, and by `rand_augment` on top."""
        return self._batches(order, epoch, 0, strongly=True)

    def _batches(
        self,
        order: Tensor | np.ndarray,
        epoch: int | None,
        start: int,
        rank: int = 0,
        ranks: int = 1,
        views: int = 1,
        strongly: bool = False,
    ) -> Iterator[Batch]:
        index = torch.as_tensor(order).to("cpu", torch.int64)[start * self.batch_size :]
        if len(index) == 0:
            return
        shares = (part.tensor_split(ranks)[rank] for part in index.split(self.sizes(len(index))))
        parts = tuple(share for share in shares if len(share))
        for part, images in zip(parts, self._pixels.batches(parts, epoch, views), strict=True):
            if strongly and epoch is not None:
                images = rand_augment(images, part, self._seed, epoch)
            yield part, self._normalise(images), self._labels.index_select(0, part.to(self.device, non_blocking=True))

    def sizes(self, n: int) -> list[int]:
        """Return the sizes of the batches that ``n`` samples make.

        Whole batches and a rest; a rest of one, which batch norm cannot take, joins the batch before it.
        """
        whole, rest = divmod(n, self.batch_size)
        sizes = [self.batch_size] * whole + ([rest] if rest else [])
        if rest == 1 and whole:
            sizes[-2:] = [self.batch_size + 1]
        return sizes

    def _normalise(self, images: Tensor) -> Tensor:
        """Map uint8 (B, H, W, C) to (B, C, H, W), computed in float32."""
        x = torch.empty(images.shape, dtype=self.dtype, device=self.device)
        each = max(1, PIECE // images[0].numel()) if self.device.type == "cpu" else len(images)
        for few, out in zip(images.split(each), x.split(each), strict=True):
            flat = few.reshape(-1, len(self._scale)).to(torch.float32)
            torch.addcmul(self._shift, flat, self._scale, out=out.view(flat.shape))
        x = x.permute(0, 3, 1, 2)
        return x if self.channels_last else x.contiguous()


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


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_BITS_24 = (1 << 24) - 1
ATTEMPTS = 10  # at a random resized crop, as in torchvision


def mix(z: Tensor) -> Tensor:
    """Hash int64 values by the finaliser of SplitMix64 (Steele, Lea, Flood 2014), in wrapping arithmetic."""
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)


class _Resident:
    """All images on the device, as uint8 (n, H, W, C), padded."""

    def __init__(self, images: Tensor, augmentation: Augmentation, device: torch.device) -> None:
        self.images = augmentation.pad(images.to(device))
        self.augmentation = augmentation

    def batches(self, parts: tuple[Tensor, ...], epoch: int | None, views: int) -> Iterator[Tensor]:
        # Drawn on the CPU, once an epoch: nothing in a batch waits for the device.
        order, sizes = torch.cat(parts), [len(part) for part in parts]
        begins, flips = self.augmentation.plan(order, order, epoch, self.images.shape, views)
        begins = begins.to(self.images.device)
        for begin, flip in zip(begins.split(sizes, 1), flips.split(sizes, 1), strict=True):
            yield self.augmentation.apply(self.images, begin.flatten(), flip.flatten())


class _OnDisk:
    """Decodes batch by batch in a DataLoader, whose workers stay alive between epochs."""

    def __init__(self, split: Split, augmentation: Augmentation, device: torch.device, workers: int) -> None:
        # The loader holds the list and not this object: in a cycle its workers would take seconds to end.
        self.keys: list[tuple[int | None, Tensor, int]] = []
        self.device = device
        self.loader: DataLoader[Any] = DataLoader(
            _Decoded(split, augmentation),
            sampler=self.keys,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_run,
            pin_memory=device.type == "cuda",
        )

    def batches(self, parts: tuple[Tensor, ...], epoch: int | None, views: int) -> Iterator[Tensor]:
        self.keys[:] = [(epoch, part, views) for part in parts]
        for images in self.loader:
            if isinstance(images, str):
                raise UsageError(images)
            yield images.to(self.device, non_blocking=True)


def _leave_signals_to_the_run(worker: int) -> None:
    """A scheduler signals every process of a job; the run takes its checkpoint, and ends its workers after that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class _Decoded(Dataset[Any]):
    """Maps (epoch, samples, views) to the augmented images, uint8 (views · B, H, W, C).

    A user's mistake comes back as its message: raised in a worker it would arrive wrapped in a traceback.
    """

    def __init__(self, split: Split, augmentation: Augmentation) -> None:
        self.source, self.rows, self.augmentation = split.source, split.rows, augmentation

    def __getitem__(self, key: tuple[int | None, Tensor, int]) -> Tensor | str:
        epoch, sample, views = key
        rows, draws = self.rows[sample.numpy()], None
        if epoch is not None:
            rows = np.tile(rows, views)
            if self.augmentation.cuts:
                draws = np.concatenate([self.augmentation.uniforms(sample, epoch, view) for view in range(views)])
        try:
            images = self.source.decoded(rows, draws)
        except UsageError as error:
            return str(error)
        tensors = [torch.from_numpy(image if image.flags.writeable else image.copy()) for image in images]
        if epoch is not None:
            drawn = [torch.stack(self.augmentation.draw(sample, epoch, view), 1) for view in range(views)]
            places = torch.cat(drawn).tolist()
            tensors = [self.augmentation.cut(image, *place) for image, place in zip(tensors, places, strict=True)]
        return default_collate(tensors)  # in a worker, into shared memory

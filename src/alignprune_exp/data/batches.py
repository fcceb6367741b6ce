"""Batches on the device; those of images are augmented by a hash of (seed, epoch, sample).

Shape legend: B samples of a batch, V views of each, C channels, H and W pixels.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import traceback
from collections.abc import Iterator
from functools import cached_property
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import UsageError
from .augment import Augmentation, rand_augment
from .split import Split

Batch = tuple[Tensor, Tensor, Tensor]

PIECE = 1 << 20  # values that are normalised at a time, so that they stay in the processor's cache


class Batches:
    """Turns samples into batches. A subclass says how to get the inputs of some samples, in `inputs`.

    Args:
        targets: of all samples, (n, …), on any device.
        batch_size: samples a batch; the last one of an epoch may hold fewer, or one more.
        device: where batches lie.
    """

    def __init__(self, targets: Tensor, batch_size: int, device: torch.device | str) -> None:
        self.batch_size, self.device = batch_size, torch.device(device)
        self._targets = targets.to(self.device)

    def __len__(self) -> int:
        return len(self._targets)

    def inputs(self, parts: list[Tensor], epoch: int | None, views: int, strongly: bool) -> Iterator[Tensor]:
        """Yield the inputs (views · B, …) of each of ``parts``, int64 (B,) on the CPU.

        ``epoch`` is None for evaluation, without augmentation. ``strongly`` asks for more of it than usual.
        """
        raise NotImplementedError

    def targets(self, part: Tensor, epoch: int | None) -> Tensor:
        """Return the targets (B, …) of samples, int64 (B,) on the CPU, as augmented as their inputs are."""
        return self._targets.index_select(0, part.to(self.device, non_blocking=True))

    def correct(self, index: Tensor, targets: Tensor) -> None:
        """Let samples ``index`` (K,) have other ``targets`` (K, …) from now on."""
        self._targets = self._targets.index_copy(0, index.to(self.device), targets.to(self.device))

    def epoch(
        self, order: Tensor | np.ndarray, epoch: int, start: int = 0, rank: int = 0, ranks: int = 1, views: int = 1
    ) -> Iterator[Batch]:
        """Yield (index, inputs, targets) for the samples of ``order``, int (k,), from batch number ``start`` on.

        Of ``ranks`` that share every batch, in consecutive parts whose sizes differ by one at the most, this is
        number ``rank``. Where a last batch has fewer samples than ranks, those without one get its first sample, so
        that all have as many batches.

        ``index`` is int64 (B,) on the CPU; on the device are ``inputs`` (views · B, …) and ``targets`` (B, …): every
        sample in one augmentation, then every sample in the next. The first is what one view gives. Finish or drop one
        iteration before the next begins: they may share workers.
        """
        return self._batches(order, epoch, start, rank, ranks, views)

    def evaluation(self, order: Tensor | np.ndarray | None = None) -> Iterator[Batch]:
        """Yield the same without augmentation; all samples, in order, if no ``order`` is given."""
        return self._batches(torch.arange(len(self)) if order is None else order, None, 0)

    def strong(self, order: Tensor | np.ndarray, epoch: int) -> Iterator[Batch]:
        """Yield the same as a training epoch would show them, and more strongly augmented."""
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
        batches = index.split(self.sizes(len(index)))
        if parts := [batch.tensor_split(ranks)[rank if rank < len(batch) else 0] for batch in batches]:
            inputs = self.inputs(parts, epoch, views, strongly)
            for part in parts:  # no name for what is yielded: its memory is free for the next
                yield part, next(inputs), self.targets(part, epoch)

    def sizes(self, n: int) -> list[int]:
        """Return the sizes of the batches that ``n`` samples make.

        Whole batches and a rest; a rest of one, which batch norm cannot take, joins the batch before it.
        """
        whole, rest = divmod(n, self.batch_size)
        sizes = [self.batch_size] * whole + ([rest] if rest else [])
        if rest == 1 and whole:
            sizes[-2:] = [self.batch_size + 1]
        return sizes


class TensorBatches(Batches):
    """Batches of inputs (n, …) that are held in memory as they are. Views and augmentation change nothing of them."""

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int, device: torch.device | str) -> None:
        super().__init__(targets, batch_size, device)
        self._inputs = inputs.to(self.device)

    def inputs(self, parts: list[Tensor], epoch: int | None, views: int, strongly: bool) -> Iterator[Tensor]:
        for part in parts:
            yield self._inputs.index_select(0, part.repeat(views).to(self.device, non_blocking=True))


class ImageBatches(Batches):
    """Turns samples of a split into normalised batches: inputs (V · B, C, H, W), targets the labels, int64 (B,).

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
        super().__init__(torch.from_numpy(split.labels), batch_size, device)
        self.channels_last, self.dtype = channels_last, dtype
        self._split, self._seed, self._workers = split, seed, workers
        self._augmentation = Augmentation(
            seed, flip=train and flip, crop=crop if train else 0, cuts=train and split.source.cuts is not None
        )
        _, height, width = split.source.shape
        if self._augmentation.crop >= min(height, width):
            raise UsageError(
                f"a crop padding of {crop} pixels does not fit images of {width}x{height}: type a smaller "
                "one, or 0 for none"
            )
        self._held = None if split.images is None else self._augmentation.pad(split.images).to(self.device)
        self._keys: list[tuple[np.ndarray, int | None, int]] = []
        # One entry per value of an image row, so that the inner loop runs over W·C values and not over C.
        scale = np.tile(1 / (255 * std), width)
        shift = np.tile(-mean / std, width)
        self._scale = torch.from_numpy(scale).to(self.device, torch.float32)
        self._shift = torch.from_numpy(shift).to(self.device, torch.float32)

    def inputs(self, parts: list[Tensor], epoch: int | None, views: int, strongly: bool) -> Iterator[Tensor]:
        augmented = self._decoded(parts, epoch, views) if self._held is None else self._gathered(parts, epoch, views)
        for part, images in zip(parts, augmented, strict=True):
            if strongly and epoch is not None:
                images = rand_augment(images, part, self._seed, epoch)
            yield self._normalise(images)

    def _gathered(self, parts: list[Tensor], epoch: int | None, views: int) -> Iterator[Tensor]:
        """Yield augmented batches, uint8 (views · B, H, W, C), of the images that are held on the device."""
        assert self._held is not None
        # Drawn on the CPU, once an epoch: nothing in a batch waits for the device.
        order, sizes = torch.cat(parts), [len(part) for part in parts]
        top, left, flips = self._augmentation.places(order, epoch, views)
        _, height, width, _ = self._held.shape
        begins = ((order * height + top) * width + left).to(self.device)
        for begin, flip in zip(begins.split(sizes, 1), flips.split(sizes, 1), strict=True):
            yield self._augmentation.apply(self._held, begin.flatten(), flip.flatten())

    def _decoded(self, parts: list[Tensor], epoch: int | None, views: int) -> Iterator[Tensor]:
        """Yield the same of images that are decoded each time, by the workers."""
        # Arrays go to a worker as bytes; a tensor would be fetched from a thread of this process, also while it ends.
        self._keys[:] = [(part.numpy(), epoch, views) for part in parts]
        decoded = iter(self._loader)
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # ahead of what torch, having started workers, waits for then
        for images in decoded:
            if isinstance(images, str):
                raise UsageError(images)
            yield images.to(self.device, non_blocking=True)

    @cached_property
    def _loader(self) -> DataLoader[Any]:
        """Its workers stay alive between epochs. It does not hold this object: in a cycle they would be slow to end."""
        return DataLoader(
            _Decoded(self._split, self._augmentation),
            sampler=self._keys,
            batch_size=None,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            worker_init_fn=_leave_signals_to_the_run,
            pin_memory=self.device.type == "cuda",
        )

    def _normalise(self, images: Tensor) -> Tensor:
        """Map uint8 (B, H, W, C) to (B, C, H, W), computed in float32."""
        x = torch.empty(images.shape, dtype=self.dtype, device=self.device)
        each = max(1, PIECE // images[0].numel()) if self.device.type == "cpu" else len(images)
        for few, out in zip(images.split(each), x.split(each), strict=True):
            flat = few.reshape(-1, len(self._scale)).to(torch.float32)
            torch.addcmul(self._shift, flat, self._scale, out=out.view(flat.shape))
        x = x.permute(0, 3, 1, 2)
        return x if self.channels_last else x.contiguous()


class _Decoded(Dataset[Any]):
    """Maps (samples, epoch, views) to the augmented images, uint8 (views · B, H, W, C).

    A user's mistake comes back as its message: raised in a worker it would arrive wrapped in a traceback.
    """

    def __init__(self, split: Split, augmentation: Augmentation) -> None:
        self.source, self.rows, self.augmentation = split.source, split.rows, augmentation

    def __getitem__(self, key: tuple[np.ndarray, int | None, int]) -> Tensor | str:
        rows, epoch, views = key
        sample = torch.from_numpy(rows)
        places = [each.flatten().tolist() for each in self.augmentation.places(sample, epoch, views)]
        draws = None
        if epoch is not None and self.augmentation.cuts:
            draws = np.concatenate([self.augmentation.uniforms(sample, epoch, view) for view in range(views)])
        try:
            images = self.source.decoded(np.tile(self.rows[rows], views), draws)
        except UsageError as error:
            return str(error)
        cut = self.augmentation.cut
        return default_collate([cut(*each) for each in zip(images, *places, strict=True)])  # into shared memory


def _leave_signals_to_the_run(worker: int) -> None:
    """A scheduler signals every process of a job; the run takes its checkpoint, and ends its workers after that.

    What a worker has to say of a run that has ended without it is of no use to anybody.
    """
    Queue._on_queue_feeder_error = staticmethod(_say_if_heard)  # type: ignore[attr-defined]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _say_if_heard(error: Exception, _: Any) -> None:
    if not isinstance(error, BrokenPipeError):
        traceback.print_exception(error)


def _end_workers() -> None:
    """End workers that a traceback still holds: the interpreter waits for them, and they ignore its signal."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise
    for child in multiprocessing.active_children():
        child.kill()

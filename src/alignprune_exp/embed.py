"""Features of images, for score.file and learner.file: python -m alignprune_exp.embed NETWORK -o FILE dataset=…

NETWORK is a run's folder, or its id, that was trained with keep_checkpoints=true, and whose own data are still there:
its features are what goes into the last linear layer. Or it is anyone's, package.module.function: called without
arguments, that returns a torch.nn.Module from images (B, C, H, W) in 0..1 to features (B, d).
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .console import Progress, command, duration, parser_of, say
from .errors import UsageError, is_of_memory, reason_of
from .files import refuse_target, write_atomically
from .runs import run_folder

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from .config import Config
    from .data.batches import Batch, ImageBatches
    from .data.source import Images
    from .network import Network
    from .runs import RunFolder
    from .setup import Setup

AT_ONCE = 2048  # images, between two signs of life


def main(arguments: Sequence[str]) -> int:
    """Write the features, a row for each image in the data set's order; return the exit status."""
    parser = parser_of("embed", __doc__, ("network", "a run's folder, or its id, or package.module.function"))
    parser.add_argument("settings", nargs="*", help="the data set, as for training: dataset=cifar10 paths.data=DIR")
    parser.add_argument("-o", "--out", type=Path, required=True, help="where to, as .npy")

    def work() -> None:
        given = parser.parse_intermixed_args(arguments)
        refuse_target(given.out, (".npy",), given.force)
        config = _composed(given.settings)
        of_a_run = "." not in given.network or "/" in given.network or Path(given.network).exists()
        embedder = _of_run(_folder(given), config) if of_a_run else _anyones(given.network, config)
        batches = embedder.batches(_images(config), config)
        blocks = features(embedder, batches)
        first = next(blocks)  # by which what is wrong has shown
        write_atomically(given.out, lambda file: _write(file, chain([first], blocks), len(batches), first.shape[1]))
        images = f"the {len(batches):,} training images of {config.dataset.name}"
        print(f"{given.out}: {first.shape[1]} features of {images}; use score.file= or learner.file={given.out}")

    return command(work)


@dataclass(frozen=True)
class Embedder:
    """A network that features are taken from.

    Attributes:
        embed: from batches of images to features (k, d).
        device, dtype: of the images that it takes.
        statistics: mean and standard deviation by channel, that these are normalised by, in 0..1 units, if they are.
    """

    embed: Callable[[Iterable[Batch]], Tensor]
    device: torch.device
    dtype: torch.dtype
    statistics: tuple[np.ndarray, np.ndarray] | None = None

    def batches(self, images: Images, config: Config) -> ImageBatches:
        """Return images as batches that the network takes. Raises UsageError for another number of channels."""
        import numpy as np

        from .data.batches import ImageBatches
        from .data.split import Split

        channels = images.shape[0]
        mean, std = self.statistics or (np.zeros(channels), np.ones(channels))
        if len(mean) != channels:
            raise UsageError(f"the network takes images of {len(mean)} channels, and these have {channels}")
        return ImageBatches(
            Split(images, np.arange(len(images)), images.labels, None),
            batch_size=config.batch_size,
            device=self.device,
            mean=mean,
            std=std,
            seed=0,
            train=False,
            flip=False,
            crop=0,
            dtype=self.dtype,
            workers=config.workers,
        )


def features(embedder: Embedder, batches: ImageBatches) -> Iterator[np.ndarray]:
    """Yield the features (k, d), float32, of some images at a time. Raises UsageError for what are none."""
    import torch

    for rows in torch.arange(len(batches)).split(AT_ONCE):
        try:
            with torch.no_grad():
                found = embedder.embed(batches.evaluation(rows)).float()
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if is_of_memory(error):
                raise
            raise UsageError(f"the network does not take these images: {reason_of(error)}") from None
        if found.dim() != 2 or len(found) != len(rows) or found.shape[1] == 0:
            raise UsageError(f"the network returns {tuple(found.shape)} of {len(rows)} images; let it return (B, d)")
        if not found.isfinite().all():
            raise UsageError(f"the network's features of images {rows[0]} to {rows[-1]} are not all finite")
        yield found.cpu().numpy()


def _write(file: IO[bytes], blocks: Iterable[np.ndarray], n: int, d: int) -> None:
    """Write features (n, d) as `numpy.save` does, without holding them all."""
    import numpy as np

    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (n, d)})
    progress, began, done = Progress(), time.monotonic(), 0
    for block in blocks:
        file.write(block.astype("<f4").tobytes())
        done += len(block)
        left = (n - done) * (time.monotonic() - began) / done
        progress.show(f"{done:,} of {n:,} images  left {duration(left)}")


def _composed(settings: Sequence[str]) -> Config:
    """Return the config that the settings make. Raises UsageError."""
    from hydra import compose, initialize_config_dir

    from .checks import check_load
    from .commandline import config_dir, read_line
    from .sweep import job_of

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        job = job_of(None, tuple(read_line(settings)), lambda typed: compose("train", typed), ())
    if job.group is not None:
        raise UsageError(f"suite={job.group} is a grid of runs; give the one data set, as in dataset=cifar10")
    check_load(job.config)
    return job.config


def _images(config: Config) -> Images:
    """Return the training images of the config's data set, in its order. Raises UsageError where there are none."""
    from .config import DATASET
    from .data.source import Source

    source = DATASET.make(config.dataset).open()
    if not isinstance(source, Source):
        raise UsageError(f"dataset={config.dataset.name} is not of images with class labels; give one that is")
    return source.train


def _folder(given: Namespace) -> Path:
    """Return the folder of the run that the command line names. Raises UsageError."""
    try:
        return run_folder(given.network, given.results)
    except UsageError as error:
        raise UsageError(f"{error}; of a network of your own give package.module.function") from None


def _of_run(folder: Path, config: Config) -> Embedder:
    """Return the network of a run as its checkpoint has it, for images of a data set. Raises UsageError."""
    from .config import validate
    from .distributed import Processes
    from .records import read_config
    from .runs import RunFolder
    from .setup import Setup
    from .tasks.classification import Classification

    try:
        setup = Setup.of(validate(read_config(folder)), Processes())
    except UsageError as error:
        raise UsageError(
            f"{folder} cannot be set up as it was trained, with its own data, from where it was typed: {error}"
        ) from None
    task, place = setup.task, RunFolder(folder.parents[1], folder.name)
    if not isinstance(task, Classification):
        raise UsageError(f"{folder} is of task={setup.config.task.name}; give a run of task=classification")
    if place.path != folder or place.id != setup.id:
        raise UsageError(
            f"{folder} is not runs/{setup.id}, which its config and data make it: it was renamed or moved, or "
            f"{setup.config.dataset.name} has changed; put that right"
        )
    network, statistics = _kept(setup, place), (task.data.mean, task.data.std)
    if setup.config.dataset.name == config.dataset.name:
        say(
            f"note: {folder.name} was trained on labels of {config.dataset.name} itself, and features that have "
            "learned wrong ones do not tell them; take a network of other images, or of labels that are right"
        )
    return Embedder(lambda batches: task.outputs(network, batches)[1], setup.device, task.dtype, statistics)


def _kept(setup: Setup, folder: RunFolder) -> Network:
    """Return the network that a run has kept, in eval mode. Raises UsageError where that is none of its end."""
    from .network import Network
    from .record import Journal

    state, again = folder.load_checkpoint(say), "train it again with force=true keep_checkpoints=true"
    if state is None:
        raise UsageError(f"{folder.path} keeps no network; {again}")
    network, journal = Network(setup, "model"), Journal(setup.id)
    try:
        journal.load_state_dict(state["record"])
        network.learner.load_state_dict(state["model"])
    except (KeyError, RuntimeError):
        raise UsageError(f"the network in {folder.path} is of another version; {again}") from None
    if (done := len(journal.rows)) < setup.epochs:
        raise UsageError(
            f"{folder.path} keeps the network of epoch {done} of {setup.epochs} alone; let the run end, or {again}"
        )
    network.learner.eval()
    return network


def _anyones(path: str, config: Config) -> Embedder:
    """Return the network that a function of somebody's makes. Raises UsageError."""
    import torch

    from .registry import imported
    from .setup import resolve_device

    try:
        network = imported(path)()
    except Exception as error:  # anybody's may raise any
        raise UsageError(
            f"{path} cannot be called ({type(error).__name__}: {error}); name a function of a module on PYTHONPATH"
        ) from None
    if not isinstance(network, torch.nn.Module):
        raise UsageError(f"{path} returns {type(network).__name__}; let it return a torch.nn.Module")
    torch.set_num_threads(config.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is what it says, as in a run
    device = resolve_device(config.device)
    network = network.to(device).eval()
    return Embedder(lambda batches: torch.cat([network(images) for _, images, _ in batches]), device, torch.float32)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

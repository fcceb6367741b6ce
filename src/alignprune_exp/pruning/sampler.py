"""What a DataLoader needs: items that know their index, and the samples of the epoch that this process trains on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Sampler

if TYPE_CHECKING:
    from .selecting import Selecting


class Indexed(Dataset[tuple[int, Any]]):
    """A map-style data set whose items come with their index. Raises TypeError for a data set of another kind."""

    def __init__(self, dataset: Any) -> None:
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"{type(dataset).__name__} is an IterableDataset, and samples are chosen by index: pass a map-style "
                "face of it, such as list(dataset) where that fits into memory, or wids.ShardListDataset(shards) for "
                "WebDataset's shards"
            )
        if not all(hasattr(dataset, name) for name in ("__len__", "__getitem__")):
            raise TypeError(
                f"{type(dataset).__name__} cannot be pruned: samples are chosen by index, so pass a map-style data set "
                "with __len__ and __getitem__, such as list(dataset)"
            )
        if isinstance(dataset, Mapping) and len(dataset) and 0 not in dataset:
            raise TypeError(
                f"{type(dataset).__name__} is a mapping without the key 0, and samples are chosen by index: pass what "
                f"it holds, such as dataset[{next(iter(dataset))!r}]"
            )
        if hasattr(dataset, "iloc"):
            raise TypeError(
                f"{type(dataset).__name__} finds items by their labels, and samples are chosen by their place: pass a "
                "list of them, such as frame.to_dict('records') or series.tolist()"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        """Return a batch's items, which some data sets, such as Hugging Face's, read faster at once.

        Raises TypeError where these return no list of so many, but a batch, whose columns would pass for items.
        """
        if not callable(getattr(self.dataset, "__getitems__", None)):
            return [self[index] for index in indices]
        items = self.dataset.__getitems__(indices)
        if not isinstance(items, list) or len(items) != len(indices):
            what = f"a list of {len(items)}" if isinstance(items, list) else type(items).__name__
            raise TypeError(
                f"{type(self.dataset).__name__}.__getitems__ returned {what} for {len(indices)} indices; return a list "
                "of as many items, and make a batch of them in collate_fn"
            )
        return list(zip(indices, items, strict=True))

    def __reduce__(self) -> tuple[type[Copied], tuple[Any]]:
        return Copied, (self.dataset,)


class Copied(Indexed):
    """What becomes of a pruning that is pickled, as for a loader's workers, or copied."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this is a copy of a pruning, or a pickled one, which is its data set alone and has no {name!r}; keep its "
            "state_dict() instead, and load_state_dict() it in a DynamicPruning made anew"
        )


class EpochSampler(Sampler[int]):
    """Yields the running epoch's samples, shuffled; its length is the running epoch's, and 0 after the last one.

    Of several processes each gets as many, every one of them the next sample in turn, so that a step's batches in all
    of them are the batch of a single process. What is left over, fewer samples than processes, is left out; these are
    other ones in every epoch.
    """

    def __init__(self, pruning: Selecting) -> None:
        self._pruning = pruning
        self._left_out: np.ndarray | None = None

    def __len__(self) -> int:
        pruning = self._pruning
        return 0 if pruning.epoch >= pruning.epochs else self._each(len(pruning.selection.indices))

    def __iter__(self) -> Iterator[int]:
        return iter(self.share().tolist())

    def leave_out_trained(self) -> None:
        """Yield, in what is left of the running epoch, only what has not been trained on by now.

        That is divided anew, so that processes get as many each, however many there were before. The length stays the
        whole epoch's, for loops that count the steps done before they were interrupted and skip no batch of a resumed
        epoch themselves. Raises RuntimeError where processes have observed what they have not yet exchanged.
        """
        if self._pruning.processes.size > 1:
            self._pruning.running.check_shared()
        self._left_out = self._pruning.running.trained.cpu().numpy().copy()
        self._pruning._weights = None  # of another share

    def begin(self) -> None:
        """Leave out nothing from now on."""
        self._left_out = None

    def share(self) -> np.ndarray:
        """Return what the sampler yields, (m,). Raises ValueError where there are more processes than samples."""
        order, processes = self._pruning.order(), self._pruning.processes
        self._each(len(order))
        if self._left_out is not None:
            order = order[~self._left_out[order]]
        if not self._pruning.divide:
            return order
        return order[: len(order) // processes.size * processes.size][processes.rank :: processes.size]

    def _each(self, samples: int) -> int:
        size = self._pruning.processes.size if self._pruning.divide else 1
        if samples < size:
            raise ValueError(
                f"epoch {self._pruning.epoch} has {samples} samples for {size} processes; train in {samples} or fewer"
            )
        return samples // size

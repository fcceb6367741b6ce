"""Parquet files of an image classification set, as on the Hugging Face hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignprune_exp.data.images import Cut, Shards
from alignprune_exp.data.index import Found, Listing, Survey, surveyed
from alignprune_exp.data.source import OF_PHOTOGRAPHS, Source, brief, existing
from alignprune_exp.errors import UsageError


def parquet(
    name: str,
    *,
    root: str | Path | None,
    image_column: str,
    label_column: str,
    train_split: str,
    test_split: str,
    on_error: str,
    **cut: Any,
) -> Source:
    """Shards of an image classification set of the Hugging Face hub: ``[data/]<split>[-*].parquet``."""
    root = existing(name, root, "<split>.parquet or <split>-*.parquet, or data/ with them")
    shards = {}
    for split, key, called in (("train", "train_split", train_split), ("test", "test_split", test_split)):
        shards[split] = shards_of(root, called, "data", called)
        if not shards[split]:
            raise UsageError(
                f"dataset.{key}={called} has no {called}.parquet or {called}-*.parquet under {root}: {_known(root)}"
            )
        for shard in shards[split]:
            names = column_names(root / shard)
            for option, column in (("image_column", image_column), ("label_column", label_column)):
                if column not in names:
                    raise UsageError(
                        f"dataset.{option}={column} is no column of {root / shard}: use one of {', '.join(names)}"
                    )
    tables = Tables(root, [*shards["train"], *shards["test"]], image_column, [label_column])

    def read(survey: Survey) -> tuple[list[str], dict[str, Listing]]:
        for shard in [*shards["train"], *shards["test"]]:
            survey.stamp(root / shard)
        classes = tables.classes(shards["train"], label_column)
        splits = {}
        for split, files in shards.items():
            where = f"{root / files[0]} and its like"
            found = tables.found(survey, files, label_column, classes)
            splits[split] = survey.listing(found, where, [f"{label} in {where}" for label in classes])
        return classes, splits

    return surveyed(
        name,
        read,
        lambda split, listing: Shards(root, listing.paths, Cut(**cut), tables.images(shards[split])),
        key=[root.resolve(), shards, image_column, label_column],
        on_error=on_error,
        labels_clean=True,
        **OF_PHOTOGRAPHS,
    )


def shards_of(root: Path, split: str, *folders: str) -> list[str]:
    """Return the Parquet files of a split, relative to ``root``, which has them itself or in one of ``folders``."""
    for place in (root, *(root / folder for folder in folders)):
        for pattern in (f"{split}.parquet", f"{split}-*.parquet"):
            if files := sorted(place.glob(pattern)):
                return [file.relative_to(root).as_posix() for file in files]
    return []


def _known(root: Path) -> str:
    there = sorted({file.name.partition("-")[0].removesuffix(".parquet") for file in root.rglob("*.parquet")})
    return f"the folder has {', '.join(there)}" if there else "the folder has no Parquet file"


class Tables:
    """Parquet files, each read once, before there are processes that decode, which then share what is in memory.

    Args:
        root: their folder.
        shards: relative to it.
        image: the column of encoded images, a struct with ``bytes``.
        labels: the columns of class numbers or names.

    Raises UsageError where they take more than half of this machine's memory.
    """

    def __init__(self, root: Path, shards: Iterable[str], image: str, labels: Sequence[str]) -> None:
        self.root, self._image, self._labels = root, image, labels
        self._read: dict[str, Any] = {}
        needed = sum((root / shard).stat().st_size for shard in shards)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory / 2:
            raise UsageError(
                f"the Parquet files under {root} take {needed / 1e9:.0f} GB, more than half of this machine's memory: "
                "write their images out as train/<class>/ and val/<class>/ and use dataset=imagenet"
            )

    def table(self, shard: str) -> Any:
        if shard not in self._read:
            self._read[shard] = _table(self.root / shard, self._image, self._labels)
        return self._read[shard]

    def images(self, shards: Iterable[str]) -> dict[str, Any]:
        """Return the encoded images of each shard, pyarrow.ChunkedArray of binary."""
        import pyarrow.compute as pc

        return {shard: pc.struct_field(self.table(shard).column(self._image), "bytes") for shard in shards}

    def classes(self, shards: Sequence[str], column: str) -> list[str]:
        """Return the class names that the hub's ``datasets`` writes into the schema; else those that occur."""
        if (names := self.hub_names(shards[0], column)) is not None:
            return names
        values = {value for shard in shards for value in self.table(shard).column(column).unique().to_pylist()}
        values -= {None}
        if all(isinstance(value, str) for value in values):
            return sorted(values)
        return [str(c) for c in range(max(values, default=-1) + 1)]

    def hub_names(self, shard: str, column: str) -> list[str] | None:
        try:
            features = json.loads((self.table(shard).schema.metadata or {})[b"huggingface"])["info"]["features"]
            return [str(name) for name in features[column]["names"]]
        except (KeyError, TypeError, ValueError):
            return None

    def found(self, survey: Survey, shards: Iterable[str], column: str, classes: Sequence[str]) -> Iterator[Found]:
        """Yield the images of a split with their labels out of a ``column``."""
        import pyarrow.compute as pc

        number_of = {value: c for c, value in enumerate(classes)}
        for shard, encoded in self.images(shards).items():
            sizes = pc.fill_null(pc.binary_length(encoded), 0).to_pylist()
            for row, value in enumerate(self.table(shard).column(column).to_pylist()):
                label = number_of.get(value) if isinstance(value, str) else value
                if label is None or not 0 <= label < len(classes):
                    survey.refuse(
                        f"row {row} of {self.root / shard} has {column} {value} where 0 to {len(classes) - 1} are "
                        "wanted",
                        "mend or replace that file",
                    )
                else:
                    yield os.fsencode(f"{shard}#{row}"), sizes[row], label


@contextmanager
def _parquet(file: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{file} cannot be read as Parquet ({brief(error)}): fetch that file again") from error


def column_names(file: Path) -> list[str]:
    import pyarrow.parquet as pq

    with _parquet(file):
        return list(pq.read_schema(file).names)


def _table(file: Path, image: str, labels: Sequence[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _parquet(file):
        table = pq.read_table(file, columns=[image, *labels])
    kind = table.schema.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise UsageError(f"the column {image} of {file} holds {kind} where a struct with bytes is wanted")
    for label in labels:
        kind = table.schema.field(label).type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind)):
            raise UsageError(f"the column {label} of {file} holds {kind} where class numbers or names are wanted")
    return table

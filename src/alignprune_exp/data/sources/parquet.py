"""Parquet files of an image classification set, as on the Hugging Face hub."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from alignprune_exp.data.images import Cut, Photographs, Shards
from alignprune_exp.data.index import Index, Listed, Listing, Survey, surveyed
from alignprune_exp.data.source import Source, brief, existing, hub_names
from alignprune_exp.errors import UsageError


def parquet(
    name: str,
    *,
    root: Path | None,
    image_column: str,
    label_column: str,
    train_split: str,
    test_split: str,
    on_error: str,
    **cut: Any,
) -> Source:
    """Shards of an image classification set of the Hugging Face hub: ``[data/]<split>[-*].parquet``.

    The encoded images are held in memory, once for all processes that decode them.
    """
    root = existing(name, root, "<split>.parquet or <split>-*.parquet, or data/ with them")
    shards = {"train": _shards(root, "train_split", train_split), "test": _shards(root, "test_split", test_split)}
    _fits_into_memory(root, [root / shard for files in shards.values() for shard in files])

    @cache
    def table(shard: str) -> Any:
        return _read_parquet(root / shard, image_column, label_column)

    @cache
    def column(shard: str) -> Any:
        import pyarrow.compute as pc

        return pc.struct_field(table(shard).column(image_column), "bytes")

    def read(survey: Survey) -> Index:
        import pyarrow.compute as pc

        for shard in (shard for files in shards.values() for shard in files):
            survey.stamp(root / shard)
        classes = _parquet_classes([table(shard) for shard in shards["train"]], label_column)
        number_of = {value: c for c, value in enumerate(classes)}
        splits = {}
        for split, files in shards.items():
            listed = Listed()
            for shard in files:
                sizes = pc.fill_null(pc.binary_length(column(shard)), 0).to_pylist()
                for row, value in enumerate(table(shard).column(label_column).to_pylist()):
                    label = number_of.get(value) if isinstance(value, str) else value
                    if label is None or not 0 <= label < len(classes):
                        survey.refuse(
                            f"row {row} of {root / shard} has {label_column} {value} where 0 to {len(classes) - 1} are "
                            "wanted",
                            "mend that file",
                        )
                    else:
                        listed.add(f"{shard}#{row}".encode(), sizes[row], label)
            splits[split] = listed.listing()
        names = [str(value) for value in classes]
        survey.nonempty(splits["train"], names, f"{{}} in {root / shards['train'][0]} and its like")
        survey.nonempty(splits["test"], names, f"{{}} in {root / shards['test'][0]} and its like")
        return Index(splits, tuple(names), tuple(survey.skipped))

    def store(split: str, listing: Listing) -> Photographs:
        for shard in shards[split]:
            column(shard)  # before there are other processes, which then share it
        return Shards(root, listing.paths, Cut(**cut), column)

    return surveyed(
        [name, root.resolve(), shards, image_column, label_column, on_error],
        read,
        store,
        labels_clean=True,
    )


def _shards(root: Path, key: str, split: str) -> list[str]:
    for place in (root, root / "data", root / split):
        for pattern in (f"{split}.parquet", f"{split}-*.parquet"):
            if files := sorted(place.glob(pattern)):
                return [file.relative_to(root).as_posix() for file in files]
    there = sorted({file.name.partition("-")[0].removesuffix(".parquet") for file in root.rglob("*.parquet")})
    known = f"the folder has {', '.join(there)}" if there else "the folder has no Parquet file"
    raise UsageError(f"dataset.{key}={split} has no {split}.parquet or {split}-*.parquet under {root}: {known}")


def _fits_into_memory(root: Path, files: list[Path]) -> None:
    needed = sum(file.stat().st_size for file in files)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory / 2:
        raise UsageError(
            f"the Parquet files under {root} take {needed / 1e9:.0f} GB, more than half of this machine's memory: "
            "write their images out as train/<class>/ and val/<class>/ and use dataset=imagenet"
        )


def _read_parquet(file: Path, image: str, label: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        for key, column in (("image_column", image), ("label_column", label)):
            if column not in schema.names:
                raise UsageError(f"dataset.{key}={column} is no column of {file}: use one of {', '.join(schema.names)}")
        kind = schema.field(image).type
        if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            raise UsageError(f"the column {image} of {file} holds {kind} where a struct with bytes is wanted")
        kind = schema.field(label).type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind)):
            raise UsageError(f"the column {label} of {file} holds {kind} where class numbers or names are wanted")
        return pq.read_table(file, columns=[image, label])
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{file} cannot be read as Parquet ({brief(error)}): fetch that file again") from error


def _parquet_classes(tables: list[Any], column: str) -> list[str]:
    """Return the class names that the hub writes into the schema; else those that occur in training."""
    if (names := hub_names(tables[0].schema, column)) is not None:
        return list(names)
    values = {value for table in tables for value in table.column(column).unique().to_pylist()} - {None}
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    return [str(c) for c in range(max(values, default=-1) + 1)]

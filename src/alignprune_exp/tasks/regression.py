"""Regression: a sample is a row of a table, its loss the squared error of its target; the headline is the RMSE.

Shape legend: n samples, B samples of a batch, F features.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ..config import MODEL, Config
from ..data import columns
from ..data.batches import Batch, Batches, TensorBatches
from ..data.source import DataSet, Root, brief
from ..data.sources.digits import shipped
from ..errors import UsageError
from ..files import below, typed_path
from ..pruning.seeding import generator
from ..records import Metric
from .base import RowsTask

if TYPE_CHECKING:
    from ..distributed import Processes
    from ..network import Network

MOST_TEXTS = 100  # different ones that a column may have to be features
LARGEST = 1e100  # number that can be squared, and many of these summed
FARTHEST = float(np.finfo(np.float32).max) ** 0.5  # in standard deviations; a loss is a square, in float32
PANDAS_INDEX = "__index_level_"  # begins the column of an index without a name


class Regression(RowsTask):
    """Rows of numbers with one target each, all standardised by what is trained on; losses are of standardised targets.

    Attributes:
        targets: those trained on, wrong ones among them, float64 (n,).
        centre, spread: mean and standard deviation of these.
    """

    metrics = (
        Metric("rmse", "test RMSE", higher=False, digits=3),
        Metric("r2", "test R²", digits=3),
    )
    chance_loss = 1.0
    smooths = False
    flips = False
    data: Table

    def __init__(self, config: Config, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, device, dtype)
        train, parts = self.data.train, self.parts
        self.targets = self._given("corruption", parts.train, parts.wrong, f"noise={self.config.noise.name}")
        self._trusted = self._given("reference corruption", parts.reference, parts.doubted, "reference.noise")
        self.centre, self.spread = self.targets.mean(), self.targets.std()
        for which, targets in (("train", self.targets), ("evaluate", self.data.test.targets[parts.test])):
            if np.ptp(targets) == 0 or targets.std() == 0:  # of which rounding may leave too much, or nothing
                raise UsageError(
                    f"all {len(targets)} targets to {which} on are {targets[0]:g}: give it others, or more"
                )
        with np.errstate(all="ignore"):
            rows = np.where(np.isnan(train.features[parts.train]).all(0), 0.0, train.features[parts.train])
            self._mean, spread = np.nanmean(rows, 0), np.nanstd(rows, 0)
            self._std = np.where((spread > 0) & (np.nanmax(rows, 0) > np.nanmin(rows, 0)), spread, 1)
        for part, chosen in ((train, parts.train), (train, parts.reference), (self.data.test, parts.test)):
            self._check_near(part.of(chosen))

    def _check_near(self, rows: Rows) -> None:
        """Raise UsageError where a value is too far from those trained on to compute with."""
        values = np.column_stack([rows.features, rows.targets])
        centre, spread = np.append(self._mean, self.centre), np.append(self._std, self.spread)
        with np.errstate(over="ignore"):
            far = np.argwhere(np.abs((values - centre) / spread) > FARTHEST)
        if len(far):
            row, column = far[0]
            name = [*self.data.columns, "of targets"][column]
            raise UsageError(
                f"the column {name} has the value {values[row, column]:g} in row {rows.rows[row]}, where the mean of "
                f"those trained on is {centre[column]:g} and their standard deviation {spread[column]:g}: mend that "
                "value, or leave its row or its column out"
            )

    def _given(self, purpose: str, rows: np.ndarray, wrong: np.ndarray, key: str) -> np.ndarray:
        """Return the targets of some rows, the ``wrong`` ones of which have changed places among themselves."""
        targets = self.data.train.targets[rows]
        try:
            targets[wrong] = permuted(targets[wrong], generator(self.config.seed, purpose))
        except ValueError as error:
            raise UsageError(f"{key}: {error}") from None
        return targets

    @cached_property
    def train(self) -> Batches:
        return self._batches(self.data.train.features[self.parts.train], self.targets)

    @cached_property
    def reference(self) -> Batches:
        if not self.held_out:
            return self.train
        return self._batches(self.data.train.features[self.parts.reference], self._trusted)

    @cached_property
    def tests(self) -> dict[str, Batches]:
        test, rows = self.data.test, self.parts.test
        return {"": self._batches(test.features[rows], test.targets[rows])}

    def _batches(self, features: np.ndarray, targets: np.ndarray) -> Batches:
        """Return batches of inputs (B, F), in which a missing value is the mean, and of targets (B,)."""
        inputs = np.nan_to_num((features - self._mean) / self._std)
        arrays = (
            torch.from_numpy(inputs).to(self.dtype),
            torch.from_numpy((targets - self.centre) / self.spread).float(),
        )
        return TensorBatches(*arrays, batch_size=self.config.batch_size, device=self.device)

    def network(self) -> nn.Module:
        """Return a freshly initialised network: from features (B, F) to standardised targets (B, 1)."""
        return self.fitted(MODEL.make(self.config.model, len(self.data.columns), 1))

    def losses(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        if outputs.shape[1:] != (1,):
            raise ValueError("the outputs are not one number a sample")
        squared = (outputs[:, 0] - targets).square()
        return squared, squared, None

    @torch.no_grad()
    def evaluate(self, network: Network, batches: Iterable[Batch], n: int, processes: Processes) -> dict[str, float]:
        """Return the RMSE in units of the target, the share of its variance that is explained, and the mean loss."""
        total = torch.zeros((), dtype=torch.float64, device=network.device)
        for _, features, targets in batches:
            total += self.losses(network.logits(features), targets)[0].double().sum()
        loss = processes.sum(total).item() / n
        rmse = self.spread * math.sqrt(loss)
        deviation = self.data.test.targets[self.parts.test].std()  # float32 may tell none of these from another
        return {"rmse": rmse, "r2": 1 - (rmse / deviation) ** 2, "loss": loss}

    def columns(self) -> dict[str, Any]:
        clean = self.data.train.targets[self.parts.train] if self.parts.known else None
        return {
            "index": self.data.train.rows[self.parts.train],
            "target": self.targets,
            "clean_target": clean,
            "corrupted": self.corrupted,
        }


def permuted(targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return targets (k,) in another order, in which none keeps its value.

    Raises ValueError where there is no such order, since more than half of them are alike.
    """
    values, counts = np.unique(targets, return_counts=True)
    if len(targets) and 2 * counts.max() > len(targets):
        most = counts.argmax()
        raise ValueError(
            f"of {len(targets)} targets to permute {counts[most]} are {values[most]:g}, so some would keep theirs; "
            "use another rate"
        )
    given = rng.permutation(targets)
    for place in np.flatnonzero(given == targets):
        if (value := targets[place]) == given[place]:  # it may have changed places meanwhile
            other = rng.choice(np.flatnonzero((given != value) & (targets != value)))
            given[[place, other]] = given[[other, place]]
    return given


# --- data sets


@dataclass(frozen=True)
class Rows:
    """Some rows of a table.

    Attributes:
        features: float64 (n, F), NaN where a value is missing.
        targets: float64 (n,).
        rows: their numbers in the table, int64 (n,).
    """

    features: np.ndarray
    targets: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def of(self, some: np.ndarray) -> Rows:
        return Rows(self.features[some], self.targets[some], self.rows[some])


@dataclass(frozen=True)
class Table:
    """A table, of which some rows are trained and others evaluated on.

    Attributes:
        columns: the names of the features.
        clean: whether the targets count as clean where no noise is injected.
        skipped: rows without a target.
    """

    train: Rows
    test: Rows
    columns: list[str]
    clean: bool
    skipped: list[str]

    @classmethod
    def split(cls, rows: Rows, held_out: float, columns: list[str], clean: bool, skipped: list[str]) -> Table:
        """Hold out a share of the rows, the same in every run. Raises UsageError where none are left on a side."""
        count = round(held_out * len(rows))
        if not 1 <= count <= len(rows) - 2:
            raise UsageError(
                f"dataset.held_out={held_out:g} takes {count} of {len(rows)} rows: type a share that leaves one to "
                "evaluate and two to train on"
            )
        order = generator(0, "held-out rows").permutation(len(rows))
        train, test = (rows.of(np.sort(some)) for some in (order[count:], order[:count]))
        return cls(train, test, columns, clean, skipped)

    @cached_property
    def fingerprint(self) -> str:
        """sha256, as hex, of every value."""
        digest = hashlib.sha256(json.dumps(self.columns).encode())
        for part in (self.train, self.test):
            for values in (part.rows, part.features, part.targets):
                digest.update(f"{values.shape}".encode() + np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Diabetes(DataSet):
    """scikit-learn's: 442 patients, ten measurements each, and their disease a year later (Efron et al., 2004)."""

    name: str
    held_out: Annotated[float, Field(gt=0, lt=1)]

    task: ClassVar[str] = "regression"

    def open(self) -> Table:
        files = (shipped("data", f"diabetes_{part}.csv.gz") for part in ("data_raw", "target"))
        features, targets = map(np.loadtxt, files)  # as sklearn.datasets.load_diabetes does
        columns = ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]
        return Table.split(Rows(features, targets, np.arange(len(targets))), self.held_out, columns, True, [])


@dataclass(frozen=True, kw_only=True)
class ParquetTable(DataSet):
    """A table of one's own, in Parquet files. Numbers and truth values are features; texts are one feature each.

    An index that pandas wrote beside them is none, unless it has a name or ``features`` names it: what orders the rows
    may tell the target.
    """

    name: str
    root: Root
    target: Annotated[str, Field(min_length=1)]
    features: list[str] | None
    held_out: Annotated[float, Field(gt=0, lt=1)]

    task: ClassVar[str] = "regression"

    def open(self) -> Table:
        table = self._read()
        others = [name for name in table.column_names if name != self.target]
        names = others if self.features is None else self.features
        for name in (self.target, *names):
            if name not in table.column_names:
                key = "target" if name == self.target else "features"
                there = ", ".join(table.column_names)
                raise UsageError(f"{self.root} has no column {name}, but {there}: type dataset.{key}=… of these")
        if self.target in names:
            raise UsageError(f"dataset.features has {self.target}, which is the target: leave it out")
        features: dict[str, np.ndarray] = {}
        for each in dict.fromkeys(names):
            numbers = self._numbers(each, table.column(each))
            if twice := [name for name in numbers if name in features]:
                raise UsageError(
                    f"the column {each} of {self.root} makes a feature {twice[0]}, and so does another column: rename "
                    "one, or choose other columns with dataset.features=[…]"
                )
            features |= numbers
        if not features:
            raise UsageError(f"{self.root} has no column with values beside {self.target} to predict it by: add some")
        ((_, targets),) = self._numbers(self.target, table.column(self.target), texts=False).items()
        missing = np.isnan(targets)
        if missing.all():
            raise UsageError(f"no row of {self.root} has a {self.target}: choose another column with dataset.target=…")
        rows = Rows(np.column_stack(list(features.values())), targets, np.arange(len(targets)))
        skipped = [f"row {row} of {self.root} has no {self.target}" for row in np.flatnonzero(missing)]
        return Table.split(rows.of(np.flatnonzero(~missing)), self.held_out, list(features), False, skipped)

    def _read(self) -> Any:
        """Return the columns of all files, in the order of the first one's; numbers as float64."""
        import pyarrow as pa

        files = self._files()
        tables = [self._columns(file) for file in files]
        schema = tables[0].schema
        for file, table in zip(files, tables, strict=True):
            try:
                schema = _united(schema, table.schema)
            except (ValueError, TypeError) as error:
                differ = f"{files[0]} and {file} differ in their columns ({brief(error)})"
                raise UsageError(f"{differ}: write all with the same, or move the others elsewhere") from None
        return pa.concat_tables([table.select(schema.names) for table in tables], promote_options="permissive")

    def _files(self) -> list[Path]:
        if self.root is None:
            raise UsageError(f"dataset={self.name} needs its file: type dataset.root=FILE.parquet, or a folder of such")
        root = typed_path(self.root)
        files = [root] if root.is_file() else [file for file in below(root, "*") if file.suffix.lower() == ".parquet"]
        if not files:
            raise UsageError(f"dataset.root={root} is no Parquet file, nor a folder of *.parquet: type where these are")
        return files

    def _columns(self, file: Path) -> Any:
        import pyarrow as pa

        table, asked = columns.read(file), {self.target, *(self.features or ())}
        names = [name for name in table.column_names if name in asked or not name.startswith(PANDAS_INDEX)]
        return pa.table({name: _as_numbers(table.column(name)) for name in names})

    def _numbers(self, name: str, column: Any, texts: bool = True) -> dict[str, np.ndarray]:
        """Return a column as numbers, float64 (n,), NaN for what is missing; of texts one for each of them, 0 or 1."""
        import pyarrow as pa

        leave = f"choose other columns with dataset.{'features=[…]' if texts else 'target=…'}"
        if pa.types.is_float64(column.type):
            numbers = column.to_numpy()
            if (large := numbers[np.abs(numbers) > LARGEST]).size:
                raise UsageError(f"the column {name} of {self.root} has the value {large[0]:g}: mend it, or {leave}")
            return {name: numbers}
        if (held := columns.holds(column)) != columns.TEXTS or not texts:
            raise UsageError(f"the column {name} of {self.root} holds {held} where numbers are wanted: {leave}")
        values = np.array(column.to_pylist(), dtype=object)
        if len(known := sorted(set(values) - {None})) > MOST_TEXTS:
            raise UsageError(f"the column {name} of {self.root} has {len(known)} different texts, too many: {leave}")
        missing = np.array([value is None for value in values])
        return {f"{name}={text}": np.where(missing, np.nan, values == text) for text in known}


def _united(schema: Any, other: Any) -> Any:
    """Return the schema of two tables together. Raises ValueError or TypeError that says where they differ."""
    import pyarrow as pa

    if lone := set(schema.names) ^ set(other.names):
        raise ValueError(f"{min(lone)} is in one of them alone")
    return pa.unify_schemas([schema, other], promote_options="permissive")


def _as_numbers(column: Any) -> Any:
    """Return a column of numbers, or truth values, as float64; others as they are."""
    import pyarrow as pa

    kinds = pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal
    return column.cast(pa.float64(), safe=False) if any(fits(column.type) for fits in kinds) else column


# --- a network


def mlp(
    features: int,
    outputs: int,
    *,
    width: Annotated[int, Field(ge=1, le=65_536)],
    layers: Annotated[int, Field(ge=1, le=100)],
) -> nn.Module:
    """Layers of ``width`` with ReLU between: from features (B, F) to (B, outputs)."""
    sizes = [features, *[width] * layers]
    hidden = [part for before, after in pairwise(sizes) for part in (nn.Linear(before, after), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))

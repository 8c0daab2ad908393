"""Data sets become samples, samples become minibatches; the order is a pure function of (seed, epoch)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from random import Random
from typing import Any

from aggregator.checks import check_positive
from aggregator.errors import ConfigError, TrainingWarning
from aggregator.records import Sample
from aggregator.text import show_count

Dataset = Mapping[str, Any] | Iterable[tuple[Any, Any]] | Iterable[Mapping[str, Any]] | Iterable[Any]
"""`{"inputs": [...], "infos": [...]}`, pairs (x, info), rows with named columns, or DSPy's Examples."""

_NUMBERED = {
    "iterrows": "the rows of a data frame with their index; give the data frame",
    "enumerate": "numbered items; give them without enumerate(...)",
    "DataFrameGroupBy": "groups of rows; give the data frame",
}
"""Iterators of pairs that are not (x, info), and the remedy for each."""

_FORMS = "Expected dict(inputs=[...], infos=[...]), a sequence of (x, info), or rows as dicts of named columns"


def samples(dataset: Dataset | DataLoader, *, name: str = "train_dataset") -> tuple[Sample, ...]:
    """Read a data set; a sample's id is its position.

    A data set is `dict(inputs=..., infos=...)`, pairs (x, info), or rows with named columns: dicts, a pandas DataFrame,
    a Hugging Face Dataset. A row is both x and info. For a DSPy Example the input fields are x, and the Example is
    info. Generators are read once, to their end, and data sets with `__len__` and `__getitem__` (torch's) by position.
    A DataLoader, ours or Trace's, gives its data; its batches are not used, and a TrainingWarning says so.

    Raises ConfigError if it is empty, of unequal lengths or of another form.

    >>> samples({"inputs": ["a"], "infos": [1]})
    (Sample(id=0, x='a', info=1),)
    """
    data = _data_of_loader(dataset, name)
    pairs = _from_columns(data, name) if isinstance(data, Mapping) else _from_items(data, name)
    if not pairs:
        raise ConfigError(f"Expected at least one (x, info) in {name}, got none")
    return tuple([Sample(i, x, info) for i, (x, info) in enumerate(pairs)])


def _data_of_loader(dataset: Any, name: str) -> Any:
    """Return the data of a loader of minibatches, whose batches would look like pairs; other data unchanged."""
    data = dataset.samples if isinstance(dataset, DataLoader) else getattr(dataset, "dataset", None)
    if data is None or not hasattr(dataset, "batch_size") or _is_frame(dataset):  # a frame may have such columns
        return dataset
    warnings.warn(
        f"{name} is a DataLoader: its data are used, its batches are not; "
        f"give batch_size={dataset.batch_size} to train",
        TrainingWarning,
        stacklevel=3,
    )
    return [(sample.x, sample.info) for sample in data] if isinstance(dataset, DataLoader) else data


def _is_frame(dataset: Any) -> bool:
    return hasattr(dataset, "columns") and hasattr(dataset, "to_dict")


def _from_columns(dataset: Mapping[str, Sequence[Any]], name: str) -> list[tuple[Any, Any]]:
    if "inputs" not in dataset:
        keys = sorted(map(str, dataset))
        splits = {"train", "test", "validation"}.intersection(keys)
        split = f"; give one split, as in data[{'train' if 'train' in keys else keys[0]!r}]" if splits else ""
        raise ConfigError(f"{_FORMS}, got a mapping with the keys {keys} for {name}{split}")
    inputs = _plain(dataset["inputs"])
    infos = _plain(dataset.get("infos", [None] * len(inputs)))
    if len(inputs) != len(infos):
        raise ConfigError(
            f"Expected as many infos as inputs, got {len(inputs)} inputs and {len(infos)} infos in {name}"
        )
    return list(zip(inputs, infos, strict=True))


def _plain(column: Any) -> list[Any]:
    """Return a column as a list, with Python's own values if numpy or pandas holds it."""
    return list(column.tolist() if getattr(column, "ndim", None) == 1 else column)


def _from_items(dataset: Any, name: str) -> list[tuple[Any, Any]]:
    if isinstance(dataset, AbstractSet):
        raise ConfigError(f"{_FORMS}, got a {type(dataset).__name__} for {name}, whose order differs from run to run")
    if _is_frame(dataset):  # its iteration gives column names
        dataset = dataset.to_dict("records")
    kind = getattr(dataset, "__name__", type(dataset).__name__)  # a generator has its function's name
    if kind in _NUMBERED and not isinstance(dataset, Sequence):
        raise ConfigError(f"{_FORMS}, got {_NUMBERED[kind]} - at {name}")
    if not hasattr(dataset, "__iter__") and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        dataset = [dataset[i] for i in range(len(dataset))]  # a map-style data set, as torch's
    if isinstance(dataset, str | bytes) or not hasattr(dataset, "__iter__"):
        raise ConfigError(f"{_FORMS}, got {type(dataset).__name__} for {name}")
    return [_pair(item, f"{name}[{i}]") for i, item in enumerate(dataset)]


def _pair(item: Any, place: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        row = dict(item)
        return row, row
    if hasattr(item, "with_inputs") and hasattr(item, "toDict"):  # dspy.Example
        try:
            return item.inputs().toDict(), item
        except ValueError:
            raise ConfigError(
                f"Expected an Example that says which fields are inputs, got {item!r} at {place}; call "
                "example.with_inputs('question')"
            ) from None
    if isinstance(item, tuple) and getattr(item, "_fields", ("",))[0] == "Index":
        raise ConfigError(f"{_FORMS}, got a row of itertuples() at {place}; give the data frame")
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ConfigError(f"{_FORMS}, got {type(item).__name__} at {place}")
    return item[0], item[1]


def minibatches(
    size: int, batch_size: int, *, seed: int, epoch: int, shuffle: bool = True, replacement: bool = False
) -> list[tuple[int, ...]]:
    """Return the positions of each minibatch of one epoch; the last may be smaller.

    The same arguments give the same batches everywhere: no global random generator, no state.

    >>> minibatches(5, 2, seed=0, epoch=0, shuffle=False)
    [(0, 1), (2, 3), (4,)]
    """
    check_positive("batch_size", batch_size)
    random = Random(f"{seed}/{epoch}")  # noqa: S311 - an order, not a secret
    order = list(range(size))
    if replacement:
        order = random.choices(order, k=size)
    elif shuffle:
        random.shuffle(order)
    return [tuple(order[i : i + batch_size]) for i in range(0, size, batch_size)]


class DataLoader:
    """Iterates over a data set in minibatches of (inputs, infos), one epoch per iteration.

    Each pass uses the next epoch's order, computed from (seed, epoch); `shuffle=False` keeps the order of the data.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        replacement: bool = False,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        check_positive("batch_size", batch_size)
        self.samples = samples(dataset, name="dataset")
        self.batch_size = batch_size
        self.replacement = replacement
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def __repr__(self) -> str:
        return f"<DataLoader of {show_count(len(self.samples), 'sample')}, batch_size={self.batch_size}>"

    def __len__(self) -> int:
        return (len(self.samples) + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[tuple[list[Any], list[Any]]]:
        batches = minibatches(
            len(self.samples),
            self.batch_size,
            seed=self.seed,
            epoch=self.epoch,
            shuffle=self.shuffle,
            replacement=self.replacement,
        )
        self.epoch += 1
        for batch in batches:
            chosen = [self.samples[i] for i in batch]
            yield [sample.x for sample in chosen], [sample.info for sample in chosen]

"""Data sets and the order of minibatches."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.errors import ConfigError, TrainingWarning
from aggregator.records import Sample
from aggregator.training.batches import DataLoader, minibatches, samples


@pytest.mark.requirement("Trace: DataLoader(dataset, batch_size, replacement, shuffle)")
@pytest.mark.parametrize(
    "dataset", [{"inputs": ["a", "b"], "infos": [1, 2]}, [("a", 1), ("b", 2)], (["a", 1], ["b", 2])]
)
def test_every_form_of_a_dataset_reads_the_same(dataset: Any) -> None:
    """Columns and pairs give the same samples, numbered by position."""
    assert samples(dataset) == (Sample(0, "a", 1), Sample(1, "b", 2))


def test_infos_may_be_left_out() -> None:
    """A guide gets None as info."""
    assert samples({"inputs": ["a"]}) == (Sample(0, "a", None),)


def test_numpy_columns_become_python_values() -> None:
    """An array of strings yields numpy.str_, which cannot be sent to a model; a matrix keeps its rows."""

    class Column(list[Any]):
        ndim = 1

        def tolist(self) -> list[Any]:
            return [item.lower() for item in self]

    class Matrix(Column):
        ndim = 2

    assert samples({"inputs": Column(["A"]), "infos": Matrix(["B"])}) == (Sample(0, "a", "B"),)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], r"Expected at least one \(x, info\) in train_dataset, got none"),
        ({"inputs": [], "infos": []}, r"Expected at least one \(x, info\) in train_dataset"),
        ({"inputs": [1, 2], "infos": [1]}, "got 2 inputs and 1 infos in train_dataset"),
        ({"x": [1]}, r"Expected dict\(inputs=.*got a mapping with the keys \['x'\]"),
        ([1, 2], r"got int at train_dataset\[0\]"),
        ([("a", 1, 2)], r"got tuple at train_dataset\[0\]"),
        ("abc", "got str for train_dataset"),
        (7, "got int for train_dataset"),
        ({("a", 1)}, "got a set for train_dataset, whose order differs from run to run"),
    ],
)
def test_an_invalid_dataset_is_a_config_error(dataset: Any, message: str) -> None:
    """The error for an empty, uneven or malformed data set says what was expected and what it got."""
    with pytest.raises(ConfigError, match=message):
        samples(dataset)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "8"])
def test_batch_size_is_a_positive_int(batch_size: Any) -> None:
    """batch_size 0 is refused before anything runs."""
    with pytest.raises(ConfigError, match="Expected batch_size to be an int of at least 1"):
        minibatches(4, batch_size, seed=0, epoch=0)


@given(size=st.integers(0, 50), batch_size=st.integers(1, 60), seed=st.integers(), epoch=st.integers(0, 9))
def test_an_epoch_visits_every_sample_once(size: int, batch_size: int, seed: int, epoch: int) -> None:
    """Batches partition the data set; the same arguments give the same batches."""
    batches = minibatches(size, batch_size, seed=seed, epoch=epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(size))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert batches == minibatches(size, batch_size, seed=seed, epoch=epoch)


@pytest.mark.requirement("Trace's defect 27: shuffle=False shuffled, by the global generator")
def test_order_depends_only_on_seed_and_epoch() -> None:
    """The global random generator is neither read nor changed."""
    random.seed(1)
    before = random.getstate()
    first = minibatches(20, 20, seed=0, epoch=0)
    assert random.getstate() == before
    assert first == minibatches(20, 20, seed=0, epoch=0)
    assert first != minibatches(20, 20, seed=0, epoch=1)
    assert first != minibatches(20, 20, seed=1, epoch=0)


@pytest.mark.requirement(
    "Trace: DataLoader(dataset, batch_size, replacement, shuffle)",
    "Trace's defect 27: shuffle=False shuffled, by the global generator",
)
def test_shuffle_false_keeps_the_order() -> None:
    """Trace's DataLoader(shuffle=False) shuffled nevertheless; ours does not."""
    loader = DataLoader([(i, None) for i in range(5)], batch_size=2, shuffle=False)
    assert [inputs for inputs, _ in loader] == [[0, 1], [2, 3], [4]]
    assert len(loader) == 3


def test_loader_draws_a_new_order_each_pass() -> None:
    """Each pass is the next epoch; a new loader with the same seed repeats them."""
    data = [(i, -i) for i in range(10)]
    loader = DataLoader(data, batch_size=10, seed=3)
    first, second = next(iter(loader)), next(iter(loader))
    assert first[0] != second[0]
    assert first[1] == [-x for x in first[0]]
    again = DataLoader(data, batch_size=10, seed=3)
    assert [next(iter(again)), next(iter(again))] == [first, second]


@pytest.mark.requirement("Trace: DataLoader(dataset, batch_size, replacement, shuffle)")
def test_replacement_draws_with_repeats() -> None:
    """With replacement an epoch has as many draws as samples, including repeats."""
    drawn = [i for batch in minibatches(50, 7, seed=0, epoch=0, replacement=True) for i in batch]
    assert len(drawn) == 50
    assert len(set(drawn)) < 50


ROWS = [{"question": "who?", "answer": "me"}, {"question": "where?", "answer": "here"}]


@pytest.mark.parametrize("data", [ROWS, tuple(ROWS), (row for row in ROWS), iter(ROWS)])
def test_rows_with_named_columns(data: Any) -> None:
    """A row has the agent's input and the guide's info; a generator is consumed once."""
    assert [(sample.x, sample.info) for sample in samples(data)] == [(row, row) for row in ROWS]


def test_a_generator_of_pairs() -> None:
    """Pairs may come from a generator."""
    assert [sample.x for sample in samples((i, i + 1) for i in range(3))] == [0, 1, 2]


def test_a_data_frame_gives_its_rows() -> None:
    """Iterating over a pandas DataFrame gives column names; the data set uses its rows."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    assert [sample.x for sample in samples(pandas.DataFrame(ROWS))] == ROWS


def test_a_data_frame_with_a_column_named_dataset_was_taken_for_a_loader() -> None:
    """Its columns are attributes too, and a loader is recognised by `dataset` and `batch_size`."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({"dataset": ["x", "y"], "batch_size": [1, 2]})
    assert [sample.x for sample in samples(frame)] == [
        {"dataset": "x", "batch_size": 1},
        {"dataset": "y", "batch_size": 2},
    ]


def test_parts_and_columns_of_a_data_frame() -> None:
    """Rows are numbered from 0, numbers are Python's, and columns serve as inputs and infos."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({"q": ["a", "b", "c"], "n": [1, 2, 3]})
    assert [(sample.id, sample.x) for sample in samples(frame[frame.n > 2])] == [(0, {"q": "c", "n": 3})]
    first, *_ = samples({"inputs": frame.q, "infos": frame.n})
    assert (first.x, first.info, type(first.info)) == ("a", 1, int)
    with pytest.raises(ConfigError, match="got str at train_dataset"):
        samples(frame.q)


def test_a_dataset_of_hugging_face_gives_its_rows() -> None:
    """Rows are dicts, also of a streamed data set; if there are several splits, one must be chosen."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    data = datasets.Dataset.from_list(ROWS)
    for kind in (data, data.to_iterable_dataset()):
        assert [sample.x for sample in samples(kind)] == ROWS
    with pytest.raises(ConfigError, match=r"keys \['test', 'train'\].*give one split, as in data\['train'\]"):
        samples(datasets.DatasetDict({"train": data, "test": data}))


def test_a_data_loader_was_taken_for_pairs() -> None:
    """Two batches of two look like pairs; the loader's data set is used, and the warning names the batch size."""
    pairs = [(i, str(i)) for i in range(4)]
    with pytest.warns(TrainingWarning, match="train_dataset is a DataLoader.*give batch_size=2 to train"):
        found = samples(DataLoader(pairs, batch_size=2))
    assert [(sample.x, sample.info) for sample in found] == pairs


def test_a_data_loader_of_trace_was_taken_for_pairs() -> None:
    """Trace's loader has its data set as `dataset`."""
    loader = SimpleNamespace(dataset={"inputs": [1, 2], "infos": ["a", "b"]}, batch_size=2)
    with pytest.warns(TrainingWarning, match="DataLoader"):
        found = samples(loader)
    assert [(sample.x, sample.info) for sample in found] == [(1, "a"), (2, "b")]


class Numbers:
    """A map-style data set, as torch's: no iterator, and no IndexError at its end."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> dict[str, int]:
        return {"number": i}


def test_a_map_style_data_set_was_refused() -> None:
    """It may also be the data set of a loader."""
    rows = [{"number": 0}, {"number": 1}]
    made: Any = Numbers()
    assert [sample.x for sample in samples(made)] == rows
    with pytest.warns(TrainingWarning, match="DataLoader"):
        assert [sample.x for sample in samples(SimpleNamespace(dataset=made, batch_size=2))] == rows


def test_numbered_rows_were_taken_for_pairs() -> None:
    """The agent got the number of a row as its input."""
    with pytest.raises(ConfigError, match=r"numbered items; give them without enumerate.* - at train_dataset"):
        samples(enumerate(ROWS))


def test_iterators_of_a_data_frame_were_taken_for_pairs() -> None:
    """The agent got the index of a row as its input; a frame of one column gave tuples of two."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(ROWS)
    for rows in (frame.iterrows(), frame.groupby("question"), frame.itertuples(), frame[["answer"]].itertuples()):
        with pytest.raises(ConfigError, match="give the data frame"):
            samples(rows)

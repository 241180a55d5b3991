"""`Dataset`: random access to checked examples, with slicing, mapping, splitting and weights.

A data set is a `Reader` of a source, the indices it selects, the functions of its `map` calls and its weights. It is
immutable. An "entry" is one named value of an example, such as "image"; in private code, `entries` are also the numbers
of examples in the source, and `here` their numbers in this data set.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from sapwood.core import migration_hints
from sapwood.core.errors import ConfigError, DataError
from sapwood.data.check import check, even, stack
from sapwood.data.feature import Feature, infer, to_device_dtype
from sapwood.data.learned_features import channels_differ, convert_feature
from sapwood.data.reader import Reader, positive
from sapwood.data.shuffle import checked
from sapwood.data.sources.source import CHUNK

Example = dict[str, Any]
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Step:
    """One `map` call: a function of one example, or, if `batched`, of stacked examples."""

    function: Callable[[Any], Any]
    batched: bool


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples by index. Immutable: slicing, mapping and weighting return new data sets that share one `Reader`.

    Created by `sapwood.data.load` or `sapwood.data.characters`, not directly.

    Attributes:
        reader: reads, checks and remembers the examples of the source.
        indices: the numbers in the source of this data set's examples, int64 `(examples,)`; None for all of them.
        features: the feature of each entry of an example.
        steps: the functions that `map` added, applied in order when examples are read.
        weights: the weight of each example, float32 `(examples,)`; None if `weighted` was not called.

    Example:
        >>> import numpy as np, sapwood.data
        >>> data = sapwood.data.load((np.zeros((6, 4), "float32"), np.array([0, 1, 2, 0, 1, 2])))
        >>> len(data), sorted(data[0]), data[:2].gather([0, 1])["features"].shape
        (6, ['features', 'label'], (2, 4))
    """

    reader: Reader
    indices: np.ndarray | None
    features: dict[str, Feature]
    steps: tuple[Step, ...] = ()
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not len(self):
            raise DataError("the data set is empty; at least one example is needed")

    @classmethod
    def over(cls, source, features: dict[str, Feature] | None = None) -> "Dataset":
        """A data set of all examples of `source`, checked against `features` (default: the source's own)."""
        features = dict(source.features if features is None else features)
        return cls(Reader(source, features), None, features)

    def __repr__(self) -> str:
        """The number of examples, and the dtype and shape of each entry.

        >>> import numpy as np, sapwood.data
        >>> sapwood.data.load((np.zeros((6, 4), "float32"), np.array([0, 1, 2, 0, 1, 2])))
        Dataset(6 examples of features float32(4,), label int32() in 3 classes)
        """
        kinds = {n: f" in {f.num_classes} classes" if f.num_classes else "" for n, f in self.features.items()}
        said = ", ".join(f"{n} {f.dtype}{f.shape}{kinds[n]}" for n, f in self.features.items())
        return f"Dataset({len(self)} example{'s' * (len(self) > 1)} of {said})"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise migration_hints.attribute(self, name, migration_hints.DATASET)

    def __len__(self) -> int:
        return len(self.reader) if self.indices is None else len(self.indices)

    @overload
    def __getitem__(self, key: int) -> Example: ...
    @overload
    def __getitem__(self, key: slice) -> "Dataset": ...
    def __getitem__(self, key):
        """Example `key` as a dict of arrays; for a slice, a data set of those examples."""
        if isinstance(key, slice):
            return self.select(np.arange(len(self))[key])
        return {name: values[0] for name, values in self.gather([key]).items()}

    def __iter__(self) -> Iterator[Example]:
        """All examples in order.

        Python's own iteration by index would take an IndexError raised by a mapped function for the end of the data.
        """
        return (self[i] for i in range(len(self)))

    def gather(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The examples of `indices` as a dict of arrays `(examples, ...)`.

        Raises `DataError` if an example does not fit its features, `IndexError` for an index that is out of range.
        """
        here = positive(indices, len(self))
        entries = here if self.indices is None else self.indices[here]
        batch = self.reader.gather(entries)
        where = self.reader.source.where
        for step in self.steps:
            batch = self._apply(step, even(batch, entries, where) if step.batched else batch, entries)
        batch = even(batch, entries, where)
        if self.weights is not None:
            weight = self.weights[here]
            batch["weight"] = batch["weight"].astype(np.float32) * weight if "weight" in batch else weight
        if self.steps:  # a mapped function computes its result anew each time, so it is checked each time
            check(self.features, batch, entries, where)
        return batch

    def _apply(self, step: Step, batch: Batch, entries: np.ndarray) -> Batch:
        """Apply one mapped function to a batch. `DataError` for a result that is not a dict with every example."""
        where = self.reader.source.where
        if not step.batched:
            rows = [step.function({n: a[i] for n, a in batch.items()}) for i in range(len(entries))]
            odd = next((i for i, row in enumerate(rows) if not isinstance(row, Mapping)), None)
            if odd is not None:
                raise _no_dict(rows[odd], where(int(entries[odd])))
            return stack(rows, entries, where)
        try:
            mapped = step.function(batch)
        except DataError as error:
            raise _of_one(step, batch, entries, where) or error from error
        if not isinstance(mapped, Mapping):
            raise _no_dict(mapped, f"{len(entries)} examples")
        arrays = {n: to_device_dtype(n, a) for n, a in mapped.items()}
        lengths = {n: a.shape[:1] for n, a in arrays.items()}
        if any(n != (len(entries),) for n in lengths.values()):
            raise DataError(
                f"the mapped function gave {lengths} for {len(entries)} examples; each entry needs them all"
            )
        return arrays

    def select(self, indices: Sequence[int] | np.ndarray) -> "Dataset":
        """A data set of the examples of `indices`, in that order. `indices` may be a bool mask `(examples,)`."""
        here = positive(indices, len(self))
        entries = here if self.indices is None else self.indices[here]
        return replace(self, indices=entries, weights=None if self.weights is None else self.weights[here])

    def take(self, count: int) -> "Dataset":
        """A data set of the first `count` examples."""
        return self[:count]

    def map(self, function: Callable[[Any], Any], *, batched: bool = False) -> "Dataset":
        """A data set of `function(example)`, computed when an example is read.

        A feature whose shape and dtype the function keeps also keeps its classes and range, and results are checked
        against them. Other features are inferred from the first example; `declare` adds classes and ranges. The
        function neither gets nor returns weights that `weighted` added; they stay with their examples.

        Args:
            function: takes a dict of arrays and returns one. It must be deterministic, since an example may be read
                again.
            batched: whether the function takes and returns stacked examples `(examples, ...)`, which is much faster for
                small examples.

        Example:
            >>> import numpy as np, sapwood.data
            >>> data = sapwood.data.load({"x": np.array([1.0, 2.0], "float32")})
            >>> data.map(lambda e: {"x": e["x"] * 2})[1]
            {'x': np.float32(4.0)}
        """
        mapped = replace(self, steps=(*self.steps, Step(function, batched)), features={}, weights=None)
        features = {}
        for name, values in mapped.gather([0]).items():
            old, new = self.features.get(name), infer(values)
            same = old is not None and (old.shape, old.dtype) == (new.shape, new.dtype)
            features[name] = old if same else new
        if self.weights is not None:
            features["weight"] = self.features["weight"]
        return replace(mapped, features=features, weights=self.weights)

    def declare(self, **features: Feature) -> "Dataset":
        """The same examples with other features for some entries; examples are checked against these from now on.

        Raises `ConfigError` for an entry that the examples do not have.

        Example:
            >>> import numpy as np, sapwood.data
            >>> data = sapwood.data.load({"x": np.array([1.0, 200.0], "float32")})
            >>> data.declare(x=Feature((), "float32", low=0, high=100))[1]
            Traceback (most recent call last):
            sapwood.core.errors.DataError: x of example 1 is 200.0; the range is 0..100
        """
        unknown = [n for n in features if n not in self.features]
        if unknown:
            raise ConfigError(
                f"there is no entry {unknown[0]!r}; the examples have {', '.join(map(repr, self.features))}"
            )
        features = {**self.features, **features}
        if self.steps:
            return replace(self, features=features)
        stored = {n: f for n, f in features.items() if n in self.reader.features}  # leaves out added weights
        return replace(self, reader=Reader(self.reader.source, stored), features=features)

    def held_to(self, learned: Mapping[str, Feature]) -> "Dataset":
        """The same examples, converted to the features of the training data: classes, columns and tokens by name.

        Class numbers, columns and token ids get the order that they had in training. `fit`, `evaluate` and `predict` do
        this with the features that the state carries; custom loops call it themselves. Entries that only one of both
        has stay unchanged. Columns that training did not have are left out. Gray images get three channels if training
        had color images.

        Args:
            learned: the features of the training data, such as `TrainState.features`.

        Raises:
            DataError: a class is unknown, a column is missing, or a range, a dtype or the channels of an image cannot
                be converted. The message names both sides.

        Example:
            >>> import numpy as np, sapwood.data
            >>> train = sapwood.data.load({"x": np.zeros(3), "label": ["ant", "bee", "cat"]})
            >>> test = sapwood.data.load({"x": np.zeros(2), "label": ["cat", "bee"]})
            >>> test.column("label").tolist(), test.held_to(train.features).column("label").tolist()
            ([1, 0], [2, 1])
        """
        features, turns = dict(self.features), {}
        for name, there in learned.items():
            here = features.get(name, there)
            same = here == there or (
                here == replace(there, shape=here.shape) and not channels_differ(name, here, there)
            )
            if not same:
                features[name], turns[name] = convert_feature(name, here, there, self)
        if not turns:
            return self
        return replace(self, features=features, steps=(*self.steps, Step(partial(_turned, turns), batched=True)))

    def where(self, index: int) -> str:
        """The name of example `index` in error messages."""
        return self.reader.source.where(int(index if self.indices is None else self.indices[index]))

    def column(self, name: str) -> np.ndarray:
        """Entry `name` of all examples `(examples, ...)`. Other entries are not decoded if the source allows that.

        Raises `ConfigError` for an entry that the examples do not have.
        """
        if name not in self.features:
            raise ConfigError(f"there is no entry {name!r}; the examples have {', '.join(map(repr, self.features))}")
        if self.steps:
            chunks = np.array_split(np.arange(len(self)), -(-len(self) // CHUNK))
            return np.concatenate([self.gather(c)[name] for c in chunks])
        weights = self.weights if name == "weight" else None
        if weights is not None and name not in self.reader.features:
            return weights
        values = self.reader.column(name)
        values = values if self.indices is None else values[self.indices]
        return values if weights is None else values.astype(np.float32) * weights

    def split(self, fraction: float, *, seed: int = 0, by: str | None = None) -> tuple["Dataset", "Dataset"]:
        """Split into two disjoint data sets: the rest, and a random `fraction` of the examples.

        Both keep the order of the examples. If each example has one class, every class is split in proportion.

        Args:
            fraction: the share of the second part, between 0 and 1; each part gets at least one example.
            seed: the seed of the draw, 0 to 2**32 - 1.
            by: the entry whose classes are split in proportion; default "label", if it is one class per example.

        Returns:
            (the rest, the drawn part).

        Raises:
            DataError: there is only one example, or examples overlap, as windows of `characters` do.
            ConfigError: the fraction or the seed is out of range, or `by` is not one value per example.

        Example:
            >>> import numpy as np, sapwood.data
            >>> data = sapwood.data.load({"x": np.arange(20.0), "label": np.arange(20) % 2})
            >>> rest, part = data.split(0.1)
            >>> len(rest), sorted(int(x) for x in part.column("label"))
            (18, [0, 1])
        """
        if not 0 < fraction < 1:
            raise ConfigError(f"a split takes a fraction between 0 and 1, not {fraction}")
        if len(self) < 2:
            raise DataError("one example cannot be split in two")
        self._refuse_overlap(fraction)
        label = self.features.get("label")
        if by is None and label is not None and label.num_classes and not label.shape:
            by = "label"
        groups = np.zeros(len(self), int) if by is None else self.column(by)
        if groups.ndim != 1:
            raise ConfigError(f"split(by={by!r}): {groups.shape[1:]} values an example; one class each is expected")
        part = _draw(groups, fraction, checked(seed))
        return self.select(np.flatnonzero(~part)), self.select(np.flatnonzero(part))

    def _refuse_overlap(self, fraction: float) -> None:
        """Raise `DataError` if two examples overlap: a random split would train on what it holds out."""
        apart = self.reader.source.apart
        entries = np.arange(len(self.reader)) if self.indices is None else np.sort(self.indices)
        if apart > 1 and np.any(np.diff(entries) < apart):
            raise DataError(
                "the examples overlap, so that what is held out would be trained on too. Cut the text instead: cut = "
                f"int({1 - fraction:.3g} * len(text)); characters(text[:cut], ...), characters(text[cut:], ..., "
                "vocabulary=...); or make windows that share nothing, stride=length"
            )

    def class_weights(self, name: str = "label") -> np.ndarray:
        """Weights per class that make all classes count the same, float32 `(classes,)`.

        The weight is examples / (classes * examples of the class), as scikit-learn's "balanced"; 0 for a class without
        examples. Raises `ConfigError` if entry `name` is not one class per example.

        Example:
            >>> import numpy as np, sapwood.data
            >>> sapwood.data.load({"label": np.array([0, 0, 0, 0, 1, 1])}).class_weights().tolist()
            [0.75, 1.5]
        """
        feature = self.features.get(name)
        if feature is None or not feature.num_classes or feature.shape:
            raise ConfigError(
                f"{name!r} is not one class an example, to be weighed; the examples have "
                f"{', '.join(map(repr, self.features))}"
            )
        labels = self.column(name)
        self._check_classes(name, labels)
        count = np.bincount(labels, minlength=feature.num_classes)
        weights = np.zeros(len(count))
        np.divide(len(self), len(count) * count, out=weights, where=count > 0)
        return weights.astype(np.float32)

    def _check_classes(self, name: str, labels: np.ndarray) -> None:
        """Raise `DataError` for a label that is outside its classes."""
        entries = np.arange(len(self)) if self.indices is None else self.indices
        check({name: self.features[name]}, {name: labels}, entries, self.reader.source.where)

    def weighted(self, weights: Any = "balanced") -> "Dataset":
        """The same examples with a float32 entry "weight", which losses and metrics use.

        Weights that the examples already have are multiplied by the new ones.

        Args:
            weights: one number per example `(examples,)`; or "balanced" for `class_weights`; or a dict from class (name
                or number) to weight, where a missing class has weight 1.

        Raises:
            DataError: a weight is negative or not finite, or there is not one weight per example.
            ConfigError: the dict has an unknown class, or the examples have no label with classes.

        Example:
            >>> import numpy as np, sapwood.data
            >>> data = sapwood.data.load({"label": np.array([0, 0, 0, 1])}).weighted({1: 3})
            >>> data.gather([0, 3])["weight"].tolist()
            [1.0, 3.0]
        """
        if isinstance(weights, str):
            if weights != "balanced":
                raise ConfigError(f"weights are numbers, a dict by class or 'balanced', not {weights!r}")
            weights = self.class_weights()[self.column("label")]
        elif isinstance(weights, Mapping):
            table, labels = self._weights_of(weights), self.column("label")
            self._check_classes("label", labels)
            weights = table[labels]
        weights = np.asarray(weights, np.float32)
        if weights.shape != (len(self),):
            raise DataError(f"weights have shape {weights.shape}; ({len(self)},) is expected, one an example")
        feature = Feature((), "float32", low=0)
        check({"weight": feature}, {"weight": weights}, range(len(self)))
        old = 1 if self.weights is None else self.weights
        return replace(self, weights=weights * old, features={**self.features, "weight": feature})

    def _weights_of(self, by_class: Mapping[Any, float]) -> np.ndarray:
        """The weight of each class, float32 `(classes,)`, from a dict by name or number.

        Raises `ConfigError` for a key that is no class, that is ambiguous, or that names a class a second time.
        """
        label = self.features.get("label")
        if label is None or not label.num_classes:
            raise ConfigError("weights by class need a label with classes")
        table, given = np.ones(label.num_classes, np.float32), {}
        names = {label.name(i): i for i in range(label.num_classes)}
        for key, weight in by_class.items():
            flag = isinstance(key, bool | np.bool_)
            named = isinstance(key, str) or (flag and label.classes is not None)  # classes called "False" and "True"
            index = names.get(str(key), -1) if named else int(key) if flag or isinstance(key, int | np.integer) else -1
            if not 0 <= index < len(table):
                raise ConfigError(f"there is no class {key!r} to weigh; classes are {', '.join(names)}")
            if not named and names.get(str(key), index) != index:
                raise ConfigError(
                    f"{key!r} is the number of class {label.name(index)!r}, and {str(key)!r} the name of another; "
                    "write names"
                )
            if index in given:
                raise ConfigError(f"{given[index]!r} and {key!r} are the same class; give it one weight")
            table[index], given[index] = weight, key
        return table

    def check(self, batch: Mapping[str, np.ndarray], first_index: int = 0) -> None:
        """Check stacked examples against this data set's features. `DataError` names the first that does not fit.

        The message counts the examples of the batch from `first_index`.
        """
        present = {n: f for n, f in self.features.items() if n in batch}
        check(present, batch, range(first_index, first_index + len(next(iter(batch.values())))))


def _turned(turns: Mapping[str, Sequence[Callable[[Any], Any]]], batch: Batch) -> Batch:
    """The batch with the functions of `turns` applied, in order, to the entries they are listed for."""
    return {name: reduce(lambda values, turn: turn(values), turns.get(name, ()), a) for name, a in batch.items()}


def _of_one(step: Step, batch: Batch, entries: np.ndarray, where: Callable[[int], str]) -> DataError | None:
    """Find the example for which a batched function raises `DataError`, by calling it with one example at a time.

    Returns that error with the example's name in front, or None if the function accepts each example by itself.
    """
    for i, entry in enumerate(entries):
        try:
            step.function({name: values[i : i + 1] for name, values in batch.items()})
        except DataError as error:
            return DataError(f"{where(int(entry))}: {error}")
    return None


def _no_dict(made: Any, what: str) -> DataError:
    """The error for a mapped function that did not return a dict."""
    return DataError(f"the mapped function gave {type(made).__name__} for {what}; a dict of arrays is expected")


def _draw(groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which examples a split draws, bool `(examples,)`.

    It draws the same share of each group; counts are rounded so that the total is right.
    It uses `RandomState`, whose numbers NumPy promises never to change, so that a split stays the same after upgrades.
    """
    rng = np.random.RandomState(seed)
    names, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    total = min(max(round(len(groups) * fraction), 1), len(groups) - 1)
    exact = sizes * (total / len(groups))
    counts = np.floor(exact).astype(int)
    owed = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]  # largest remainders first
    counts[owed] += 1
    part = np.zeros(len(groups), bool)
    for group in range(len(names)):
        part[rng.permutation(np.flatnonzero(member == group))[: counts[group]]] = True
    return part

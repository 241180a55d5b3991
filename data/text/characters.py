"""Character-level language-model data: `characters` makes windows over one text, `encode` and `decode` map to ids."""

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.dataset import Dataset
from sapwood.data.feature import Feature
from sapwood.data.sources.source import Source


class Windows(Source):
    """Windows of a text as examples.

    Window i has "tokens", the `length` characters from i * stride on, and "targets", the character after each of them.

    Args:
        ids: the ids of all characters of the text, int32 `(characters,)`.
        length: characters per window.
        stride: characters from the start of one window to the start of the next.
        vocabulary: the character of each id.
    """

    remember = False

    def __init__(self, ids: np.ndarray, length: int, stride: int, vocabulary: tuple[str, ...]):
        self.ids, self.length, self.stride = ids, length, stride
        feature = Feature((length,), "int32", vocabulary=vocabulary)
        self.features = {"tokens": feature, "targets": feature}
        self.apart = -(-length // stride)
        self._offsets = np.arange(length + 1)

    def __len__(self) -> int:
        return (len(self.ids) - self.length - 1) // self.stride + 1

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        windows = self.ids[np.asarray(indices)[:, None] * self.stride + self._offsets]
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


def characters(text: str, length: int, *, stride: int = 1, vocabulary: str | tuple[str, ...] | None = None) -> Dataset:
    """Windows of `length` characters over `text`, for a character-level language model.

    Args:
        text: at least `length` + 1 characters.
        length: characters per window.
        stride: characters from the start of one window to the start of the next. 1 gives all windows; `length` gives
            windows that share no target, for evaluation.
        vocabulary: the characters that have ids, in order; default those of the text, sorted. For an evaluation text,
            give the vocabulary of the training text, `data.features["tokens"].vocabulary`.

    Returns:
        A data set of windows: "tokens" and "targets", int32 `(length,)`, where each target is the character after its
        token. The features hold the vocabulary. Windows overlap if `stride` is less than `length`, and their `split` is
        an error then: to hold some text out, cut the text.

    Raises:
        DataError: the text is too short, or has a character outside the vocabulary.
        ConfigError: the length or the stride is less than 1.

    Source: A. Karpathy, The Unreasonable Effectiveness of Recurrent Neural Networks, 2015.

    Example:
        >>> data = characters("to be or not to be", 4)
        >>> vocabulary = data.features["tokens"].vocabulary
        >>> len(data), decode(data[3]["tokens"], vocabulary), decode(data[3]["targets"], vocabulary)
        (14, 'be o', 'e or')
    """
    if length < 1:
        raise ConfigError(f"a window has at least one character, not {length}")
    if stride < 1:
        raise ConfigError(f"windows start at least one character apart, not {stride}")
    if len(text) <= length:
        raise DataError(f"the text has {len(text)} characters; windows of {length} need at least {length + 1}")
    letters = tuple(sorted(set(text))) if vocabulary is None else tuple(vocabulary)
    return Dataset.over(Windows(encode(text, letters), length, stride, letters))


def encode(text: str, vocabulary: tuple[str, ...] | str) -> np.ndarray:
    """Encode a text as the ids of its characters, int32 `(characters,)`.

    Raises:
        DataError: a character is outside the vocabulary (the message gives its position), or the vocabulary is empty.

    Example:
        >>> encode("cab", "abc").tolist()
        [2, 0, 1]
    """
    if text and not vocabulary:
        raise DataError("the vocabulary has no characters; give those that have ids, or None for those of the text")
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    letters = np.array([ord(c) for c in vocabulary], np.uint32)
    order = np.argsort(letters)
    places = np.searchsorted(letters[order], points).clip(max=len(letters) - 1)
    ids = order[places]
    unknown = np.flatnonzero(letters[ids] != points)
    if len(unknown):
        first = int(unknown[0])
        line = text.count("\n", 0, first) + 1
        raise DataError(
            f"character {text[first]!r} at position {first} (line {line}) is not in the vocabulary of {len(letters)} "
            "characters; leave it out of the text, or give a vocabulary that has it"
        )
    return ids.astype(np.int32)


def decode(ids: np.ndarray, vocabulary: tuple[str, ...] | str) -> str:
    """Decode ids `(characters,)` to a text.

    Raises:
        DataError: an id is outside the vocabulary.

    Example:
        >>> decode([2, 0, 1], "abc")
        'cab'
    """
    ids = np.asarray(ids)
    wrong = (ids < 0) | (ids >= len(vocabulary))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise DataError(f"id {ids[first]} at position {first} is outside the vocabulary's 0..{len(vocabulary) - 1}")
    return "".join(vocabulary[int(i)] for i in ids)

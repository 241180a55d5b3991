"""`Pictures`: a column of encoded pictures, decoded when they are asked for."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sapwood.data.feature import Feature
from sapwood.data.image.decode import decode, survey


class Pictures(Sequence[np.ndarray]):
    """Pictures that are decoded when they are asked for, held to what they have in common.

    Attributes:
        feature: their size, None where it differs, and 1 channel where *all* of them are grey, 3 otherwise.
    """

    def __init__(
        self,
        pictures: Any,
        where: Callable[[int], str],
        *,
        size: tuple[int, int] | None = None,
        grey: bool | None = None,
        beside: Iterable[Any] = (),
    ):
        """`pictures` as `decode` takes them, `where` names each in errors. Whether they are `grey` is found out from
        them, and from others `beside` them, such as those of other splits."""
        self.pictures, self.where, self.size = pictures, where, size
        height, width, channels = survey(pictures, where, sizes=size is None)
        if grey is not None:
            channels = 1 if grey else 3
        elif channels == 1:
            channels = survey(beside, str, sizes=False)[2]
        height, width = size or (height, width)
        self.feature = Feature((height, width, channels), "uint8", low=0, high=255)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        return self.seen(self.pictures[index], index)

    def seen(self, picture: Any, index: int) -> np.ndarray:
        """`picture`, which is number `index`, decoded."""
        return decode(picture, grey=self.feature.shape[-1] == 1, size=self.size, name=self.where(index))

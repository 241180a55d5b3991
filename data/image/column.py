"""`ImageColumn`: a column of encoded images that are decoded when they are read."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sapwood.data.feature import Feature
from sapwood.data.image.decode import decode, survey


class ImageColumn(Sequence[np.ndarray]):
    """A sequence of images that are decoded when they are read, all with the same number of channels.

    Attributes:
        feature: uint8 `(height, width, channels)`. The height and width are None if they differ between images; there
            is 1 channel if *all* images are gray, else 3.
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
        """Read the headers of the images to learn their size and channels.

        Args:
            pictures: a sequence of images, each as `decode` takes it.
            where: a function from an index to the name of the image in error messages.
            size: (height, width) to resize to; None keeps each image's size.
            grey: whether images have 1 channel; None finds out from the images.
            beside: more images, such as those of other splits. If `grey` is None, there is 1 channel only if these
                images are gray, too.
        """
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
        """Decode `picture`, an encoded image that the caller has taken from `pictures[index]` already."""
        return decode(picture, grey=self.feature.shape[-1] == 1, size=self.size, name=self.where(index))

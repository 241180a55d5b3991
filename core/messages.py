"""Short texts for messages: an error in one line, the first few of many names, the nearest known names."""

import difflib
import re
from collections.abc import Iterable


def short(error: BaseException) -> str:
    """An error as one line of at most 300 characters.

    Of a long message of TensorStore, only the operating system's message is kept.

    >>> short(ValueError("two\\nlines"))
    'two lines'
    >>> short(ValueError("Error writing: file 9: File too large [os_error_code='27']"))
    'File too large'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    cause = re.search(r"OS error \d+: \w+ ([^\[\]]+)|([^:\[\]]+) \[os_error_code='", text)
    if cause:
        return (cause[1] or cause[2]).strip()
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-95:]}"


def first_names(names: list[str], quote: bool = True) -> str:
    """The first five names, and how many more there are.

    >>> first_names(list("abcdefg"))
    "'a', 'b', 'c', 'd', 'e' and 2 more"
    """
    shown = ", ".join(f"{name!r}" if quote else name for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """An ending for an error message with the ``n`` known names most like ``name``; empty if none is similar.

    >>> nearest("kernal", ["kernel", "bias"])
    "; did you mean 'kernel'?"
    >>> nearest("AUC", ["auc", "recall"])
    "; did you mean 'auc'?"
    """
    known = list(known)
    lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name, known, n, cutoff=0.5)
    close = close or [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n, cutoff=0.5)]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""

import numpy as np
import pytest

from sapwood.core.errors import ConfigError, DataError
from sapwood.data import batches, characters
from sapwood.data.text.characters import decode, encode

TEXT = "Whan that Aprille with his shoures soote\nThe droghte of March hath perced to the roote,\n"


def test_windows_are_the_text_and_targets_are_shifted_by_one():
    data = characters(TEXT, 10)
    vocabulary = data.features["tokens"].vocabulary
    assert vocabulary == tuple(sorted(set(TEXT)))
    assert len(data) == len(TEXT) - 10
    for i in (0, 7, len(data) - 1):
        assert decode(data[i]["tokens"], vocabulary) == TEXT[i : i + 10]
        assert decode(data[i]["targets"], vocabulary) == TEXT[i + 1 : i + 11]
    assert data[0]["tokens"].dtype == np.int32


def test_strided_windows_predict_each_character_once():
    data = characters(TEXT, 10, stride=10)
    said = "".join(
        decode(e["targets"], data.features["tokens"].vocabulary) for e in (data[i] for i in range(len(data)))
    )
    assert said == TEXT[1 : 1 + len(said)]
    assert len(TEXT) - 1 - len(said) < 10


def test_every_text_survives_encoding():
    for text in (TEXT, "zażółć gęślą jaźń", "日本語 🌳🌲", ""):
        vocabulary = tuple(sorted(set(text + "ab")))
        assert decode(encode(text, vocabulary), vocabulary) == text


def test_a_vocabulary_in_any_order():
    assert encode("abc", "cab").tolist() == [1, 2, 0]
    data = characters("abcabc", 2, vocabulary="cab!")
    assert data.features["targets"].bounds == (0, 3)


def test_unknown_characters_and_ids_are_named():
    with pytest.raises(DataError, match="the vocabulary has no characters"):
        encode("abc", "")
    with pytest.raises(DataError, match=r"character 'é' at position 9 \(line 2\) is not in the vocabulary of 27"):
        characters("plain\ntexé", 2, vocabulary="plaintex\nbcdfghjkmoqrsuvwyz")
    with pytest.raises(DataError, match=r"id 5 at position 1 is outside the vocabulary's 0\.\.2"):
        decode(np.array([0, 5]), "abc")
    with pytest.raises(DataError, match="id -1"):
        decode(np.array([-1]), "abc")


def test_texts_that_are_too_short():
    with pytest.raises(DataError, match="the text has 5 characters; windows of 5 need at least 6"):
        characters("short", 5)
    assert len(characters("short!", 5)) == 1
    with pytest.raises(ConfigError, match="not 0"):
        characters(TEXT, 0)
    with pytest.raises(ConfigError, match="not 0"):
        characters(TEXT, 5, stride=0)


def test_windows_that_overlap_are_not_split():
    data = characters(TEXT, 10)
    with pytest.raises(DataError, match=r"cut = int\(0.8 \* len\(text\)\); characters\(text\[:cut\], .*stride=length"):
        data.split(0.2)
    with pytest.raises(DataError, match="the examples overlap"):
        characters(TEXT, 10, stride=9)[:2].split(0.5)
    for apart in (characters(TEXT, 10, stride=10), data[::10], characters(TEXT, 10, stride=5)[::2]):
        rest, part = apart.split(0.3)
        assert len(rest) + len(part) == len(apart)


def test_batches_of_text():
    data = characters(TEXT, 8)
    batch = next(batches(data, 4, seed=1, process_index=0, process_count=1))
    assert batch["tokens"].shape == (4, 8)
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])

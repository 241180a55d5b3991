"""The fields of a recipe as options of the command line."""

import dataclasses
from typing import Literal

import pytest

from sapwood.command import options
from sapwood.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Fields:
    """Every kind of field there is."""

    must: int
    whole: int = 3
    real: float = 0.5
    text: str = "a b"
    yes: bool = True
    no: bool = False
    kind: Literal["adam", "sgd"] = "adam"
    number: Literal[1, 2] = 1
    maybe: float | None = None
    clip: float | None = 1.0
    either: int | str = "auto"
    flag: bool | None = None
    widths: tuple[int, ...] = (16, 8)
    pair: tuple[float, float] = (0.9, 0.999)
    with_default_factory: tuple[str, ...] = dataclasses.field(default_factory=lambda: ("x",))


def read(*words: str, config: type = Fields) -> dict:
    parser = options.Parser("train", "a test")
    options.add_fields(parser, config)
    return options.fields_of(parser.read(words))


def test_defaults_are_the_recipes_own():
    assert Fields(**read("--must", "1")) == Fields(1)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--whole 7", "whole", 7),
        ("--whole -7", "whole", -7),
        ("--whole=7", "whole", 7),
        ("--real 1e-3", "real", 1e-3),
        ("--real 2", "real", 2.0),
        ("--no-yes", "yes", False),
        ("--no", "no", True),
        ("--kind sgd", "kind", "sgd"),
        ("--number 2", "number", 2),
        ("--maybe 1.5", "maybe", 1.5),
        ("--clip none", "clip", None),
        ("--either 3", "either", 3),
        ("--either few", "either", "few"),
        ("--flag false", "flag", False),
        ("--widths 1 2 3", "widths", (1, 2, 3)),
        ("--pair 0.5 0.25", "pair", (0.5, 0.25)),
        ("--with-default-factory a b", "with_default_factory", ("a", "b")),
    ],
)
def test_a_value_is_read_as_its_type(words, name, value):
    found = read("--must", "1", *words.split())[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: --must"),
        ("--whole 1.5", "--whole: invalid INT value: '1.5'"),
        ("--real much", "--real: invalid FLOAT value: 'much'"),
        ("--kind adem", "--kind: invalid adam|sgd value: 'adem'"),
        ("--number 3", "--number: invalid 1|2 value: '3'"),
        ("--maybe little", "--maybe: invalid FLOAT|none value: 'little'"),
        ("--flag perhaps", "--flag: invalid true|false|none value: 'perhaps'"),
        ("--widths 1 x", "--widths: invalid INT value: 'x'"),
        ("--widths", "--widths: expected at least one argument"),
        ("--pair 1", "--pair: expected 2 arguments"),
        ("--wole 3", "there is no option '--wole' here; did you mean '--whole'"),
        ("--whol 3", "there is no option '--whol' here; did you mean '--whole'"),  # no guessing by the first letters
        ("more", "there is no argument 'more' here"),
    ],
)
def test_what_cannot_be_read_says_what_is_expected(words, message):
    must = ["--must", "1"] if words else []
    with pytest.raises(ConfigError) as caught:
        read(*must, *words.split())
    assert message in str(caught.value)
    assert "sapwood train --help shows the options" in str(caught.value)


@pytest.mark.parametrize("kind", [dict, list[int], tuple[int, str], dict | None, object])
def test_a_field_that_no_word_can_give(kind):
    config = dataclasses.make_dataclass("Odd", [("odd", kind, dataclasses.field(default=None))])
    with pytest.raises(ConfigError, match=r"--odd: fields of type .* cannot be read from a command line; use int"):
        read(config=config)


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    shown = capsys.readouterr().out
    for word in ("--must INT", "required", "--no-yes", "adam|sgd", "default: 0.5", "default: (16, 8)", "FLOAT|none"):
        assert word in shown


def test_a_field_with_the_name_of_an_option():
    @dataclasses.dataclass(frozen=True)
    class Taken:
        """A recipe."""

        keep: int = 1

    parser = options.Parser("train", "a test")
    parser.add_argument("--keep")
    with pytest.raises(ConfigError, match="'keep' has the name of an option of sapwood train"):
        options.add_fields(parser, Taken)

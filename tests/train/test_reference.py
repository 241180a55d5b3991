"""Models written down as names: what comes back is equal, and a file cannot make anything else run."""

import dataclasses
import functools
import json

import jax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.recipes.digits import Digits
from sapwood.train import reference


def there_and_back(model):
    return reference.read(json.loads(json.dumps(reference.write(model))))


@pytest.mark.parametrize(
    "model",
    [
        L.Dense(3),
        L.Dense(3, bias=False),
        L.Conv(4, (3, 3)),
        L.Sequential((L.Dense(4), jax.nn.relu, L.Sequential((L.Dense(2),)))),
        L.dense,
    ],
    ids=lambda model: getattr(model, "__name__", repr(model)),
)
def test_there_and_back(model):
    assert there_and_back(model) == model


def test_a_function_by_name_gets_its_options():
    written = reference.write("sapwood.layers:dense", {"bias": None})
    model = reference.read(written)
    assert isinstance(model, functools.partial)
    assert (model.func, model.keywords) == (L.dense, {"bias": None})
    assert reference.read(reference.write("sapwood.layers:Dense", {"features": 3})) == L.Dense(3)


def local(v, x):
    return x


@dataclasses.dataclass
class Thawed:
    size: int = 3


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda v, x: x, ConfigError, "cannot be imported by that name"),
        (functools.partial(local), ConfigError, "not partial"),
        (L.Sequential((lambda x: x,)), ConfigError, "the option layers cannot be written down: .*<lambda>"),
        (Thawed(), ConfigError, "not Thawed"),
        (7, ConfigError, "not int"),
        ("sapwood.layers", ConfigError, 'write "package.module:name"'),
        ("no.such.module:f", CheckpointError, "cannot be imported here: No module named 'no'"),
        ("sapwood.layers:Dens", CheckpointError, "cannot be imported here: .*Dens"),
    ],
)
def test_what_cannot_be_written(model, error, message):
    with pytest.raises(error, match=message):
        reference.write(model)
    with pytest.raises(ConfigError, match="options= go with a model given by name"):
        reference.write(L.Dense(3), {"bias": False})


@pytest.mark.parametrize(
    "written",
    [
        {"name": "subprocess:Popen", "options": {"args": "touch {}"}},
        {"name": "pathlib:Path", "options": {}},
        {"name": "sapwood.layers:Dense", "options": {"features": {"model": {"name": "subprocess:Popen"}}}},
        {"name": "sapwood.layers:Dense", "options": {"features": {"eval": "1"}}},
        {"name": "sapwood.layers:Dense", "options": {"no_such_field": 1}},
        {"name": "sapwood.layers:Dense", "options": {"features": 1}, "method": "no_such_method"},
        {"name": "sapwood:__version__"},
        {"name": "os:mkdir", "options": {"path": "x"}},
    ],
)
def test_a_file_makes_nothing_but_layers(written):
    with pytest.raises(CheckpointError):
        reference.read(written)


def test_recipes_in_the_package_are_found():
    written = reference.write(Digits(width=8).model)
    assert written["name"] == "sapwood.recipes.digits:Digits"
    assert (written["method"], written["options"]["width"]) == ("model", 8)
    back = reference.read(written)
    assert back.__self__ == Digits(width=8)
    assert isinstance(back.__self__, sw.Recipe)

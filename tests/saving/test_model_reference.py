"""Models written down as names: what comes back is equal, and a file cannot make anything else run."""

import dataclasses
import functools
import json
import sys

import jax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.core.trusted_packages import trusted
from sapwood.recipes.vision.digits import Digits
from sapwood.saving import model_reference


def there_and_back(model):
    return model_reference.read(json.loads(json.dumps(model_reference.write(model))))


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
    written = model_reference.write("sapwood.layers:dense", {"bias": None})
    model = model_reference.read(written)
    assert isinstance(model, functools.partial)
    assert (model.func, model.keywords) == (L.dense, {"bias": None})
    assert model_reference.read(model_reference.write("sapwood.layers:Dense", {"features": 3})) == L.Dense(3)


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
        model_reference.write(model)
    with pytest.raises(ConfigError, match="options= go with a model given by name"):
        model_reference.write(L.Dense(3), {"bias": False})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `strangers` that writes a file when it is imported; its module `models` has models and what is none."""
    folder = tmp_path / "strangers"
    folder.mkdir()
    (folder / "__init__.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    (folder / "models.py").write_text(
        "import builtins, os, subprocess, threading, dataclasses\n"
        "from os import system\n"
        "from sapwood.layers import Dense, dense\n"
        "from sapwood import Layer\n"
        "def network(v, x, width=3): return x * width\n"
        "class Times(Layer):\n    by: int = 2\n    def __call__(self, v, x): return self.by * x\n"
        "class Holder:\n    class Inside(Layer):\n        def __call__(self, v, x): return x\n"
        "renamed = network\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("strangers")]:
        del sys.modules[name]


RUNS = {"name": "builtins:exec", "options": {}}
HOSTILE = [
    {"name": "subprocess:Popen", "options": {"args": "touch {}"}},
    {"name": "pathlib:Path", "options": {}},
    {"name": "os:mkdir", "options": {"path": "x"}},
    {"name": "sapwood.layers:Dense", "options": {"features": {"model": {"name": "subprocess:Popen"}}}},
    {"name": "sapwood.layers:Dense", "options": {"features": {"eval": "1"}}},
    {"name": "sapwood.layers:Dense", "options": {"features": {}}},
    {"name": "sapwood.layers:Dense", "options": {"features": {"tuple": 3}}},
    {"name": "sapwood.layers:Dense", "options": {"no_such_field": 1}},
    {"name": "sapwood.layers:Dense", "options": {"self": 1}},
    {"name": "sapwood.layers:Dense", "options": [1]},
    {"name": "sapwood.layers:Dense", "options": {"features": 1}, "method": "no_such_method"},
    {"name": "sapwood.layers:Dense", "options": {"features": 1}, "method": "__init__"},
    {"name": "sapwood.layers:Dense", "options": {"features": 1}, "method": ["x"]},
    {"name": "sapwood.layers:dense", "options": {"x": 1, "no_such": 2}},
    {"name": "sapwood.layers:dense", "method": "__get__"},
    {"name": "sapwood.layers.linear.dense:jax.numpy.load", "options": {"file": "x", "allow_pickle": True}},
    {"name": "sapwood.layers.linear.dense:jax"},
    {"name": "sapwood.saving.artifact:builtins.max"},
    {"name": "sapwood.experiment.finding:importlib.import_module"},
    {"name": "sapwood.experiment.finding:find", "options": {"name": "evil.py"}},
    {"name": "sapwood.__main__:main", "options": {"arguments": []}},
    {"name": "sapwood.saving.artifact:save", "options": {"path": "x"}},
    {"name": "sapwood.train.callbacks:EarlyStopping", "options": {"goal": "min:loss"}},
    {"name": "sapwood.command.train:main"},
    {"name": "sapwood:__version__"},
    {"name": "sapwood.layers:__all__"},
    {"name": "jax.numpy:load", "options": {"allow_pickle": True}},
    {"name": "jax.numpy:save"},
    {"name": "jax.profiler:start_server", "options": {"port": 9}},
    {"name": "jax.experimental.io_callback:io_callback"},
    {"name": "strangers.models:network"},
    {"name": "strangers.models:builtins.max"},
    {"name": "strangers:network"},
    {"name": "strangers.models:Times", "options": {"by": {"model": RUNS}}},
    {"name": "pip:main", "file": "/usr/lib/pip/__init__.py"},
    {"name": "sapwood_recipe_evil:Evil", "file": "evil.py"},
    {"name": "sapwood_recipe_evil:Evil"},
    {"name": "..:x"}, {"name": ":"}, {"name": "a:"}, {"name": 5}, {"name": None}, {"name": "a:b", "extra": 1},
    {}, [], "x", None,
]  # fmt: skip


@pytest.mark.parametrize("written", HOSTILE, ids=[f"{i}" for i in range(len(HOSTILE))])
def test_a_file_makes_nothing_but_layers_models_and_recipes(written, package):
    with pytest.raises(CheckpointError):
        model_reference.read(written)
    with pytest.raises(CheckpointError):
        model_reference.read(
            {"name": "sapwood.layers:Sequential", "options": {"layers": {"tuple": [{"model": written}]}}}
        )
    assert not (package / "ran").exists()


@pytest.mark.parametrize("trust", [("strangers",), ("strangers.models",), ("elsewhere", "strangers")])
def test_a_trusted_package_gives_what_it_defines(trust, package):
    function = model_reference.read({"name": "strangers.models:network", "options": {"width": 5}}, trust)
    assert function(None, 2) == 10
    assert model_reference.read({"name": "strangers.models:Times", "options": {"by": 7}}, trust)({}, 2) == 14
    assert (package / "ran").exists()
    for name in ("os.system", "system", "os", "builtins.max", "Holder.Inside", "renamed", "Layer", "dataclasses"):
        with pytest.raises(CheckpointError):
            model_reference.read({"name": f"strangers.models:{name}"}, trust)
    assert model_reference.read({"name": "strangers.models:Dense", "options": {"features": 3}}, trust) == L.Dense(
        3
    )  # ours
    with pytest.raises(CheckpointError):
        model_reference.read(RUNS, trust)


def test_trust_is_of_whole_names(package):
    with pytest.raises(CheckpointError, match="trust='strangers'"):
        model_reference.read({"name": "strangers.models:network"}, ("stranger", "strangers.other"))
    for wrong in ("a..b", "./x.py", "", 3):
        with pytest.raises(ConfigError, match="name of a package"):
            trusted([wrong])
    assert trusted([jax.nn, "optax"]) == ("jax.nn", "optax")


def test_options_without_end_are_an_error():
    inner = {"name": "sapwood.layers:Dense"}
    for _ in range(5000):
        inner = {"name": "sapwood.layers:Dense", "options": {"features": {"model": inner}}}
    with pytest.raises(CheckpointError, match="without end"):
        model_reference.read(inner)


def test_what_is_written_is_what_a_room_exports():
    assert model_reference.write("sapwood.layers.linear.dense:Dense", {"features": 3})["name"] == "sapwood.layers:Dense"
    model = L.Sequential((L.Dense(4), jax.nn.gelu, jax.numpy.tanh))
    assert there_and_back(model) == model
    with pytest.raises(CheckpointError, match=r"trust='jax.numpy'"):
        there_and_back(L.Sequential((jax.numpy.squeeze,)))
    assert model_reference.read(model_reference.write(jax.numpy.squeeze), ("jax",)) is jax.numpy.squeeze


def test_recipes_in_the_package_are_found():
    written = model_reference.write(Digits(width=8).model)
    assert written["name"] == "sapwood.recipes.vision.digits:Digits"
    assert (written["method"], written["options"]["width"]) == ("model", 8)
    back = model_reference.read(written)
    assert back.__self__ == Digits(width=8)
    assert isinstance(back.__self__, sw.Recipe)

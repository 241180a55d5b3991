"""Recipe files run where their user has named them, and never because a directory does."""

import json
import shutil
from pathlib import Path

import pytest

from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.experiment import consent
from sapwood.experiment.experiment import Experiment, read_config
from sapwood.saving import checksummed_json

RECIPE = """
from dataclasses import dataclass
from pathlib import Path
import sapwood

Path(__file__).with_suffix(".ran").touch()

@dataclass(frozen=True)
class Mine(sapwood.Recipe):
    width: int = 8
    rate: float = 0.5
    sizes: tuple[int, ...] = (1,)
    kind: str | None = None
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user who has run nothing yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def handed_over(folder: Path, recipe: str = "", **options) -> Path:
    """A run directory with its recipe inside it, as a stranger may make one, under a seal that fits."""
    folder.mkdir()
    file = folder / "mine.py"
    file.write_text(RECIPE)
    config = {"recipe": recipe or str(file), "options": options, "features": {}, "versions": {}}
    checksummed_json.write(folder / "config.json", config)
    return folder


def ran(folder: Path) -> bool:
    return bool(list(folder.rglob("*.ran")))


def test_a_recipe_is_not_run_because_a_directory_names_it(tmp_path, monkeypatch):
    run = handed_over(tmp_path / "run")
    monkeypatch.chdir(run)
    for recipe in (str(run / "mine.py"), "mine.py", "./mine.py", "../run/mine.py", f"{run}/../run/mine.py"):
        checksummed_json.write(run / "config.json", {**checksummed_json.read(run / "config.json"), "recipe": recipe})
        with pytest.raises(CheckpointError, match=r"have not run as it is now.* --trust .*mine\.py"):
            Experiment.open(run)
    assert not ran(tmp_path)
    assert not (tmp_path / "state").exists()


def test_who_names_the_file_runs_it_and_is_asked_once_for_each_version(tmp_path):
    run = handed_over(tmp_path / "run", width=5)
    assert Experiment.open(run, trust=str(run / "mine.py")).recipe.width == 5
    assert ran(run)
    assert Experiment.open(run).recipe.width == 5
    text = (run / "mine.py").read_text()
    (run / "mine.py").write_text(text + "# edited\n")
    with pytest.raises(CheckpointError, match="as it is now"):
        Experiment.open(run)
    (run / "mine.py").write_text(text)
    assert Experiment.open(run).recipe.width == 5
    moved = Path(shutil.copytree(run, tmp_path / "other"))  # what lies beside a file may be another there
    checksummed_json.write(
        moved / "config.json", {**checksummed_json.read(moved / "config.json"), "recipe": str(moved / "mine.py")}
    )
    with pytest.raises(CheckpointError, match="as it is now"):
        Experiment.open(moved)


def test_who_trains_it_has_named_it(tmp_path):
    run = handed_over(tmp_path / "run")
    recipe = Experiment.open(run, trust=str(run / "mine.py")).recipe
    shutil.rmtree(tmp_path / "state")
    experiment = Experiment(str(run / "mine.py"), recipe, tmp_path / "new")
    experiment.__dict__["data"] = (type("Data", (), {"features": {}}), None)
    assert experiment.begin(resume=False)
    assert Experiment.open(tmp_path / "new").recipe.width == 8


def test_a_copy_elsewhere_stands_for_a_file_that_is_gone(tmp_path):
    run = handed_over(tmp_path / "run", recipe="/gone/mine.py")
    with pytest.raises(ConfigError, match=r"there is no recipe file /gone/mine\.py"):
        Experiment.open(run)
    assert Experiment.open(run, trust=str(run / "mine.py")).recipe.width == 8


def test_a_package_is_not_imported_for_a_file_in_it(tmp_path, monkeypatch):
    run = handed_over(tmp_path / "strange_lab")
    (run / "__init__.py").write_text((run / "mine.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CheckpointError, match="as it is now"):
        Experiment.open(run)
    assert not ran(tmp_path)


def test_a_file_that_does_not_run_is_not_remembered(tmp_path):
    run = handed_over(tmp_path / "run")
    (run / "mine.py").write_text("1 / 0")
    for _ in range(2):
        with pytest.raises(ConfigError, match="ZeroDivisionError"):
            Experiment.open(run, trust=str(run / "mine.py"))
        assert not consent.given(run / "mine.py", b"1 / 0")


def test_without_a_home_it_is_asked_for_each_time(tmp_path, monkeypatch):
    run = handed_over(tmp_path / "run")
    (tmp_path / "state").write_text("no directory")
    assert Experiment.open(run, trust=str(run / "mine.py"))
    with pytest.raises(CheckpointError, match="as it is now"):
        Experiment.open(run)


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", "8"), ("width", True), ("width", 8.5), ("rate", "x"), ("rate", None), ("sizes", 3), ("sizes", ["a"]),
     ("kind", 5), ("epochs", [1]), ("policy", {"a": 1})],
)  # fmt: skip
def test_options_are_of_the_types_of_their_fields(tmp_path, name, value):
    run = handed_over(tmp_path / "run", **{name: value})
    with pytest.raises(CheckpointError, match=rf"config\.json gives {name} as "):
        Experiment.open(run, trust=str(run / "mine.py"))


def test_a_config_is_sealed_and_one_from_before_is_read(tmp_path):
    run = handed_over(tmp_path / "run", width=5, rate=1, sizes=[1, 2], kind="a")
    config = read_config(run)
    assert config is not None
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"width": 5', '"width": 6'))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: it reads back other than it was written"):
        read_config(run)
    (run / "config.json").write_text(json.dumps(config))
    assert read_config(run) == config


def test_every_bit_of_a_config_counts(tmp_path):
    run = handed_over(tmp_path / "run", width=5, rate=0.25)
    config, whole = read_config(run), (run / "config.json").read_bytes()
    seen = 0
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        (run / "config.json").write_bytes(damaged)
        try:
            assert read_config(run) == config, at  # a blank that is another one, or who wrote it
        except CheckpointError:
            seen += 1
    assert seen > 0.8 * len(whole)

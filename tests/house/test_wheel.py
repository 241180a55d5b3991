"""The wheel holds every file of the package and nothing else."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, metadata, version
from pathlib import Path

import pytest

import sapwood

CLUTTER = shutil.ignore_patterns(
    ".git", ".*venv", "venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache"
)


def rooms(root: Path) -> list[Path]:
    return sorted(init.parent for init in root.glob("*/__init__.py"))


def package_files(root: Path) -> set[str]:
    """Every file of the package below `root`, as the wheel names it."""
    files = [root / "__init__.py", root / "__main__.py", root / "py.typed"]
    for room in rooms(root):
        files += [f for f in room.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    return {f"sapwood/{f.relative_to(root).as_posix()}" for f in files}


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> zipfile.ZipFile:
    # In a copy: setuptools leaves build/ where it builds, and packs what an earlier build left there.
    place = tmp_path_factory.mktemp("wheel")
    clone = place / "clone of another name"
    shutil.copytree(root, clone, ignore=CLUTTER)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(place)], cwd=clone, check=True, capture_output=True)
    return zipfile.ZipFile(next(place.glob("sapwood-*.whl")))


def test_wheel_holds_the_package_and_nothing_else(wheel, root):
    names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert names == package_files(root)


def test_wheel_carries_licence_and_command(wheel):
    names = [n for n in wheel.namelist() if ".dist-info/" in n]
    assert any(n.endswith("/licenses/LICENSE") for n in names)
    entry = wheel.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    assert "sapwood = sapwood.__main__:main" in entry


def test_the_command_is_there():
    (command,) = [e for e in entry_points(group="console_scripts") if e.name == "sapwood"]
    assert callable(command.load())


def test_every_folder_with_modules_is_a_package(root):
    """A folder of modules without an `__init__.py` would be missing for every user."""
    folders = {file.parent for room in rooms(root) for file in room.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_versions_agree(root):
    assert sapwood.__version__ == version("sapwood")
    assert f"## [{sapwood.__version__}]" in (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_installed_is_what_this_clone_declares(root):
    """An installation older than pyproject.toml tests something else than what stands here."""
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    installed = metadata("sapwood")
    assert installed["Requires-Python"] == declared["requires-python"]
    required = {r.split(";")[0].split()[0] for r in installed.get_all("Requires-Dist") if "extra ==" not in r}
    assert required == {r.split(";")[0].strip() for r in declared["dependencies"]}


def test_tests_run_against_one_sapwood(root):
    """pytest must not import the root's `__init__.py` a second time under the name of the clone's folder."""
    copies = [
        name
        for name, module in sys.modules.items()
        if getattr(module, "__file__", None) and Path(module.__file__) == root / "__init__.py"
    ]
    assert copies in ([], ["sapwood"])


def test_python_3_11_to_3_13(root):
    classifiers = tomllib.loads((root / "pyproject.toml").read_text())["project"]["classifiers"]
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(classifiers)

"""Finding a recipe by its file: each time as the file is, in a package or alone, whatever the folder is called."""

import sys

import pytest

import sapwood as sw

CODE = """
from dataclasses import dataclass
import sapwood
@dataclass(frozen=True)
class Mine(sapwood.Recipe):
    width: int = 3
"""


@pytest.mark.parametrize("folder", ["", "package_of_mine"])
def test_an_edit_is_found(folder, tmp_path, monkeypatch):
    file = tmp_path / folder / "mine_of_mine.py"
    file.parent.mkdir(exist_ok=True)
    if folder:
        (file.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    name = "package_of_mine.mine_of_mine" if folder else "sapwood_recipe_mine_of_mine"
    for width in (3, 4):  # within a second, and as long as before
        file.write_text(CODE.replace("3", str(width)))
        found = sw.experiment.find(str(file))
        assert (found().width, found.__module__) == (width, name)
        assert sys.modules[name].Mine is found
    file.write_text("1 / 0")
    with pytest.raises(sw.ConfigError, match="line 1: ZeroDivisionError"):
        sw.experiment.find(str(file))
    assert sys.modules.pop(name).Mine is found
    sys.modules.pop("package_of_mine", None)


def test_a_package_called_as_a_module_of_python_is(tmp_path):
    for name in ("code", "json"):  # a module, and a package
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "mine.py").write_text(CODE)
        assert sw.experiment.find(str(tmp_path / name / "mine.py")).__module__ == "sapwood_recipe_mine"
    del sys.modules["sapwood_recipe_mine"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders, each with a recipe that imports a helper of one name beside it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, width in (("one", 5), ("two", 6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helper_of_mine.py").write_text(f"width = {width}")
        text = CODE.replace("import sapwood\n", "import sapwood, helper_of_mine\n")
        (tmp_path / name / "mine.py").write_text(text.replace("3", "helper_of_mine.width"))
    yield tmp_path
    for name in ("helper_of_mine", "sapwood_recipe_mine"):
        sys.modules.pop(name, None)


def test_it_imports_what_lies_beside_it(folders):
    assert sw.experiment.find(str(folders / "one" / "mine.py"))().width == 5


def test_what_another_recipe_imported_under_the_same_name_is_not_taken_for_it(folders):
    sw.experiment.find(str(folders / "one" / "mine.py"))
    with pytest.raises(sw.ConfigError, match=r"imports 'helper_of_mine', which is .*one.*, and .*two.* lies beside it"):
        sw.experiment.find(str(folders / "two" / "mine.py"))


def test_no_file_beside_it_stands_in_for_a_library(folders):
    (folders / "one" / "optax.py").write_text("1 / 0")
    (folders / "one" / "mine.py").write_text(CODE.replace("import sapwood\n", "import optax, sapwood\n"))
    with pytest.raises(sw.ConfigError, match=r"imports 'optax', .* lies beside it; rename that"):
        sw.experiment.find(str(folders / "one" / "mine.py"))

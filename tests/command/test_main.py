"""The command line as a whole: help, versions, and mistakes, each of them one line and exit code 2."""

import runpy
import sys

import pytest

import sapwood as sw
from sapwood.__main__ import COMMANDS, main
from sapwood.saving.checkpoints import Checkpoints


def test_version(sapwood):
    assert sapwood("--version").out == [sw.__version__]


def test_python_m(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sapwood", "--version"])
    monkeypatch.delitem(sys.modules, "sapwood.__main__")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("sapwood", run_name="__main__", alter_sys=True)
    assert (end.value.code, *capfd.readouterr()) == (0, f"{sw.__version__}\n", "")


def test_help_names_every_command(sapwood):
    done = sapwood("--help")
    assert done.code == 0
    assert all(any(line.split()[:1] == [name] for line in done.out) for name in COMMANDS)
    assert (sapwood().code, sapwood().out) == (2, done.out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(sapwood, command):
    done = sapwood(command, "--help")
    assert (done.code, done.err) == (0, [])
    assert done.out[0].startswith(f"usage: sapwood {command}")


def test_help_of_a_recipe_shows_its_hyper_parameters(sapwood, stripes):
    done = sapwood("train", stripes, "--help")
    assert done.code == 0
    assert "Whether a line lies or stands." in done.out
    shown = " ".join(" ".join(done.out).split())
    assert "--hidden INT default: 8" in shown
    assert "--learning-rate FLOAT default: 0.01" in shown


def test_recipes_are_listed(sapwood):
    lines = sapwood("recipes").out
    assert [line.split()[0] for line in lines] == ["digits", "digits-mlp", "text"]
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "there is no command 'trian'; did you mean 'train'?"),
        ("train", "name a recipe: sapwood train RECIPE (recipes: digits, digits-mlp, text, or a Python file)"),
        ("train --run x", "name a recipe: sapwood train RECIPE"),
        ("train digit", "there is no recipe 'digit'; did you mean 'digits' or 'digits-mlp'?"),
        ("train nowhere.py", "there is no recipe file nowhere.py"),
        ("train digits --epohcs 3", "there is no option '--epohcs' here; did you mean '--epochs'"),
        ("train digits --epochs x", "argument --epochs: invalid INT value: 'x' (sapwood train digits --help shows"),
        ("train digits more", "there is no argument 'more' here"),
        (
            "train digits --best loss",
            'argument --best: best=\'loss\': "min:loss" where the smallest is best, or "max:loss" where the largest is',
        ),
        ("train digits --devices 0", "--devices 0: at least one device is needed"),
        ("train digits --devices x", "argument --devices: invalid int value: 'x'"),
        ("train digits --mesh data=4,fsdp", "mesh 'data=4,fsdp': cannot read 'fsdp'; write axis=size pairs"),
        ("train digits --mesh dta=8", "mesh 'dta=8': unknown axis 'dta'; did you mean 'data'"),
        ("train digits --mesh data=3", "the sizes multiply to 3, the number of devices is 8"),
        ("train digits --mesh data=-1,fsdp=-1", "only one axis may be -1"),
        ("train digits --rules fsdp", "--rules needs --mesh"),
        ("train digits --mesh data=-1 --rules fsdpp", "rules 'fsdpp': no such table; did you mean 'fsdp'?"),
        ("evaluate", "the following arguments are required: run (sapwood evaluate --help shows the options)"),
        ("evaluate nowhere", "nowhere is no run: it has no config.json"),
        ("predict nowhere", "the following arguments are required: files"),
        ("predict nowhere a.png", "nowhere is no run: it has no config.json"),
        ("summary digit", "there is no recipe 'digit'; did you mean"),
        ("graph digits --out x.pdf", "argument --out: a name that ends in .html or .svg is expected, not 'x.pdf'"),
        ("profile digits-mlp --epochs 0", "epochs is 0; at least 1 is expected"),
        ("summary digits-mlp --batch-size -1", "batch_size is -1; at least 1 is expected"),
        ("graph digits-mlp --batch-size 0", "batch_size is 0; at least 1 is expected"),
        ("shardings digits-mlp --mesh data=4 --batch-size -5", "batch_size is -5; at least 1 is expected"),
        ("doctor more", "there is no argument 'more' here"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(sapwood, tmp_path, words, message):
    done = sapwood(*words.split())
    assert done.error.startswith(message) or message in done.error
    assert done.out == []
    assert list(tmp_path.iterdir()) == []


def test_doctor_takes_no_rules_without_a_mesh(sapwood):
    assert sapwood("doctor", "--rules", "fsdp").error == "--rules needs --mesh"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n", "mine.py, line 1: invalid syntax"),
        ("import sapwood\n\nimport no_such_module\n", "mine.py, line 3: ModuleNotFoundError: No module named 'no_such"),
        ("def f():\n    1 / 0\n\nf()\n", "mine.py, line 2: ZeroDivisionError"),
        ("x = 1\n", "mine.py: a recipe file defines one subclass of sapwood.Recipe; this one has none"),
        ("import sapwood as sw\nclass A(sw.Recipe): pass\nclass B(sw.Recipe): pass\n", "this one has A, B"),
        (
            "import sapwood as sw\nclass A(sw.Recipe):\n    width: int = 3\n",
            "mine.py: width of A would not be hyper-parameters; write @dataclass(frozen=True) above class A",
        ),
        ("import sapwood as sw\nclass A(sw.Recipe): pass\n", "the recipe A defines no data()"),
        (
            "from sapwood.recipes.vision.digits import Digits\nclass A(Digits):\n    width: int = 64\n",
            "mine.py: width of A would not be hyper-parameters; write @dataclass(frozen=True) above class A",
        ),
        (
            "from dataclasses import dataclass\nfrom sapwood.recipes.vision.digits import Digits\n"
            "@dataclass(frozen=True)\n"
            "class A(Digits):\n    width = 64\n",
            "mine.py: width of A would stay what it is in the class that A is made of; write its type, too",
        ),
        (
            "from __future__ import annotations\nimport sapwood as sw\nfrom dataclasses import dataclass\n"
            "@dataclass(frozen=True)\nclass A(sw.Recipe):\n    x: Sequence[int] = ()\n",
            "the types of the fields of A cannot be read: name 'Sequence' is not defined; import it",
        ),
        (
            "import sapwood as sw\nfrom dataclasses import dataclass\n@dataclass(frozen=True)\nclass A(sw.Recipe):\n"
            "    x: dict = None",
            "--x: fields of type <class 'dict'> cannot be read from a command line",
        ),
    ],
)
def test_a_recipe_file_with_a_mistake(sapwood, tmp_path, source, message):
    (tmp_path / "mine.py").write_text(source)
    assert message in sapwood("train", "mine.py").error
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["mine.py"]


def test_a_mistake_in_a_file_that_a_recipe_imports(sapwood, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside_mine.py").write_text("\n\ndef f(:\n")
    (tmp_path / "mine.py").write_text("import beside_mine\n")
    assert sapwood("train", "mine.py").error == f"{tmp_path}/beside_mine.py, line 3: invalid syntax"


@pytest.mark.parametrize("above", ["@dataclass(frozen=True)\n", ""])
def test_constants_of_a_recipe_are_no_hyper_parameters(sapwood, tmp_path, above):
    source = f"from dataclasses import dataclass\nfrom typing import ClassVar\nimport sapwood as sw\n{above}"
    (tmp_path / "mine.py").write_text(
        f"{source}class A(sw.Recipe):\n    NAMES: ClassVar[tuple] = ('a',)\n    SIZE = 3\n"
    )
    assert sapwood("train", "mine.py").error == "the recipe A defines no data()"


@pytest.mark.costs("a command as users start it, from its import to the curves of the run")
def test_a_warning_is_a_line_that_names_no_code(process, stripes, tmp_path):
    words = ("--devices", 8, "--mesh", "fsdp=8", "--hidden", 8201, "--epochs", 1, "--batch-size", 48)
    done = process("train", stripes, *words, "--run", "r")
    assert done.code == 0, done.err
    assert done.err == ["sapwood: warning: logits/kernel: no dimension of (8201, 2) divides by fsdp=8: left whole"]
    assert done.out[-3] == "run r"
    assert (tmp_path / "r" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_debug_shows_the_traceback(sapwood):
    done = sapwood("--debug", "evaluate", "nowhere")
    assert done.code == 2
    assert done.err[0] == "Traceback (most recent call last):"
    assert done.err[-1] == "sapwood: error: nowhere is no run: it has no config.json"
    assert sapwood("evaluate", "nowhere", "--debug").err[0] == done.err[0]


def test_what_nobody_expected_keeps_its_traceback(sapwood, tmp_path):
    (tmp_path / "mine.py").write_text("import sapwood as sw\nclass A(sw.Recipe):\n    def data(self): return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        sapwood("train", "mine.py")


def test_an_interrupt_is_130(sapwood, stripes, monkeypatch):
    from sapwood.experiment.experiment import Experiment

    monkeypatch.setattr(Experiment, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    done = sapwood("train", stripes)
    assert done.code == 130
    assert done.err[-1] == "sapwood: stopped; --resume goes on from the last checkpoint"


@pytest.mark.costs("trains twice, and may be the first to train")
def test_an_interrupt_while_it_trains_leaves_a_run_that_goes_on(run, sapwood, stripes, monkeypatch):
    words = ("train", stripes, "--run", "s", "--checkpoint-every", 2)
    save = Checkpoints.save

    def interrupted(self, step, *rest):
        save(self, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupted)
        stopped = sapwood(*words)
    assert (stopped.code, stopped.err[-1]) == (130, "sapwood: stopped; --resume goes on from the last checkpoint")
    assert "Traceback" not in "\n".join(stopped.err)
    assert Checkpoints("s/checkpoints").steps()[-1] == 4
    resumed = sapwood(*words, "--resume")
    assert resumed.digest == run.digest
    assert resumed.out[-2] == run.out[-2]  # the test accuracy


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pipe that breaks as in POSIX")
def test_a_reader_that_goes_away(monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    monkeypatch.setattr(sys, "stderr", open("/dev/null", "w"))  # noqa: SIM115 (main closes it)
    assert main(["recipes"]) == 0

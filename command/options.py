"""Parse the options of a command with argparse: a recipe's fields become options, and each error is one line.

argparse is used instead of a larger library because it costs no import time and its errors can be one line each.
"""

import argparse
import contextlib
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from sapwood.core.errors import ConfigError
from sapwood.core.messages import nearest


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises `ConfigError`, and names the nearest options for an unknown one.

    Args:
        command: the name of the command.
        about: the description for ``--help``.
        options: further arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, about: str, **options: Any):
        super().__init__(
            prog=f"sapwood {command}",
            description=about,
            allow_abbrev=False,
            **options,
        )
        self.help_command = f"sapwood {command} --help"

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.help_command} shows the options)")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse the words of a command line. Raises `ConfigError` for an unknown option or argument."""
        found, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [word for action in self._actions for word in action.option_strings]
            word = unknown[0].split("=")[0]
            what = "option" if word.startswith("-") else "argument"
            self.error(f"there is no {what} {word!r} here{nearest(word, known)}")
        return found


def add_fields(parser: argparse.ArgumentParser, config: type) -> None:
    """Add an option for each field of a dataclass: ``learning_rate`` becomes ``--learning-rate``.

    Fields with ``init=False`` are omitted. A field's metadata "default" replaces its default in the help text. Raises
    `ConfigError` for a field whose type cannot be read from a command line, or whose name is an option already.
    """
    group = parser.add_argument_group("hyper-parameters of the recipe")
    try:
        hints = typing.get_type_hints(config)
    except NameError as error:
        raise ConfigError(f"the types of the fields of {config.__name__} cannot be read: {error}; import it, and not "
                          "only `if TYPE_CHECKING`") from None  # fmt: skip
    for field in filter(lambda field: field.init, dataclasses.fields(config)):
        option = "--" + field.name.replace("_", "-")
        settings: dict[str, Any] = {"help": "default: %(default)s", **_converter(hints[field.name], option)}
        if "default" in field.metadata:
            settings["help"] = f"default: {field.metadata['default']}"
        if field.default_factory is not dataclasses.MISSING:
            settings["default"] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            settings["default"] = field.default
        else:
            settings |= {"required": True, "help": "required"}
        try:
            group.add_argument(option, dest=f"field.{field.name}", **settings)
        except argparse.ArgumentError:
            raise ConfigError(
                f"the recipe's field {field.name!r} has the name of an option of {parser.prog}; give it another name"
            ) from None


def fields_of(found: argparse.Namespace) -> dict[str, Any]:
    """The values of the options that `add_fields` made, by field name."""
    return {name[6:]: value for name, value in vars(found).items() if name.startswith("field.")}


def _converter(kind: Any, option: str) -> dict[str, Any]:
    """Settings of `add_argument` for a type: int, float, str, bool, Literal, X | None, and tuples of these."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and inner:
        many = len(inner) == 2 and inner[1] is Ellipsis
        if many or len(set(inner)) == 1:
            read = _reader(inner[0], option)
            return {"type": read, "nargs": "+" if many else len(inner), "metavar": read.__name__, "action": _Tuple}
    read = _reader(kind, option)
    return {"type": read, "metavar": read.__name__}


def _reader(kind: Any, option: str) -> Callable[[str], Any]:
    """A function that reads a value of a type from a word.

    Its ``__name__`` says what is expected, because argparse's errors repeat it. It raises ValueError for a bad word.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in (int, float, str):
        return _named(kind.__name__.upper(), kind)
    if kind is type(None):
        return _named("none", {"none": None}.__getitem__)
    if kind is bool:
        return _named("true|false", {"true": True, "false": False}.__getitem__)
    if origin is typing.Literal:
        words = {str(value).lower() if value in (None, True, False) else str(value): value for value in inner}
        return _named("|".join(words), words.__getitem__)
    if origin in (typing.Union, types.UnionType):
        parts = [_reader(part, option) for part in sorted(inner, key=_EAGER.__contains__)]
        return _named("|".join(part.__name__ for part in parts), lambda word: _first(parts, word))
    raise ConfigError(f"{option}: fields of type {kind} cannot be read from a command line; use int, float, str, bool, "
                      "Literal, X | None or tuple[X, ...]")  # fmt: skip


_EAGER = (str,)  # accepts any word, so it is tried last


def _first(readers: Sequence[Callable[[str], Any]], word: str) -> Any:
    for read in readers:
        with contextlib.suppress(ValueError):
            return read(word)
    raise ValueError(word)


def _named(name: str, read: Callable[[str], Any]) -> Callable[[str], Any]:
    def reader(word: str) -> Any:
        try:
            return read(word)
        except KeyError:
            raise ValueError(word) from None

    reader.__name__ = name
    return reader


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))  # type: ignore[arg-type]


def about(config: type) -> str:
    """The first line of a recipe's docstring."""
    return (inspect.getdoc(config) or "").partition("\n")[0]


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options about where to run. They do not change the results."""
    group = parser.add_argument_group("where to run")
    group.add_argument("--devices", type=int, metavar="N", help="simulate N devices on the CPU")
    group.add_argument("--mesh", metavar="AXES", help='the mesh, such as "data=4,fsdp=2"; one axis may be -1')
    group.add_argument("--rules", metavar="NAME",
                       help='how arrays are split over it: "fsdp+tensor"; by default the mesh says')  # fmt: skip


def add_step(parser: argparse.ArgumentParser) -> None:
    """Add ``--step``, which chooses a checkpoint of a run."""
    parser.add_argument(
        "--step", type=step, metavar="N|best|last",
        help="which checkpoint; default: the best where the run keeps one (train --best), else the last",
    )  # fmt: skip


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust``, which names the recipe file that may be run for a run that a stranger may have made."""
    parser.add_argument(
        "--trust", metavar="FILE",
        help="the run's recipe file, or a copy of it elsewhere, which is run: needed once where another trained it, or "
        "the file was edited since you ran it last",
    )  # fmt: skip


def step(word: str) -> int | str:
    """Parse ``--step``: an integer, "best" or "last", as `sw.load(step=)` takes it."""
    if word not in ("best", "last") and not word.isdecimal():
        raise argparse.ArgumentTypeError(f"the number of a step, best or last is expected, not {word!r}")
    return int(word) if word.isdecimal() else word


def machine(found: argparse.Namespace) -> dict[str, Any]:
    """The options of the `Trainer` that depend on the machine: ``mesh`` and ``rules``; empty without ``--mesh``.

    It first creates the simulated devices of ``--devices``. Raises `ConfigError` if JAX finds no device, or if the
    options do not fit together.
    """
    import jax

    import sapwood as sw

    if found.devices is not None:
        if found.devices < 1:
            raise ConfigError(f"--devices {found.devices}: at least one device is needed")
        try:
            jax.config.update("jax_num_cpu_devices", found.devices)
            jax.config.update("jax_platforms", "cpu")
        except RuntimeError:
            raise ConfigError(f"--devices {found.devices}: JAX has its devices already, because the recipe's file uses "
                              "it while it is imported; move that into the recipe's methods") from None  # fmt: skip
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"JAX finds no device; sapwood doctor says what is missing {error}".rstrip()) from error
    if found.mesh is None:
        if found.rules is not None:
            raise ConfigError("--rules needs --mesh")
        return {}
    mesh = sw.mesh(found.mesh)
    sw.parallel.batch_sharding(mesh, found.rules)  # raises for wrong rules before any data is loaded
    return {"mesh": mesh, "rules": found.rules}

"""Options of a command: argparse, with a recipe's fields as options and every mistake as one line.

argparse and not a larger library: it costs no import time, and its errors can be one line each.
"""

import argparse
import dataclasses
import inspect
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from sapwood.core.errors import ConfigError
from sapwood.core.paths import nearest


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors are `ConfigError`, with the nearest names for an unknown option."""

    def __init__(self, command: str, about: str, **options: Any):
        super().__init__(
            prog=f"sapwood {command}",
            description=about,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help shows the options)")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The parsed options; `ConfigError` for any that is unknown."""
        found, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [word for action in self._actions for word in action.option_strings]
            word = unknown[0].split("=")[0]
            what = "option" if word.startswith("-") else "argument"
            self.error(f"there is no {what} {word!r} here{nearest(word, known)}")
        return found


def add_fields(parser: argparse.ArgumentParser, config: type) -> None:
    """Each field of a dataclass as an option of the same name."""
    group = parser.add_argument_group("hyper-parameters of the recipe")
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        default = field.default if field.default is not dataclasses.MISSING else None
        if default is None and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        option = "--" + field.name.replace("_", "-")
        group.add_argument(option, dest=f"field.{field.name}", default=default, **_converter(hints[field.name], option))


def fields_of(found: argparse.Namespace) -> dict[str, Any]:
    """The values of the options that `add_fields` made, by field name."""
    return {name[6:]: value for name, value in vars(found).items() if name.startswith("field.")}


def _converter(kind: Any, option: str) -> dict[str, Any]:
    """What argparse needs to read a value of a type: int, float, str, bool, Literal, X | None and tuple[X, ...]."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": " "}
    if origin is typing.Literal:
        return {"type": type(inner[0]), "choices": inner, "help": " "}
    if origin in (typing.Union, types.UnionType) and type(None) in inner:
        return _converter(next(x for x in inner if x is not type(None)), option)
    if origin is tuple:
        return {"type": inner[0], "nargs": "+", "metavar": inner[0].__name__.upper(), "action": _Tuple, "help": " "}
    if kind in (int, float, str):
        return {"type": kind, "metavar": kind.__name__.upper(), "help": " "}
    raise ConfigError(f"{option}: fields of type {kind} cannot be read from a command line; use int, float, str, bool, "
                      "Literal, X | None or tuple[X, ...]")  # fmt: skip


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))  # type: ignore[arg-type]


def about(config: type) -> str:
    """The first line of a recipe's docstring."""
    return (inspect.getdoc(config) or "").partition("\n")[0]


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The options that say where to run: they change no number."""
    group = parser.add_argument_group("where to run")
    group.add_argument("--devices", type=int, metavar="N", help="simulate N devices on the CPU")
    group.add_argument("--mesh", metavar="AXES", help='the mesh, such as "data=4,fsdp=2"; one axis may be -1')
    group.add_argument("--rules", metavar="NAME", help="the table from logical axes to mesh axes")


def machine(found: argparse.Namespace) -> dict[str, Any]:
    """The trainer's options for that place: its mesh and rules, once the simulated devices are there."""
    import jax

    import sapwood as sw

    if found.devices is not None:
        if found.devices < 1:
            raise ConfigError(f"--devices {found.devices}: at least one device is needed")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", found.devices)
    if found.mesh is None:
        if found.rules is not None:
            raise ConfigError("--rules needs --mesh")
        return {}
    return {"mesh": sw.mesh(found.mesh), "rules": found.rules}

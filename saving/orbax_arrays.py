"""Arrays by path, written to a directory by Orbax while training goes on, and read from it under any sharding.

Set up for little overhead, and for errors that come as exceptions alone.
"""

import asyncio
import functools
import logging
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from sapwood.saving import array_bits
from sapwood.saving.digest import describe


class Writer:
    """Orbax's asynchronous checkpointer, which writes a text beside the arrays before it gives the directory its name.

    The text is the file ``name``. `close` lets go of Orbax's threads.
    """

    def __init__(self, name: str):
        ocp = _orbax()
        writer = self
        self._text = ""

        class Handler(ocp.PyTreeCheckpointHandler):
            def finalize(self, directory: Any) -> None:
                super().finalize(directory)
                (directory / name).write_text(writer._text)

        @ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
        @dataclass
        class Save(ocp.args.PyTreeSave):
            pass

        self._args = Save
        # No files about shardings and layouts: restore is always told its own. No compression: weights hardly
        # compress, and the processors have a network to train. Together 120 -> 70 ms of processor time for 30 arrays.
        arrays = ocp.type_handlers.ArrayHandler(array_metadata_store=None, enable_write_sharding_file=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        self._checkpointer = ocp.AsyncCheckpointer(
            Handler(type_handler_registry=registry, use_compression=False),
            checkpoint_metadata_store=ocp.metadata.metadata_store(enable_write=False),
        )

    def save(self, directory: Path, arrays: dict[str, jax.Array], text: str) -> None:
        """Copy the arrays to the host, start to write them, and return."""
        self._text = text
        self._checkpointer.save(directory, args=self._args(arrays))

    def wait(self) -> None:
        """Wait until all is written; raises what went wrong with it."""
        self._checkpointer.wait_until_finished()

    def close(self) -> None:
        self._checkpointer.close()


def read(directory: Path, structs: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays of these paths under these shardings. ValueError where one of them is not as it was described."""
    if not structs:
        return {}
    ocp = _orbax()
    args = {name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape) for name, x in structs.items()}
    args = ocp.args.PyTreeRestore(item=structs, restore_args=args, partial_restore=True)
    try:
        arrays = _reader().restore(directory, args=args)
    except Exception as error:
        if interruption := _interruption(error):
            raise interruption from None
        raise
    for name, x in structs.items():
        if not isinstance(arrays[name], jax.Array) or describe(arrays[name]) != describe(x):
            raise ValueError(f"{name} is no longer {array_bits.kind(*describe(x))}")
    return arrays


def _interruption(error: BaseException | None) -> BaseException | None:
    """What stopped the process while Orbax read, such as Ctrl-C: it makes an array that cannot be read of that."""
    while isinstance(error, Exception):
        error = error.__cause__ or error.__context__
    return error


def preload() -> threading.Thread:
    """Import Orbax (0.4 s) in a thread, to be started where the main thread waits for the compiler."""
    thread = threading.Thread(target=_orbax, name="import orbax", daemon=True)
    thread.start()
    return thread


@functools.cache
def _orbax() -> Any:
    import orbax.checkpoint as ocp

    # What fails comes here as an exception. absl would print a page of traceback for each of Orbax's threads too, and
    # asyncio one for each array that Orbax no longer waited for.
    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: not re.search("orbax|tensorstore", record.getMessage()))
    return ocp


@functools.cache
def _reader() -> Any:
    ocp = _orbax()

    class Arrays(ocp.type_handlers.ArrayHandler):
        """Where one array cannot be read, wait for the others that are on their way before that is said: Orbax leaves
        them to an event loop that it closes, for which each prints a traceback."""

        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            before = asyncio.all_tasks()
            try:
                return await super().deserialize(infos, args)
            except Exception:
                await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
                raise

    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, Arrays()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)

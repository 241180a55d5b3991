"""What every test may rely on: eight simulated CPU devices, a home of its own, no network, any order, cheap compiling.

The environment is set while this file is imported, so before any test imports jax.
"""

import atexit
import contextlib
import ipaddress
import os
import random
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # for `benchmarks`, which is not installed; at the end, so that it shadows no package
DEVICES = "--xla_force_host_platform_device_count"


def _environment(home: Path) -> None:
    """Point every place where a library keeps files into `home`; child processes lose the network too."""
    for name in [n for n in os.environ if n.startswith(("SAPWOOD_", "TFDS_"))]:
        del os.environ[name]
    for name in ("HOME", "USERPROFILE"):
        os.environ[name] = str(home)
    xdg = [f"XDG_{kind}_HOME" for kind in ("DATA", "CACHE", "CONFIG", "STATE")]
    for name in (*xdg, "APPDATA", "LOCALAPPDATA"):
        os.environ[name] = str(home / name.lower())
    if DEVICES not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.update(KERAS_BACKEND="jax", MPLBACKEND="Agg", HF_HUB_OFFLINE="1", NO_GCE_CHECK="true")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        os.environ[name] = "http://127.0.0.1:9"  # the discard port: nothing answers there
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "localhost,127.0.0.1,::1"


CHEAP = {  # what the caller has set, stays: JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles all as for users
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


def _cheap_compiling(home: Path) -> None:
    """What compiles, here and in child processes, keeps its programs in one directory, and LLVM does not optimise them.

    The processes of pytest-xdist inherit the directory. A JAX_COMPILATION_CACHE_DIR of the caller's outlives the run.
    XLA's own passes (fusion, partitioning) run as ever. Tests marked `fresh_compile` see none of this.
    """
    if os.environ["JAX_PLATFORMS"] == "cpu":
        programs = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or home / "programs").expanduser().absolute()
        programs.mkdir(parents=True, exist_ok=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
        for name, value in CHEAP.items():
            os.environ.setdefault(name, value)


HOME = Path(tempfile.mkdtemp(prefix="sapwood-tests-"))
PROCESS = os.getpid()


@atexit.register  # where pytest ends before it has begun, too
def _leave() -> None:
    if os.getpid() == PROCESS:  # not in a fork of it
        shutil.rmtree(HOME, ignore_errors=True)


_environment(HOME)
_cheap_compiling(HOME)


class NetworkBlocked(RuntimeError):
    """A test tried to reach another machine."""


def _is_loopback(host: object) -> bool:
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback or str(host) == "0.0.0.0"
    except ValueError:
        return False


def _block_network() -> None:
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(host: object) -> None:
        if not _is_loopback(host.decode() if isinstance(host, bytes) else host):
            raise NetworkBlocked(f"a test reached for {host!r}; tests run without network")

    def guarded(original):
        def call(self, address, *rest):
            if isinstance(address, tuple):  # AF_UNIX addresses are paths
                refuse(address[0])
            return original(self, address, *rest)

        return call

    def lookup(host, *args, **kwargs):
        refuse(host)
        return getaddrinfo(host, *args, **kwargs)

    socket.socket.connect = guarded(connect)  # pyright: ignore[reportAttributeAccessIssue]
    socket.socket.connect_ex = guarded(connect_ex)  # pyright: ignore[reportAttributeAccessIssue]
    socket.getaddrinfo = lookup


def _whole_programs() -> None:
    """Let JAX put a program into its cache in one piece, and take none that is damaged: a child that is killed, or
    writes while this process reads, leaves the half of one. What children put there without this is taken, too."""
    from sapwood.runtime import compile_cache_entries

    make = compile_cache_entries.maker(compile_cache_entries.plain)
    if make is not None:
        compile_cache_entries.use(make)


@contextlib.contextmanager
def _fresh_compile() -> Iterator[None]:
    """Programs are compiled as they are for users: optimised, and none taken from the directory of the tests.

    A function that was jitted before in this process keeps its program: such a test jits its own.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = ["JAX_COMPILATION_CACHE_DIR", *CHEAP]
    environment = {name: os.environ.pop(name) for name in names if name in os.environ}
    settings = {
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 1.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
        "jax_disable_most_optimizations": False,
    }
    before = {name: jax.config.values[name] for name in settings}

    def update(values: dict) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX looks for the directory once

    update(settings)
    try:
        yield
    finally:
        update(before)
        os.environ.update(environment)


class _Markers:
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        for mark in item.iter_markers("costs"):  # for .ci/times
            item.user_properties.append(("costs", mark.args[0] if mark.args else mark.kwargs.get("why", "")))
        with _fresh_compile() if item.get_closest_marker("fresh_compile") else contextlib.nullcontext():
            return (yield)


class _RootIsNoTestPackage:
    """The root holds `__init__.py` because it is the package `sapwood`. pytest would take it for a package of
    tests and import it a second time under another name."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in an order drawn from SEED")
    parser.addoption("--first-parameters", action="store_true", help="run each test with the first of its parameters")


PLAIN = "not slow and not long"
"""What pyproject.toml says of tests that nobody chose."""


def pytest_configure(config: pytest.Config) -> None:
    if config.option.keyword and config.option.markexpr == PLAIN:
        config.option.markexpr = ""  # what is asked for by name with -k runs, slow or not
    if not re.search(r"\blong\b", config.option.markexpr):  # and what is long, only where that is asked for
        config.option.markexpr = f"({config.option.markexpr or 'slow or not slow'}) and not long"
    config.pluginmanager.register(_RootIsNoTestPackage(), "root-is-no-test-package")
    config.pluginmanager.register(_Markers(), "markers")
    _whole_programs()
    _block_network()


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--first-parameters"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        items[:] = [item for item in items if first[item.nodeid.partition("[")[0]] is item]
    seed = config.getoption("--shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)


@pytest.fixture(scope="session")
def home() -> Path:
    """The home directory of this test run: empty at its start, removed at its end."""
    return HOME


@pytest.fixture(scope="session")
def root() -> Path:
    """The clone these tests came from (not the installed package they test)."""
    return ROOT

"""What runs on Windows and macOS: no module needs what POSIX alone has, and no name on disk holds a colon."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ONLY_POSIX = ("crypt", "fcntl", "grp", "nis", "posix", "pty", "pwd", "resource", "spwd", "syslog", "termios", "tty")
CALLS = ("fork", "forkpty", "geteuid", "getuid", "killpg", "mkfifo", "setsid", "symlink", "link")
SIGNALS = ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGQUIT")
USES = re.compile(
    rf"^ *(?:import|from) (?:{'|'.join(ONLY_POSIX)})\b|\bos\.(?:{'|'.join(CALLS)})\b|\.(?:symlink_to|hardlink_to)\("
    rf"|\bsignal\.({'|'.join(SIGNALS)})\b",
    re.MULTILINE,
)
ROOMS = ("core", "parallel", "layers", "models", "data", "train", "interop", "recipes", "command")

IMPORTS = """
import builtins, importlib, signal, sys
hidden, names = sys.argv[1].split(), sys.argv[2].split()
real = builtins.__import__

def load(name, where=None, *rest):
    if (where or {}).get("__name__", "").startswith("sapwood") and name.split(".")[0] in hidden:
        raise ModuleNotFoundError(f"No module named {name!r}")
    return real(name, where, *rest)

builtins.__import__ = load
del signal.SIGHUP, signal.SIGKILL
for name in names:
    importlib.import_module(name)
from sapwood.train.loop import interrupts
print(sorted(interrupts.NAMES.values()))
"""


def modules(root: Path):
    return [
        root / "__init__.py",
        root / "__main__.py",
        *(path for room in ROOMS for path in sorted((root / room).rglob("*.py"))),
    ]


@pytest.mark.slow
def test_every_module_is_imported_without_what_is_posix_only(root):
    names = [".".join(("sapwood", *path.relative_to(root).with_suffix("").parts)) for path in modules(root)]
    names = [name.removesuffix(".__init__") for name in names]
    command = [sys.executable, "-c", IMPORTS, " ".join(ONLY_POSIX), " ".join(names)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "['Ctrl-C', 'SIGTERM']"


def posix_only(text: str) -> list[str]:
    """What of a module POSIX alone has. A signal counts where the module does not ask first whether it is there."""
    return [found[0] for found in USES.finditer(text) if f'hasattr(signal, "{found[1]}")' not in text]


def test_nothing_uses_what_is_posix_only(root):
    found = {str(path.relative_to(root)): posix_only(path.read_text(encoding="utf-8")) for path in modules(root)}
    assert {path: uses for path, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    "code", ["import fcntl", "    from resource import x", "os.symlink(a, b)", "a.symlink_to(b)", "signal.SIGKILL"]
)
def test_the_rule_sees(code):
    assert len(posix_only(code)) == 1
    assert posix_only('if hasattr(signal, "SIGHUP"): signal.SIGHUP') == []

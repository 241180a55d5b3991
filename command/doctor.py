"""``sapwood doctor``: prints versions, devices and the data directory, and for each problem the command that fixes it.

Each check prints what it finds and returns its problems as pairs ``(problem, command that fixes it)``.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

from sapwood.command import options

PACKAGES = (
    "sapwood", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "array-record",
    "safetensors", "filelock", "numpy", "scikit-learn", "pyarrow", "pillow", "rich", "matplotlib",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run all checks and print their results. Returns exit code 1 if something is missing, else 0."""
    parser = options.Parser("doctor", "versions, devices, and what is missing with the command that mends it")
    options.add_machine(parser)
    found = parser.read(arguments)
    print(f"python      {platform.python_version()} on {platform.system()} {platform.machine()}")
    missing = packages()
    asked = any(option is not None for option in (found.devices, found.mesh, found.rules))
    where = options.machine(found) if asked else {}
    missing += devices()
    if "mesh" in where:
        print(f"mesh        {dict(where['mesh'].shape)}")
    missing += data()
    for problem, mend in missing:
        print(f"\nmissing     {problem}\n            {mend}")
    print("\nall is well" if not missing else "")
    return 1 if missing else 0


def packages() -> list[tuple[str, str]]:
    """Print the versions of `PACKAGES`. Returns those that are not installed."""
    missing = []
    for name in PACKAGES:
        try:
            print(f"{name:<19} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name:<19} -")
            if not (name == "array-record" and platform.system() != "Linux"):
                missing.append((f"the package {name}", f"pip install {name}"))
    return missing


def devices() -> list[tuple[str, str]]:
    """Print JAX's devices. Returns a problem if JAX finds no device, or misses an accelerator of this machine."""
    import jax

    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # an unknown platform, or one whose plugin is not installed
        asked = f" (JAX_PLATFORMS={os.environ['JAX_PLATFORMS']})" if "JAX_PLATFORMS" in os.environ else ""
        said = " ".join(str(error).split())[:200]
        return [(f"JAX finds no device{asked} {said}".rstrip(), "unset JAX_PLATFORMS, or install what it names")]
    kinds = sorted({device.device_kind for device in found})
    print(f"devices     {len(found)} x {', '.join(kinds)} ({jax.default_backend()}), process {jax.process_index()} of "
          f"{jax.process_count()}")  # fmt: skip
    if jax.default_backend() != "cpu":
        return []
    asked = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms  # type: ignore[attr-defined]
    if asked == "cpu":
        print("            (JAX is told to use the CPU alone)")
        return []
    if nvidia():
        return [("JAX sees no GPU, but there is an NVIDIA driver", "pip install 'jax[cuda13]'")]
    if Path("/dev/kfd").exists():
        return [("JAX sees no GPU, but there is an AMD driver", "pip install 'jax[rocm7-local]'")]
    if tpu():
        return [("JAX sees no TPU, but this machine has one", "pip install 'jax[tpu]'")]
    return []


def nvidia() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def tpu() -> bool:
    """Whether this is a TPU machine."""
    return any(Path("/dev").glob("accel*")) or "TPU_ACCELERATOR_TYPE" in os.environ


def data() -> list[tuple[str, str]]:
    """Print the data directory and its prepared data sets. Returns a problem if the directory cannot be written."""
    from sapwood.data import data_directory

    place = data_directory()
    prepared = sorted(path.parent.parent.name for path in place.glob("*/*/dataset_info.json")) if place.exists() else []
    print(f"data        {place} ({', '.join(dict.fromkeys(prepared)) or 'nothing prepared yet'})")
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        return [(f"{place} cannot be written", "export SAPWOOD_DATA_DIR=/a/directory/that/can")]
    return []

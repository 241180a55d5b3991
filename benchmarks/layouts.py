"""The collectives of each layout, counted in the compiled training step of one small decoder.

    python -m benchmarks.layouts [cpu|tpu ...] [--only NAME ...]     # measure: benchmarks/results/layouts.json
    python -m benchmarks.layouts --page                              # docs/parallelism.md and its pictures, from that

The CPU has 8 simulated devices. The TPU is the 16 chips of v5e:4x4, which need not exist (`parallel.topology`, the
extra `plan`). Each platform is compiled in a new process; nothing runs.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "layouts.json"
PLATFORMS = ("cpu", "tpu")
TOPOLOGY = "v5e:4x4"


class Layout(NamedTuple):
    """A rule table, its mesh on 8 CPU and on 16 TPU devices, and extra fields of the model that it needs."""

    rules: str
    cpu: str
    tpu: str
    model: dict[str, Any] = {}  # noqa: RUF012 - never changed


LAYOUTS = {
    "data": Layout("data", "data=8", "data=16"),
    "fsdp": Layout("fsdp", "fsdp=8", "fsdp=16"),
    "zero1": Layout("zero1", "data=8", "data=16"),
    "tensor": Layout("tensor", "tensor=8", "tensor=16"),
    "fsdp+tensor": Layout("fsdp+tensor", "fsdp=2,tensor=4", "fsdp=4,tensor=4"),
    "sequence": Layout("sequence", "sequence=8", "sequence=16"),
    "ulysses": Layout("ulysses", "sequence=8", "sequence=16"),
    "expert": Layout("expert", "expert=8", "expert=16", {"experts": 16}),
    "pipeline": Layout("pipeline", "stage=4,data=2", "stage=4,data=4"),
    "replica": Layout("replica+fsdp", "replica=2,fsdp=4", "replica=2,fsdp=8"),
}

SIZES = {
    "cpu": {"vocabulary": 256, "depth": 4, "width": 128, "heads": 8},
    "tpu": {"vocabulary": 4096, "depth": 4, "width": 512, "heads": 16},
}
BATCH = {"cpu": (16, 64), "tpu": (32, 1024)}


def compiled(layout: Layout, platform: str, devices: list) -> tuple[Any, Any]:
    """The compiled training step of a layout, and its mesh."""
    import jax
    import optax

    import sapwood as sw
    from sapwood.models import Decoder
    from sapwood.train import next_token
    from sapwood.train.state import plan as state_plan

    mesh = sw.mesh(getattr(layout, platform), devices=devices)
    model = Decoder(**SIZES[platform], **layout.model)
    policy = "float32" if platform == "cpu" else "bfloat16"
    trainer = sw.Trainer(next_token(model), optax.adam(1e-3), mesh=mesh, rules=layout.rules, policy=policy)
    struct = jax.ShapeDtypeStruct(BATCH[platform], "int32", sharding=trainer.batch_sharding)
    batch = dict.fromkeys(("tokens", "targets"), struct)
    plan = state_plan.plan(trainer, batch)
    return trainer.compiled.train(plan.shardings).lower(plan.shapes, batch).compile(), mesh


def measure(platform: str, name: str, devices: list) -> dict[str, Any]:
    """The collectives of a layout and the bytes of one device: arguments (state and batch) and temporaries."""
    from sapwood.parallel import collectives

    program, mesh = compiled(LAYOUTS[name], platform, devices)
    found = collectives(program, mesh)
    memory = program.memory_analysis()
    return {
        "mesh": getattr(LAYOUTS[name], platform),
        "rules": LAYOUTS[name].rules,
        "collectives": [
            {"kind": kind, "axes": list(axes), "times": count, "bound": bound, "asynchronous": overlapped, "sent": sent}
            for kind, axes, count, bound, overlapped, sent in found.rows()
        ],
        "held": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def child(platform: str, names: list[str], kind: str = TOPOLOGY) -> dict[str, Any]:
    """The result of `here` in a new process with the environment that the platform needs."""
    from sapwood.parallel.topologies import ENVIRONMENT

    if platform == "cpu":
        environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    else:
        environment = ENVIRONMENT
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.layouts", platform, "--topology", kind, "--here", "--only", *names],
        cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"error: compiling for {platform} ended with {done.returncode}")
    return json.loads(lines[-1])


def here(platform: str, names: list[str], kind: str) -> dict[str, Any]:
    """The result of `measure` for some layouts, in this process."""
    import jax

    from sapwood.parallel import topology

    devices = jax.devices() if platform == "cpu" else topology(kind)
    found: dict[str, Any] = {}
    for name in names:
        print(name, file=sys.stderr, flush=True)
        found[name] = measure(platform, name, devices)
    versions = {"jax": jax.__version__}
    return {"layouts": found, "device": devices[0].device_kind, "versions": versions}


def main(words=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platforms", nargs="*", metavar="cpu|tpu", help="default: both")
    parser.add_argument("--only", nargs="*", choices=LAYOUTS, metavar="NAME", help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument(
        "--topology",
        default=TOPOLOGY,
        help="of 16 TPU chips; what is found of others than %(default)s is printed and not kept",
    )
    parser.add_argument("--page", action="store_true", help="write docs/parallelism.md, and measure nothing")
    parser.add_argument("--here", action="store_true", help="compile in this process, whose environment is right")
    options = parser.parse_args(words)
    names = options.only or list(LAYOUTS)
    if options.here:
        print(json.dumps(here(options.platforms[0], names, options.topology)))
        return
    if options.page:
        from benchmarks import layouts_page

        layouts_page.write(json.loads(RESULTS.read_text()))
        return
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for platform in options.platforms or PLATFORMS:
        found = child(platform, names, options.topology)
        if options.topology != TOPOLOGY:  # the page is of one
            print(json.dumps(found, indent=1))
            continue
        layouts = {**kept.get(platform, {}).get("layouts", {}), **found["layouts"]}
        kept[platform] = {**found, "layouts": {name: layouts[name] for name in LAYOUTS if name in layouts}}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()

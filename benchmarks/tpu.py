"""The training step of the recipe `text`, compiled for TPUs without having them, compared with MaxText's.

    python benchmarks/tpu.py [--topology v5e:4x4] [--mesh fsdp=-1] [--size 1.7b] [--policy full] [--set depth=6 ...]

Needs libtpu (`pip install ".[plan]"`) but no TPU. The step that `Trainer.fit` runs is lowered with the shardings of its
state and compiled by the TPU's compiler, in a new process. Prints the bytes of each chip (arguments: the training state
and the batch; temporaries: everything else at the peak), the collectives and kernels of the compiled program, and the
time to compile it. The result is written to benchmarks/results/tpu.json.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "tpu.json"
GIB = 2**30

# MaxText's own such compile, August 2026: width 2,048, 24 layers, 16 heads of 128, gated MLP 8,192, vocabulary 32,000,
# untied, float32 parameters, bfloat16 compute, AdamW, batch 64 x 2,048, FSDP over 16 chips of v5e:4x4.
MAXTEXT = {"full": {"arguments": 1.22, "temporaries": 4.27}, "minimal": {"arguments": 1.22, "temporaries": 13.50}}

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def arguments(words=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4", help="kind:shape, or v5litepod-16; default: %(default)s")
    parser.add_argument("--slices", type=int, default=1, help="how many of it; default: %(default)s")
    parser.add_argument("--mesh", default="fsdp=-1", help="default: %(default)s")
    parser.add_argument("--size", default="1.7b", help="a size of the recipe `text`; default: %(default)s")
    parser.add_argument("--policy", choices=("full", "minimal", "none"), default="full", help="of remat")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="other fields of the recipe")
    parser.add_argument("--hlo", type=Path, help="write the compiled program there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--here", action="store_true", help="compile in this process, whose environment is right")
    return parser.parse_args(words)


def compiled(options: argparse.Namespace) -> dict:
    """Compile the training step; returns its bytes, collectives, kernels and seconds.

    It runs in the child, whose environment makes libtpu work without a TPU.
    """
    import jax

    import sapwood as sw
    from sapwood.parallel.topologies import topology
    from sapwood.recipes.language.text import Text
    from sapwood.train.state import plan as state_plan

    fields = {name: int(value) for name, value in (pair.split("=") for pair in options.set)}
    recipe = Text(size=options.size, remat=options.policy, **fields)
    devices = topology(options.topology, options.slices)
    trainer = recipe.trainer(1000, mesh=sw.mesh(options.mesh, devices=devices))
    shape = (recipe.batch_size, recipe.length)
    batch = {x: jax.ShapeDtypeStruct(shape, "int32", sharding=trainer.batch_sharding) for x in ("tokens", "targets")}
    plan = state_plan.plan(trainer, batch)
    start = time.perf_counter()
    lowered = trainer.compiled.train(plan.shardings).lower(plan.shapes, batch)
    between = time.perf_counter()
    program = lowered.compile()
    end, memory, text = time.perf_counter(), program.memory_analysis(), program.as_text()
    if options.hlo:
        options.hlo.write_text(text)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "chips": len(devices),
        "device": devices[0].device_kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(plan.shapes.params)),
        "batch": list(shape),
        "bytes": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs beside the state": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        },
        "collectives": dict(Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text))),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "seconds": {"lower": round(between - start, 1), "compile": round(end - between, 1),
                    "cpu": round(used.ru_utime + used.ru_stime, 1)},
        "host_bytes": used.ru_maxrss * 1024,
        "versions": {"jax": jax.__version__, "libtpu": _version()},
    }  # fmt: skip


def _version() -> str:
    from importlib.metadata import version

    return version("libtpu")


def measure(options: argparse.Namespace) -> dict:
    """The result of `compiled` in a new process. An error there ends this process too."""
    from sapwood.parallel.topologies import ENVIRONMENT

    words = [
        "--slices",
        str(options.slices),
        "--topology",
        options.topology,
        "--mesh",
        options.mesh,
        "--size",
        options.size,
        "--policy",
        options.policy,
    ]
    words += ["--set", *options.set] + (["--hlo", str(options.hlo)] if options.hlo else [])
    child = subprocess.run(
        [sys.executable, __file__, "--here", *words], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        raise SystemExit(f"error: {lines[-1] if lines else f'the compile ended with {child.returncode}'}")
    return json.loads(child.stdout.splitlines()[-1])


def show(found: dict, theirs: dict | None) -> str:
    """The result as text. ``theirs`` are MaxText's figures in GiB, or None if they are for another model."""
    lines = [f"{found['parameters']:,} parameters, batch {' x '.join(map(str, found['batch']))}, "
             f"{found['chips']} chips of {found['device']}", "", f"{'GiB per chip':26}{'Sapwood':>9}"]  # fmt: skip
    lines[-1] += f"{'MaxText':>9}" if theirs else ""
    for name, size in found["bytes"].items():
        beside = f"{theirs[name]:9.2f}" if theirs and name in theirs else ""
        lines.append(f"  {name:24}{size / GIB:9.3f}{beside}")
    counts = ", ".join(f"{count} {name}" for name, count in sorted(found["collectives"].items())) or "none"
    seconds = found["seconds"]
    lines += ["", f"collectives: {counts}", f"Pallas kernels: {found['kernels']}",
              f"lowered in {seconds['lower']} s, compiled in {seconds['compile']} s ({seconds['cpu']} s of CPU), "
              f"{found['host_bytes'] / GIB:.2f} GiB of host memory"]  # fmt: skip
    return "\n".join(lines)


def main(words=None) -> None:
    options = arguments(words)
    if options.here:
        print(json.dumps(compiled(options)))
        return
    found = measure(options)
    reference = (
        options.size == "1.7b" and options.topology == "v5e:4x4" and options.slices == 1 and options.mesh == "fsdp=-1"
    )
    theirs = MAXTEXT.get(options.policy) if reference and not options.set else None
    print(show(found, theirs))
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    where = options.topology if options.slices == 1 else f"{options.slices} x {options.topology}"
    name = " ".join([options.size, *options.set, options.policy, where, options.mesh])
    kept[name] = {**found, **({"maxtext_gib": theirs} if theirs else {})}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

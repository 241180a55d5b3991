"""Causal ring attention, forward and backward, over a sequence too long for one device.

    python benchmarks/long_context.py [--length 131072] [--devices 8] [--heads 1] [--head-dim 64] [--way ring]

Runs in float32 on simulated CPU devices in one process. Prints seconds, FLOP/s, and the peak resident memory of the
process, which is that of all devices together. The attention scores would be 64 GiB at the default length.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

GIB = 2**30

# One process may wait long for the devices that share its cores: a hop of the ring must not be taken for stuck.
PATIENCE = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=3600 " \
    "--xla_cpu_collective_call_terminate_timeout_seconds=7200 --xla_cpu_collective_timeout_seconds=7200"  # fmt: skip


def arguments(words=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131_072, help="tokens; default: %(default)s")
    parser.add_argument("--devices", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--heads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--way", choices=("ring", "ulysses"), default="ring", help="default: %(default)s")
    parser.add_argument("--block", type=int, help="queries and keys of a block, at most")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    return parser.parse_args(words)


def peak() -> float:
    """The largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def measure(options: argparse.Namespace) -> dict:
    """Compile once and run once. The gradient is for the output weighted by a random array."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    import sapwood as sw
    from sapwood import layers as L
    from sapwood.layers.attentions import ring

    if options.block:
        ring.BLOCK = options.block
    sharding = NamedSharding(sw.mesh(f"sequence={options.devices}"), PartitionSpec(None, "sequence", None, None))
    attend = {"ring": L.ring_attention, "ulysses": L.ulysses_attention}[options.way]
    shape = (1, options.length, options.heads, options.head_dim)

    @jax.jit
    def forward_and_backward(q, k, v, dy):
        y, pull = jax.vjp(lambda *x: attend(*x, True, None, sharding), q, k, v)
        return y, *pull(dy)

    draw = jax.jit(lambda key: jax.random.normal(key, shape), out_shardings=sharding)
    arrays = [draw(key) for key in jax.random.split(jax.random.key(0), 4)]
    start = time.perf_counter()
    program = forward_and_backward.lower(*arrays).compile()
    between = time.perf_counter()
    idle, used = peak(), time.process_time()
    results = jax.block_until_ready(program(*arrays))
    end = time.perf_counter()
    assert all(bool(jax.numpy.isfinite(x).all()) for x in results)
    flops = 7 * options.length**2 * options.head_dim * options.heads  # 2 products forward, 5 backward, half of each
    return {
        "way": options.way,
        "length": options.length,
        "devices": options.devices,
        "seconds to compile": round(between - start, 1),
        "seconds": round(end - between, 1),
        "CPU seconds": round(time.process_time() - used, 1),
        "GFLOP/s": round(flops / (end - between) / 1e9, 1),
        "peak resident GiB": round(peak(), 2),
        "before the run": round(idle, 2),
    }


def main() -> None:
    options = arguments()
    flags = f"--xla_force_host_platform_device_count={options.devices} {PATIENCE}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    numbers = measure(options)
    print(*(f"{name}: {value}" for name, value in numbers.items()), sep="\n")
    if options.out:
        options.out.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The benchmark of GPUs where there is none: its formulas, what is refused and lowered, and a tiny race on a CPU."""

import dataclasses
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from benchmarks import gpu, race
from benchmarks.ratios import Interval
from benchmarks.suite import find
from benchmarks.suites.gpu import ROWS, SIZES, SUITES, WARM, Enough, Rows, made, steps
from benchmarks.systems import build, floor
from benchmarks.work import Work, prepare
from sapwood.runtime import compile_options

CPU = {"platform": "cpu", "name": "cpu", "torch": "cpu", "product": 0.05}
H100 = {"platform": "gpu", "name": "NVIDIA H100 80GB HBM3", "torch": "cuda", "product": 700.0}


def small(**config):
    """The tiny race, smaller."""
    suite, sizes = made("tiny", 4), {"layers": 2, "width": 16, "heads": 2, "tokens": 8, "vocabulary": 48}
    return dataclasses.replace(suite, config={**suite.config, **sizes, **config}, epoch=10)


@pytest.fixture
def work(tmp_path):
    """The files of a small race, as a system sees them."""

    def prepared(system="floor", **config):
        prepare(small(**config), tmp_path)
        return Work(small(**config), system, tmp_path)

    return prepared


@pytest.fixture
def floor_loss(monkeypatch):
    """The floor's loss, not the step around it."""
    monkeypatch.setattr(floor, "train", lambda work, loss, optimizer: loss)
    return floor.gpt


def products(jaxpr):
    """Operations of the matrix products in a jaxpr, however deep."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = np.prod([equation.invars[0].aval.shape[dim] for dim in contracted])
            total += 2 * int(inner) * equation.outvars[0].aval.size
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(value, "eqns"):
                total += products(getattr(value, "jaxpr", value))
    return total


def test_the_formulas_count_what_the_floor_multiplies(work, floor_loss):
    """Each weight of a product six times a token; attention twelve times, of which a causal kernel leaves half."""
    work = work(layers=3, tokens=24)
    c = work.config
    assert gpu.parameters(c) == sum(leaf.size for leaf in jax.tree.leaves(work.weights))
    found = products(jax.make_jaxpr(jax.grad(floor_loss(work)))(work.weights, *work.pairs()[0]).jaxpr)
    half = 6 * c["layers"] * c["width"] * c["tokens"]
    assert found == c["batch"] * c["tokens"] * (gpu.flops_per_token(c) + half)
    assert gpu.usual_flops_per_token(c) == 6 * gpu.parameters(c) + 2 * half


def test_the_model_has_about_350_million_parameters():
    c = SIZES["350m"]
    assert gpu.parameters(c) == 353_593_344
    assert c["width"] // c["heads"] == 64
    assert gpu.flops_per_token(c) < gpu.usual_flops_per_token(c)


def test_each_race_is_found_by_its_name():
    assert [find(suite.name) for suite in SUITES] == list(SUITES)
    assert len({suite.name for suite in SUITES}) == len(SUITES)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_published_peaks(kind, peak):
    assert gpu.published(kind) == peak


def test_a_product_has_a_speed():
    assert gpu.product(64, windows=2, times=2) > 0


def test_shares_of_the_peak_and_the_goal():
    suite = made("350m", 16)
    each = gpu.flops_per_token(suite.config) * 16 * 1024 / 1e12  # of a step, in TFLOP
    rounds = [{"floor": {"step": each / x}, "sapwood": {"step": each / x}} for x in (480.0, 500.0, 520.0)]
    measured = {"rounds": rounds}
    assert gpu.shares(suite, measured, 1000.0)["sapwood"] == Interval(*(pytest.approx(x) for x in (0.5, 0.48, 0.52)))
    header, *rows = gpu.table(suite, measured, {"published": 1000.0, "measured": 800.0})
    assert header[-2:] == ["of the published peak", "of the measured peak"]
    step, tokens = gpu.report.duration(each / 500), f"{16 * 1024 * 500 / each:,.0f}"
    assert rows[1] == ["sapwood", step, tokens, "500", "50.0%", "62.5%"]
    said = gpu.verdict(suite, measured, {"published": 1000.0, "measured": 800.0})
    assert said == "sapwood at 50.0% (48.0% to 52.0%) of the published peak, at least 50%: not met"
    assert gpu.verdict(suite, measured, {"measured": 800.0}).endswith("of the measured peak, at least 50%: met")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no GPU: JAX sees cpu (cpu); --size tiny --anywhere tries the script"),
        (["--batch", "3"], "--batch for 350m is one of 1, 2, 4, 8, 16, 32, 64"),
        (["--against", "floor,keras"], "--against knows floor and torch-compile, not floor,keras"),
        (["--rounds", "0"], "at least one round is expected"),
    ],
)
def test_what_cannot_be_asked_is_one_line(words, said, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "ask_chip", lambda: CPU)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(SystemExit) as ended:
        gpu.main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_pytorch_takes_part_where_it_has_the_gpu(capsys):
    both = ("floor", "torch-compile")
    assert gpu.takes_part("torch-compile", both, H100)
    assert gpu.takes_part("torch-compile", both, CPU)
    assert not gpu.takes_part("torch-compile", ("floor",), H100)
    assert capsys.readouterr().err == ""
    assert not gpu.takes_part("torch-compile", both, {**H100, "torch": "cpu"})
    assert capsys.readouterr().err == "left out: torch-compile (PyTorch here: cpu; JAX: gpu)\n"
    assert gpu.takes_part("sapwood", ("floor",), H100)


def test_a_process_runs_its_rows_and_ends(monkeypatch):
    class Job:
        def losses(self, count):
            return [1.0] * count

        def rounds(self, channel, count):
            for n in range(100):
                channel.wait()
                channel.report(seconds={"step": 100.0 if n < WARM else float(n)})

    monkeypatch.setattr("benchmarks.systems.build", lambda work: Job())
    found = steps(SimpleNamespace(suite=small()))
    assert found == {"losses": [1.0] * 10, "seconds": {"step": WARM + (ROWS - 1) / 2}}
    rows = Rows()
    for _ in range(WARM + ROWS):
        rows.wait()
        rows.report(seconds={"step": 1.0})
    with pytest.raises(Enough):
        rows.wait()


@pytest.mark.parametrize(
    "system",
    [
        pytest.param("sapwood-step", marks=pytest.mark.slow),
        pytest.param("sapwood", marks=pytest.mark.slow),
        *(pytest.param(peer, marks=pytest.mark.long) for peer in ("torch", "torch-compile")),
    ],
)
def test_in_bfloat16_all_do_the_same_work(work, system):
    if not race.installed(system):
        pytest.skip(f"{system} is not installed")
    losses = {name: build(work(name, layers=1)).losses(5) for name in ("floor", system)}
    race.agree(small(), losses)
    assert len(set(losses["floor"])) == 5


@pytest.mark.parametrize("system", ["floor", "sapwood-step"])
def test_weights_are_float32_and_products_bfloat16(work, system, monkeypatch):
    monkeypatch.setattr(compile_options, "compiled", lambda traced, platform: None)  # it is lowered here, and not run
    program = build(work(system, layers=1)).lower().as_text()
    kinds = re.findall(r"stablehlo\.dot_general.* -> tensor<[\dx]*x(\w+)>", program)
    assert kinds.count("bf16") > 0.8 * len(kinds)  # attention sums its scores in float32
    weights = re.search(r"@main\((.*?)\) ->", program, re.DOTALL)
    assert weights is not None
    assert "bf16" not in weights[1]
    assert "bf16" not in build(work(system, layers=1, compute="float32")).lower().as_text()


def test_on_a_gpu_both_run_cudnns_attention(work, floor_loss, monkeypatch):
    """Lowered for CUDA: a kernel forward and one backward for each block, in the floor and in Sapwood's step."""
    sizes = {"tokens": 128}
    job = build(work("sapwood", **sizes))
    batch = dict(zip(("tokens", "targets"), job.work.pairs()[0], strict=True))
    device, devices = SimpleNamespace(platform="gpu", compute_capability="9.0"), jax.local_devices
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: devices(backend=backend) if backend else [device])
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    def kernels(run, *xs):
        program = jax.jit(run).trace(*xs).lower(lowering_platforms=("cuda",)).as_text()
        assert "128x128" not in program
        return sorted(re.findall(r"custom_call @(__cudnn\$\w+)", program))

    expected = sorted(2 * ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"])
    assert kernels(jax.grad(floor_loss(job.work)), job.work.weights, *job.work.pairs()[0]) == expected
    assert kernels(job.trainer.step, job.state, batch) == expected


def run(root, *words):
    return subprocess.run(
        [sys.executable, str(root / "benchmarks" / "gpu.py"), *words], capture_output=True, text=True
    )  # fmt: skip


@pytest.mark.slow
def test_without_a_gpu_it_says_so(root):
    done = run(root)
    assert done.returncode == 2
    assert done.stderr == "error: no GPU: JAX sees cpu (cpu); --size tiny --anywhere tries the script\n"


TINY = ("--size", "tiny", "--anywhere", "--against", "floor", "--out")


def check_race(path, shown):
    """What a tiny race wrote, and what it said."""
    found = json.loads(path.read_text())
    measured = found["race"]
    assert [set(r) for r in measured["rounds"]] == [{"floor", "floor again", "sapwood", "sapwood-step"}]
    assert all(x["step"] > 0 for x in measured["rounds"][0].values())
    assert len(measured["losses"]["sapwood"]) == 10
    assert found["parameters"] == gpu.parameters(SIZES["tiny"])
    assert found["machine"]["platform"] == "cpu"
    assert set(found["shares"]) == {"measured"}
    assert "tokens/s" in shown
    assert found["goal"] in shown


@pytest.mark.slow
def test_a_tiny_race_in_one_process(tmp_path, capsys, monkeypatch):
    """All but the start of a process for each measurement: what a process does is done here."""

    class Child:
        def __init__(self, suite, system, directory, threads):
            self.begun, self.suite, self.work = 0.0, suite, Work(suite, system, directory)

        def answer(self):
            return json.loads(json.dumps(self.suite.once(self.work)))

        def end(self):
            pass

    monkeypatch.setattr(race, "Child", Child)
    monkeypatch.setattr(gpu, "ask_chip", lambda: CPU)
    monkeypatch.setattr("benchmarks.suites.gpu.ROWS", 1)
    monkeypatch.setitem(SIZES, "tiny", {**SIZES["tiny"], "layers": 1, "width": 16, "tokens": 8, "vocabulary": 48})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert gpu.main([*TINY, str(tmp_path / "gpu.json")]) == 0
    check_race(tmp_path / "gpu.json", capsys.readouterr().out)


@pytest.mark.long
def test_a_tiny_race(root, tmp_path):
    done = run(root, *TINY, str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    check_race(tmp_path / "gpu.json", done.stdout)

"""Files as Sapwood wrote them before its modules moved (commit 57fa89a): artifacts, a run stopped midway, references.

    python tests/goldens/earlier_files.py earlier.zip     # with an installation of that commit

`tests/saving/test_earlier_files.py` opens them, resumes the run and predicts. `expected.json` holds what that commit
said of them. The digests of trained arrays depend on the machine that trains; those of saved ones do not.
"""

import json
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import jax
import numpy as np

import sapwood as sw
from sapwood import layers as L
from sapwood.core import initializers
from sapwood.models import Decoder
from sapwood.recipes import find

RECIPE = ["digits-mlp", "--hidden", "4", "--epochs", "3", "--validation", "0.2", "--best", "max:validation_accuracy"]


def image_model():
    normal = initializers.normal(0.1)
    return L.Sequential(
        (
            L.Conv(3, (3, 3), kernel_init=initializers.he_normal()),
            L.BatchNorm(),
            L.GroupNorm(3),
            jax.nn.gelu,
            L.flatten,
            L.Dense(6, kernel_init=normal),
            L.LayerNorm(),
            L.Dropout(0.25),
            L.RMSNorm(),
            L.Dense(4, bias=False),
        )
    )


def text_model():
    return Decoder(vocabulary=11, depth=2, width=8, heads=2, kv_heads=1, experts=2, k=1, mlp=4)


def inputs():
    rng = np.random.default_rng(17)
    image = rng.normal(size=(2, 6, 6, 1)).astype("float32")
    return {
        "image": image,
        "text": rng.integers(0, 11, (2, 5)),
        "digits": rng.integers(0, 16, (4, 8, 8, 1)).astype("uint8"),
    }


def names() -> dict[str, str]:
    """How each public name was written down: layers, array functions, initialisers, models, recipes."""
    found = {}
    for room, all_names in ((L, L.__all__), (sw.models, ["Decoder"]), (initializers, dir(initializers))):
        for name in all_names:
            one = getattr(room, name)
            if name.startswith("_") or not callable(one) or not one.__module__.startswith("sapwood"):
                continue
            named = one if hasattr(one, "__qualname__") else type(one)
            found[f"{room.__name__}:{named.__qualname__}"] = f"{named.__module__}:{named.__qualname__}"
    for name in ("digits", "digits-mlp", "text"):
        kind = type(find(name)) if not isinstance(find(name), type) else find(name)
        found[f"recipe {name}"] = f"{kind.__module__}:{kind.__qualname__}"
    return found


def main(out: str) -> None:
    place, given, expected = Path(tempfile.mkdtemp()), inputs(), {"names": names()}
    for name, model in (("image", image_model()), ("text", text_model())):
        params, state = sw.init(model, 0, given[name])
        sw.save(place / name, params, state, model=model, extra={"of": name})
        expected[name] = predicted(place / name, given[name])
    run = place / "run"
    stop_midway(run)
    files = {name: data for name, data in read(run, "run").items() if "tensorboard" not in name}
    ended = subprocess.run([*train(run), "--resume"], capture_output=True, text=True, check=True)
    expected["digest"] = ended.stdout.split()[-1]
    expected["rows"] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected["digits"] = predicted(run / "model", given["digits"])
    files |= read(place / "image", "image") | read(place / "text", "text") | read(run / "model", "ended")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("expected.json", json.dumps(expected))
        for name, data in files.items():
            file.writestr(name, data)


def predicted(path: Path, x: np.ndarray) -> list:
    artifact = sw.load(path)
    return np.asarray(sw.apply(artifact.model, artifact.params, artifact.state, x)[0]).tolist()


def train(run: Path) -> list[str]:
    return [sys.executable, "-m", "sapwood", "train", *RECIPE, "--run", str(run)]


def stop_midway(run: Path) -> None:
    """Train, and end it after its first row as a scheduler does."""
    process = subprocess.Popen(train(run), stdout=subprocess.PIPE, text=True)
    rows = run / "metrics.jsonl"
    for _ in process.stdout:
        if rows.exists() and rows.stat().st_size:
            process.send_signal(signal.SIGTERM)
            break
    process.communicate()
    assert process.returncode == 143, process.returncode


def read(folder: Path, name: str) -> dict[str, bytes]:
    return {f"{name}/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


if __name__ == "__main__":
    main(sys.argv[1])

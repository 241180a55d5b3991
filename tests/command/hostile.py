"""Files as a stranger may make them: what each is, how it is made, and how a user would open it.

`CASES` maps a name to (what opens it, what makes it). A maker gets an empty folder and `base`, a folder with a run "r",
an artifact "model" and a prepared data set "data", all of which it may copy; it gives the path to open. Code that would
run writes to the file that `MARK` names.
"""

import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sapwood as sw
from sapwood.__main__ import main
from sapwood.runtime.compile_cache import compile_cache
from sapwood.saving import checksummed_json

MARK = "ran.txt"
CASES: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {}
EVIL = f"from pathlib import Path\nPath(__file__).with_name({MARK!r}).touch()\n"


def case(opener: str, name: str) -> Callable:
    def keep(make: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        assert name not in CASES
        CASES[name] = (opener, make)
        return make

    return keep


def opened(opener: str, path: Path, base: Path) -> Any:
    """Open it as a user would; a command's exit code is given back."""
    if opener == "artifact":
        artifact = sw.load(path)
        return artifact if artifact.reference is None else (artifact, artifact.model)
    if opener == "data":
        data = sw.data.load(path)
        return data.gather(range(min(4, len(data))))
    if opener == "image":
        return sw.data.decode_image(path)
    if opener == "cache":
        import jax

        with compile_cache(path):
            return jax.jit(lambda x: x * 3 + 1)(2.0)
    if opener == "predict":
        return main(["predict", str(path), str(base / "grey.png")])
    return main([opener, str(path)])


# ---- artifacts


def _artifact(name: str, change: Callable[[dict], Any]) -> None:
    """An artifact whose description was changed and sealed again."""

    @case("artifact", f"artifact: {name}")
    def make(folder: Path, base: Path) -> Path:
        path = Path(shutil.copytree(base / "model", folder / "model"))
        about = checksummed_json.read(path / "artifact.json")
        about = change(about) or about
        (path / "artifact.json").write_text(checksummed_json.seal(about))
        (folder / "evil.py").write_text(EVIL)
        return path


def _model(**written: Any) -> Callable[[dict], None]:
    return lambda about: about.update(model=written)


_array = "params/kernel"
_inside = {"name": "sapwood.layers.compose.sequential:Sequential", "options": {"layers": {"tuple": [
    {"model": {"name": "sapwood.saving.artifact:os.system"}}]}}}  # fmt: skip
for _name, _change in {
    "an attribute of a module": _model(name="sapwood.saving.artifact:os.system"),
    "a shell": _model(name="subprocess:getoutput", options={"cmd": f"touch {MARK}"}),
    "a layer of a shell": _model(**_inside),
    "an import": _model(name="evil:network"),
    "an import from the standard library": _model(name="antigravity:fly"),
    "a file": _model(name="sapwood_recipe_evil:Evil", file="evil.py"),
    "a class with options it has not": _model(name="sapwood.layers.linear.dense:Dense", options={"__class__": 1}),
    "a class with options of other types": _model(name="sapwood.layers.linear.dense:Dense", options={"features": "x"}),
    "a model that is a number": lambda about: about.update(model=7),
    "a model that is text": lambda about: about.update(model="sapwood.layers:Dense"),
    "a model without a name": _model(options={}),
    "a name that is a list": _model(name=["a"]),
    "options that are a list": _model(name="sapwood.layers.linear.dense:Dense", options=[1]),
    "an array without elements of 10^8 rows": lambda about: about["arrays"].update(
        {"params/empty": ["float32", [10**8, 0], "0" * 32]}
    ),
    "an array that claims 10^12": lambda about: about["arrays"].update({_array: ["float32", [10**12], "0" * 32]}),
    "a shape below 0": lambda about: about["arrays"].update({_array: ["float32", [-1, 3], "0" * 32]}),
    "a shape of text": lambda about: about["arrays"].update({_array: ["float32", ["2", 3], "0" * 32]}),
    "a shape of 10^5 dimensions": lambda about: about["arrays"].update({_array: ["float32", [1] * 10**5, "0" * 32]}),
    "a dtype that is none": lambda about: about["arrays"].update({_array: ["floof", [2, 3], "0" * 32]}),
    "a dtype of objects": lambda about: about["arrays"].update({_array: ["object", [2, 3], "0" * 32]}),
    "a digest that is a number": lambda about: about["arrays"].update({_array: ["float32", [2, 3], 5]}),
    "arrays that are a list": lambda about: about.update(arrays=[1]),
    "an array inside another": lambda about: about["arrays"].update({f"{_array}/x": ["float32", [1], "0" * 32]}),
    "an array of another kind": lambda about: about["arrays"].update({"code/x": ["float32", [1], "0" * 32]}),
    "classes that are a number": lambda about: about.update(classes=5),
    "classes of lists": lambda about: about.update(classes=[[1]]),
    "features that are text": lambda about: about.update(features="x"),
    "a feature of text": lambda about: about.update(features={"label": "int32"}),
    "a feature with another field": lambda about: about.update(features={"x": {"shape": [], "dtype": "f4", "run": 1}}),
    "a feature with a dtype that is none": lambda about: about.update(features={"x": {"shape": [], "dtype": "evil"}}),
    "10^15 classes": lambda about: about.update(
        features={"label": {"shape": [], "dtype": "int32", "num_classes": 10**15}}
    ),
    "a format that is text": lambda about: about.update(format="1"),
    "a format of the future": lambda about: about.update(format=99),
    "nothing": lambda about: {"format": 1},
    "extra is a list": lambda about: about.update(extra=[1]),
}.items():
    _artifact(_name, _change)


def _artifact_file(name: str, write: Callable[[Path], Any], file: str = "artifact.json") -> None:
    @case("artifact", f"artifact: {name}")
    def make(folder: Path, base: Path) -> Path:
        path = Path(shutil.copytree(base / "model", folder / "model"))
        (path / file).unlink()
        write(path / file)
        return path


_artifact_file("a pipe", os.mkfifo)
_artifact_file("weights that are a pipe", os.mkfifo, "model.safetensors" if False else "weights.safetensors")
_artifact_file("weights that are /dev/zero", lambda path: path.symlink_to("/dev/zero"), "weights.safetensors")
_artifact_file("is /dev/zero", lambda path: path.symlink_to("/dev/zero"))
_artifact_file("a folder", lambda path: path.mkdir())
_artifact_file("weights that are a folder", lambda path: path.mkdir(), "weights.safetensors")
_artifact_file("lists in lists", lambda path: path.write_text("[" * 10**6))
_artifact_file("40 MB of JSON", lambda path: path.write_text("[" + "[]," * (13 << 20) + "1]"))
_artifact_file("a list", lambda path: path.write_text("[1]"))
_artifact_file("bytes", lambda path: path.write_bytes(bytes(range(256))))
_artifact_file("a number of 10^6 digits", lambda path: path.write_text("1" * 10**6))
_artifact_file("a header of 2^60 bytes", lambda p: p.write_bytes(struct.pack("<Q", 2**60)), "weights.safetensors")
_artifact_file("a pickle", lambda path: path.write_bytes(b"cos\nsystem\n(S'touch ran.txt'\ntR."), "weights.safetensors")


# ---- run directories and their configs


def _run(opener: str, name: str, change: Callable[[dict, Path], Any], file: str | None = None) -> None:
    """A run directory whose config was changed and sealed again, with a recipe inside it."""

    @case(opener, f"{opener}: {name}")
    def make(folder: Path, base: Path) -> Path:
        run = Path(shutil.copytree(base / "r", folder / "r"))
        (run / "evil.py").write_text(EVIL)
        config = checksummed_json.read(run / "config.json")
        checksummed_json.write(run / "config.json", change(config, run) or config)
        return run


for _opener in ("evaluate", "predict"):
    for _name, _change in {
        "a recipe inside": lambda config, run: config.update(recipe=str(run / "evil.py")),
        "a recipe inside, by a short path": lambda config, run: config.update(recipe="r/evil.py"),
        "a recipe that is a pipe": lambda config, run: config.update(recipe=str(_pipe(run / "p.py"))),
        "a recipe that is a module": lambda config, run: config.update(recipe="antigravity"),
        "another recipe's options": lambda config, run: config.update(recipe="text"),
        "options of other types": lambda config, run: config["options"].update(hidden="8"),
        "an option of 10^400": lambda config, run: config["options"].update(batch_size=10**400),
        "an option of 10^12": lambda config, run: config["options"].update(batch_size=10**12),
        "a layer of 10^12": lambda config, run: config["options"].update(hidden=10**12),
        "a layer of 10^9": lambda config, run: config["options"].update(hidden=10**9),
        "features of text": lambda config, run: config.update(features={"image": "x"}),
        "features of another kind": lambda config, run: config["features"].update(image={"shape": 3, "dtype": "x"}),
        "a picture of 10^12 pixels": lambda config, run: config["features"]["image"].update(shape=[10**6, 10**6, 1]),
        "no features": lambda config, run: config.update(features={}),
        "a config with a recipe inside": lambda config, run: dict(recipe=f"{run}/evil.py", options={}, features={}),
    }.items():  # fmt: skip
        _run(_opener, _name, _change)


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _config_file(name: str, write: Callable[[Path], Any]) -> None:
    @case("evaluate", f"config: {name}")
    def make(folder: Path, base: Path) -> Path:
        run = Path(shutil.copytree(base / "r", folder / "r"))
        (run / "config.json").unlink()
        write(run / "config.json")
        return run


_config_file("a pipe", os.mkfifo)
_config_file("a folder", lambda path: path.mkdir())
_config_file("lists in lists", lambda path: path.write_text('{"a":' * 10**5))
_config_file("a number of 10^6 digits", lambda path: path.write_text("1" * 10**6))
_config_file("is /dev/zero", lambda path: path.symlink_to("/dev/zero"))
_config_file("bytes that are no text", lambda path: path.write_bytes(b"\xff\xfe{"))


# ---- data folders


def _data(name: str, change: Callable[[Path], Any]) -> None:
    @case("data", f"data folder: {name}")
    def make(folder: Path, base: Path) -> Path:
        path = Path(shutil.copytree(base / "data", folder / "data"))
        (folder / "evil_features.py").write_text(EVIL + "class Evil: pass\n")
        change(path)
        return path


def _features(said: Any) -> Callable[[Path], Any]:
    return lambda path: (path / "features.json").write_text(json.dumps(said))


def _info(**changes: Any) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        said = json.loads((path / "dataset_info.json").read_text())
        (path / "dataset_info.json").write_text(json.dumps(said | changes))

    return change


_dict = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
for _name, _said in {
    "a class of its choosing": {"pythonClassName": "evil_features.Evil", "jsonFeature": {"json": "{}"}},
    "a class of its choosing, by another key": {"python_class_name": "evil_features.Evil"},
    "a class as it was written once": {"type": "evil_features.Evil", "content": {}},
    "a class inside": {"type": _dict, "content": {"x": {"type": "evil_features.Evil", "content": {}}}},
    "the class of a module of Python": {"type": "antigravity.Fly", "content": {}},
    "a list": [1],
    "nothing": {},
    "text for a class": {"type": 5, "content": {}},
}.items():
    _data(_name, _features(_said))
_data("a class in its description", _info(features={"pythonClassName": "evil_features.Evil"}))
_data("10^15 examples", _info(splits=[{"name": "train", "shardLengths": [str(10**15)], "numBytes": "9"}]))
_data("a format that is none", _info(fileFormat="evil"))
_data("features that are a pipe", lambda path: (path / "features.json").unlink() or os.mkfifo(path / "features.json"))
_data("a description that is no JSON", lambda path: (path / "dataset_info.json").write_text("{"))
_data("records that are noise", lambda path: [p.write_bytes(b"noise" * 99) for p in path.glob("*-of-*")])
_data("records that are a pipe", lambda path: [p.unlink() or os.mkfifo(p) for p in path.glob("*-of-*")])


# ---- tables and arrays


def _file(name: str, file: str, write: Callable[[Path], Any], opener: str = "data") -> None:
    @case(opener, f"{opener} file: {name}")
    def make(folder: Path, base: Path) -> Path:
        write(folder / file)
        return folder / file


def _npz(path: Path, header: str, body: bytes = b"", times: int = 1) -> None:
    """An .npz with one array of that header; its body may be written many times over."""
    text = header.encode().ljust(118) + b"\n"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
        packed.open("x.npy", "w", force_zip64=True) as part,
    ):
        part.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
        for _ in range(times):
            part.write(body)


def _object(path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {path.with_name(MARK)}",)

    np.savez(path, x=np.array([Runs()], object))


def _header(dtype: str, shape: str) -> str:
    return f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"


def _constant(path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    zeros = pa.array(np.zeros(1 << 20))
    with parquet.ParquetWriter(path, pa.schema([("x", pa.float64())])) as writer:
        for _ in range(100):
            writer.write_table(pa.table({"x": zeros}))


_file("a pickle in an array", "x.npz", _object)
_file(
    "1 MB of array that unpacks to 1 GB",
    "x.npz",
    lambda p: _npz(p, _header("|u1", f"({1 << 30},)"), bytes(1 << 20), 1 << 10),
)
_file(
    "an array that claims 10^15",
    "x.npz",
    lambda path: _npz(path, _header("<f8", "(10**15,)".replace("10**15", str(10**15)))),
)
_file("an array of 10^10 examples of nothing", "x.npz", lambda path: _npz(path, _header("<f8", f"({10**10}, 0)")))
_file("an array whose header is code", "x.npz", lambda path: _npz(path, "__import__('os').system('touch ran.txt')"))
_file("an array that is a pipe", "x.npz", os.mkfifo)
_file("a table that is a pipe", "x.csv", os.mkfifo)
_file("a table that is /dev/zero", "x.csv", lambda path: path.symlink_to("/dev/zero"))
_file(
    "a table of 10^6 columns",
    "x.csv",
    lambda path: path.write_text(",".join("abc" for _ in range(10**6)) + "\n" + "1," * 999999 + "1"),
)
_file("a table that is one line of 70 MB", "x.csv", lambda path: path.write_bytes(b"x" * (70 << 20)))
_file("a table of zeros", "x.csv", lambda path: path.write_bytes(bytes(10**5)))
_file("a table of quotes", "x.csv", lambda path: path.write_text("a,b\n" + '"' * 10**5))
_file("a Parquet file of 10^8 zeros", "x.parquet", _constant)
_file("a Parquet file that is none", "x.parquet", lambda path: path.write_bytes(b"PAR1" + bytes(99) + b"PAR1"))
_file("a Parquet file that is a pipe", "x.parquet", os.mkfifo)


# ---- images


def _png(path: Path, width: int, height: int, rows: bool = True) -> None:
    """A PNG of that size, black, of one bit a pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer, body = zlib.compressobj(9), b""
    for _ in range(height if rows else 0):
        body += packer.compress(bytes(1 + (width + 7) // 8))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body + packer.flush()) + chunk(b"IEND", b"")
    )


_EPS = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(ran.txt) (w) file closefile showpage\n%%EOF\n"
_file("a pipe", "x.png", os.mkfifo, "image")
_file("is /dev/zero", "x.png", lambda path: path.symlink_to("/dev/zero"), "image")
_file("PostScript", "x.png", lambda path: path.write_text(_EPS), "image")
_file("30,000 x 30,000 pixels", "x.png", lambda path: _png(path, 30000, 30000, rows=False), "image")
_file("13,000 x 13,000 pixels", "x.png", lambda path: _png(path, 13000, 13000), "image")
_file("2^31 x 2^31 pixels", "x.png", lambda path: _png(path, 2**31 - 1, 2**31 - 1, rows=False), "image")
_file(
    "noise after a header",
    "x.jpg",
    lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 20),
    "image",
)
_file("a TIFF that points at itself", "x.tif", lambda path: path.write_bytes(b"II*\0\x08\0\0\0\0\0\x08\0\0\0"), "image")
_file("a GIF without pictures", "x.gif", lambda path: path.write_bytes(b"GIF89a\xff\xff\xff\xff\0\0\0;"), "image")


@case("data", "image folder: a pipe among images")
def _folder(folder: Path, base: Path) -> Path:
    (folder / "images" / "cat").mkdir(parents=True)
    shutil.copy(base / "grey.png", folder / "images" / "cat" / "a.png")
    os.mkfifo(folder / "images" / "cat" / "b.png")
    return folder / "images"


# ---- checkpoints and caches


def _checkpoint(name: str, change: Callable[[dict], Any]) -> None:
    @case("artifact", f"checkpoint: {name}")
    def make(folder: Path, base: Path) -> Path:
        path = Path(shutil.copytree(base / "r" / "checkpoints", folder / "checkpoints"))
        for index in path.glob("*/sapwood.json"):
            said = checksummed_json.unseal(index.read_bytes())
            index.write_text(checksummed_json.seal(change(said) or said))
        return path


_checkpoint("features that are text", lambda said: said["info"].update(features="x"))
_checkpoint("features of text", lambda said: said["info"].update(features={"label": "x"}))


def _checkpoint_files(name: str, change: Callable[[Path], Any]) -> None:
    @case("artifact", f"checkpoint: {name}")
    def make(folder: Path, base: Path) -> Path:
        path = Path(shutil.copytree(base / "r" / "checkpoints", folder / "checkpoints"))
        change(path)
        return path


def _pipes(pattern: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        for file in [file for file in path.rglob(pattern) if file.is_file()]:
            file.unlink()
            os.mkfifo(file)

    return change


_checkpoint_files("an index that is a pipe", _pipes("sapwood.json"))
_checkpoint_files("arrays that are pipes", _pipes("d/*"))
_checkpoint_files("a manifest that is a pipe", _pipes("*manifest*"))
_checkpoint_files("metadata that are pipes", _pipes("_*"))
_checkpoint("nothing", lambda said: {"format": said.get("format", 1)})


def _cache(name: str, write: Callable[[Path], Any]) -> None:
    @case("cache", f"cache: {name}")
    def make(folder: Path, base: Path) -> Path:
        write(folder)
        return folder


_cache("an entry that is a pipe", lambda folder: os.mkfifo(folder / "jit_f-0-cache"))
_cache("an entry that is noise", lambda folder: (folder / "jit_f-0-cache").write_bytes(b"noise"))
_cache("a note that is a folder", lambda folder: (folder / "clean").mkdir())

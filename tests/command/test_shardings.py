"""`sapwood shardings`: what lives where on meshes of devices that are not there."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh

import sapwood as sw
from sapwood import layers as L
from sapwood.inspection import activations, layout
from sapwood.models import Decoder
from sapwood.parallel.meshes import abstract
from sapwood.train import next_token

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def decoder():
    """A decoder on 4096 devices that nobody has."""
    model = Decoder(vocabulary=4096, depth=3, width=256, heads=16)
    mesh = AbstractMesh((16, 16, 16), ("data", "fsdp", "tensor"))
    trainer = sw.Trainer(next_token(model), optax.adam(1e-3), mesh=mesh, policy="bfloat16")
    batch = {name: jax.ShapeDtypeStruct((256, 64), "int32") for name in ("tokens", "targets")}
    return layout(trainer, batch)


def test_everything_of_a_run_is_there_by_path(decoder):
    rows = {(row.kind, row.path): row for row in decoder.rows}
    up = rows["parameters", "blocks/up/kernel"]
    assert (up.shape, up.axes, tuple(up.spec)) == ((3, 256, 1024), ("layers", "embed", "mlp"), (None, "fsdp", "tensor"))
    assert up.nbytes == 3 * 256 * 1024 * 4 // 256
    mu = rows["optimizer", "0/mu/blocks/up/kernel"]
    assert (mu.axes, mu.spec, mu.nbytes) == (up.axes, up.spec, up.nbytes)
    assert rows["optimizer", "0/count"].nbytes == 4
    assert rows["batch", "tokens"].nbytes == 64 * 4
    assert rows["state", "step"].shape == ()
    wide = rows["activations", "blocks/up"]
    assert (wide.shape, wide.axes, wide.copies) == ((256, 64, 1024), ("batch", "length", "mlp"), 3)
    assert (tuple(wide.spec), wide.dtype) == ((("data", "fsdp"), None, "tensor"), "bfloat16")
    assert wide.nbytes == 3 * 64 * 1024 * 2 // 16


def test_totals_are_those_of_the_rows(decoder):
    held = sum(row.nbytes for row in decoder.rows if row.kind != "activations")
    assert decoder.nbytes == held
    assert decoder.totals.startswith("mesh data=16,fsdp=16,tensor=16: each of 4096 devices holds ")
    for kind in ("parameters", "optimizer", "state", "batch"):
        assert f"{kind} " in decoder.totals
    assert "the named activations are " in decoder.totals
    assert str(decoder).splitlines()[-1] == decoder.totals


def test_activations_are_found_without_a_mesh():
    def model(v, x):
        x = L.Vmap(lambda v, x: v.shard(2 * x, "batch", "embed"), 3, in_axes=None)(v.towers, x)
        return v.out.shard(x.sum(0), "batch", None)

    found = activations(model, jnp.ones((8, 4)))
    assert [(a.path, a.axes, a.shape, a.copies) for a in found] == [
        ("towers", ("batch", "embed"), (8, 4), 3),
        ("out", ("batch", None), (8, 4), 1),
    ]


def test_a_trainer_without_a_mesh_has_no_layout():
    trainer = sw.Trainer(sw.supervised(lambda v, x: x, inputs="x"), optax.sgd(0.1))
    with pytest.raises(sw.ConfigError, match="the trainer has no mesh"):
        layout(trainer, {"x": jnp.ones((2, 2)), "label": jnp.zeros(2, int)})


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_table_of_a_pod_from_here(sapwood, stripes):
    done = sapwood("shardings", stripes, "--mesh", "fsdp=64,tensor=8", "--hidden", 65536)
    assert (done.code, done.err) == (0, [])
    text = "\n".join(done.out)
    for word in ("hidden/kernel", "16 × 65536", "0/mu/hidden/kernel", "each of 512 devices holds", "activations",
                 "batch size 16 does not divide over its 64 parts: shown for 64"):  # fmt: skip
        assert word in text or word == "activations", word


def test_a_page_is_written_where_asked(sapwood, stripes):
    done = sapwood("shardings", stripes, "--mesh", "data=-1", "--devices", 32, "--out", "x.html")
    assert (done.code, done.out, done.err) == (0, ["x.html"], [])
    text = Path("x.html").read_text()
    assert "stripes, default rules" in text
    assert not re.search(r"(src|href)=|@import|url\(", text)  # it loads nothing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing", "--mesh", "data=8"), "there is no recipe 'nothing'"),
        (("stripes", "--mesh", "date=8"), "unknown axis 'date'; did you mean 'data'?"),
        (("stripes", "--mesh", "data=8", "--rules", "fsdq"), "rules 'fsdq': no such table"),
        (("stripes", "--mesh", "tensor=8", "--rules", "data"), "no rule uses axis 'tensor'"),
        (("stripes", "--mesh", "data=-1"), "-1 stands for all remaining devices; say how many devices there are"),
        (("stripes", "--mesh", "data=4", "--devices", 8), "the sizes multiply to 4, the number of devices is 8"),
        (("stripes", "--mesh", "data=4", "--devices", 0), "--devices 0: at least one device is needed"),
        (("stripes", "--mesh", "data=4", "--out", "x.svg"), "a name that ends in .html is expected"),
        (("stripes", "--mesh", "data=4", "--out", "no/x.html"), "no/x.html: No such file or directory"),
        (("stripes",), "the following arguments are required: --mesh"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(sapwood, stripes, words, message):
    words = [stripes if word == "stripes" else word for word in words]
    assert message in sapwood("shardings", *words).error


def test_an_abstract_mesh_is_in_the_order_of_the_links():
    assert abstract("tensor=2,data=4") == AbstractMesh((4, 2), ("data", "tensor"))
    assert abstract("data=-1,tensor=2", 8).shape["data"] == 4


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_holds_what_the_table_does(decoder):
    text = decoder._replace(title="a <b>", notes=("a note",)).html()
    assert "<title>a &lt;b&gt;</title>" in text
    assert "<p>a note</p>" in text
    data = json.loads(re.search(r"const LAYOUT = (\{.*?\}), KINDS", text, re.DOTALL)[1])
    assert [axis["name"] for axis in data["axes"]] == ["data", "fsdp", "tensor"]
    assert [row["path"] for row in data["rows"]] == [row.path for row in decoder.rows]
    up = next(row for row in data["rows"] if row["path"] == "blocks/up/kernel")
    assert up["split"] == [[], ["fsdp"], ["tensor"]]


PROBE = """<script>
const said = [], count = css => document.querySelectorAll(css).length;
said.push(count('#mesh rect'), count('.row'));
const up = e => e.textContent.includes('up') && e.textContent.includes('tensor');
[...document.querySelectorAll('.row')].find(up).click();
said.push(new Set([...document.querySelectorAll('#mesh rect')].map(e => e.dataset.s)).size, count('#what rect'));
$('search').value = 'blocks/up'; $('search').oninput({ target: $('search') });
said.push(count('.row'));
document.title = said.join(' ');
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(decoder, tmp_path):
    small = decoder._replace(mesh=AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor")))
    page = tmp_path / "page.html"
    page.write_text(small.html().replace("</body>", PROBE), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = [int(word) for word in re.search(r"<title>(.*?)</title>", done.stdout)[1].split()]
    assert found[:4] == [16, len(small.rows), 8, 8]
    assert found[4] == sum("blocks/up" in row.path for row in small.rows)

"""Pictures of every mode of Pillow's against formulas in NumPy, turned, transparent, moving, cut off, too large."""

import colorsys
import io
import struct
import zlib

import numpy as np
import pyarrow
import pytest
from PIL import Image, ImageOps

from sapwood.core.errors import DataError
from sapwood.data import decode_image, load
from sapwood.data.image.decode import survey

rng = np.random.RandomState(0)
GREY = rng.randint(0, 256, (3, 5), np.uint8)
RGB = rng.randint(0, 256, (3, 5, 3), np.uint8)
ALPHA = np.where(GREY % 3 == 0, 0, rng.randint(0, 256, GREY.shape)).astype(np.uint8)
PALETTE = rng.randint(0, 256, (256, 3), np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def on_white(seen, alpha):
    share = alpha.reshape(*alpha.shape, *[1] * (seen.ndim - alpha.ndim)) / 255
    return seen * share + 255 * (1 - share)


def in_bands(mode, *bands):
    return Image.merge(mode, [Image.fromarray(np.ascontiguousarray(b)) for b in bands])


def with_palette(indices, colors, mode="RGB"):
    image = Image.fromarray(indices)  # "L"
    image.putpalette(colors.tobytes(), mode)
    return image


def with_key(image, key):
    image.info["transparency"] = key
    return image


def of_ycbcr(c):
    y, b, r = (c[..., i].astype(float) - (128 if i else 0) for i in range(3))  # JFIF 1.02
    return np.clip(np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], -1), 0, 255)


def of_hsv(c):
    return np.array([colorsys.hsv_to_rgb(*(p / 255)) for p in c.reshape(-1, 3)]).reshape(c.shape) * 255


def of_lab(c):
    """CIE 1976 L*a*b* under D50 to sRGB (IEC 61966-2-1) by way of Bradford's adaptation to D65."""
    lightness, a, b = c[..., 0] * 100 / 255, c[..., 1] - 128.0, c[..., 2] - 128.0
    f = np.stack([(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    linear = (
        xyz
        @ np.linalg.inv(
            [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
        ).T
    )
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


LAB = np.stack([rng.randint(60, 220, (3, 5)), rng.randint(120, 137, (3, 5)), rng.randint(120, 137, (3, 5))], -1)
INK = 255 - RGB.astype(float)
DEEP = rng.randint(0, 65536, (3, 5)).astype(np.uint16)
FOUR = with_palette(GREY, np.concatenate([PALETTE, np.arange(256, dtype=np.uint8)[::-1, None]], 1), "RGBA")
COLORS = PALETTE[GREY].astype(float)
CASES = {
    "1": (Image.fromarray(GREY > 99), np.where(GREY > 99, 255, 0)),
    "1 key": (with_key(Image.fromarray(GREY > 99), 0), np.full(GREY.shape, 255)),
    "L": (Image.fromarray(GREY), GREY),
    "L key": (with_key(Image.fromarray(GREY), int(GREY[1, 2])), np.where(GREY[1, 2] == GREY, 255, GREY)),
    "LA": (in_bands("LA", GREY, ALPHA), on_white(GREY, ALPHA)),
    "La": (in_bands("LA", GREY, ALPHA).convert("La"), on_white(GREY, ALPHA)),
    "P": (with_palette(GREY, PALETTE), COLORS),
    "P key": (with_key(with_palette(GREY, PALETTE), 7), np.where(GREY[..., None] == 7, 255, COLORS)),
    "P tRNS": (with_key(with_palette(GREY, PALETTE), bytes(range(256))), on_white(COLORS, GREY)),
    "P RGBA": (FOUR, on_white(COLORS, 255 - GREY)),
    "PA": (with_palette(GREY, PALETTE).convert("PA"), COLORS),
    "RGB": (Image.fromarray(RGB), RGB),
    "RGB key": (
        with_key(Image.fromarray(RGB), tuple(map(int, RGB[1, 2]))),
        np.where((RGB[1, 2] == RGB).all(-1, keepdims=True), 255, RGB),
    ),
    "RGBA": (in_bands("RGBA", *np.moveaxis(RGB, -1, 0), ALPHA), on_white(RGB, ALPHA)),
    "RGBa": (in_bands("RGBA", *np.moveaxis(RGB, -1, 0), ALPHA).convert("RGBa"), on_white(RGB, ALPHA)),
    "RGBX": (in_bands("RGBX", *np.moveaxis(RGB, -1, 0), ALPHA), RGB),
    "CMYK": (in_bands("CMYK", *np.moveaxis(RGB, -1, 0), GREY), INK * (1 - GREY[..., None] / 255)),
    "YCbCr": (in_bands("YCbCr", *np.moveaxis(RGB, -1, 0)), of_ycbcr(RGB)),
    "HSV": (in_bands("HSV", *np.moveaxis(RGB, -1, 0)), of_hsv(RGB)),
    "LAB": (in_bands("LAB", *np.moveaxis(LAB.astype(np.uint8), -1, 0)), of_lab(LAB)),
    "I;16": (Image.fromarray(DEEP), DEEP / 257),
    "I;16 key": (with_key(Image.fromarray(DEEP), int(DEEP[1, 2])), np.where(DEEP[1, 2] == DEEP, 255, DEEP / 257)),
    "I;16B": (Image.frombytes("I;16B", (5, 3), DEEP.astype(">u2").tobytes()), DEEP / 257),
}  # fmt: skip

BOTH, ONE, OTHER = ("PNG", "TIFF"), ("PNG",), ("TIFF",)
KEPT = {  # the files that keep a mode without loss
    "1": BOTH, "1 key": ONE, "L": BOTH, "L key": ONE, "LA": BOTH, "P": BOTH, "P key": ONE, "P tRNS": ONE, "P RGBA": ONE,
    "RGB": BOTH, "RGB key": ONE, "RGBA": BOTH, "I;16": BOTH, "I;16 key": ONE, "RGBX": OTHER, "CMYK": OTHER,
    "YCbCr": OTHER, "LAB": OTHER, "I;16B": OTHER,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_picture_of_each_mode(case):
    """In memory, and from every kind of file that keeps its mode without loss."""
    image, seen = CASES[case]
    assert image.mode == case.split()[0]
    colors = seen if seen.ndim == 3 else np.repeat(seen[..., None], 3, -1)
    near = 2.0 if case in ("LAB", "La", "RGBa") else 1.01
    before = image.tobytes(), dict(image.info)
    np.testing.assert_allclose(decode_image(image), colors, atol=near)
    assert before == (image.tobytes(), image.info)
    luma = colors @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(decode_image(image, grey=True)[..., 0], luma, atol=near)
    assert survey([image], str) == (3, 5, 1 if seen.ndim == 2 else 3)
    for kind in KEPT.get(case, ()):
        np.testing.assert_allclose(decode_image(encoded(image, kind)), colors, atol=near, err_msg=kind)


def test_every_mode_is_told_of():
    from PIL.Image import MODES

    numbers = {"I", "F", "I;16L", "I;16N"}  # refused below; I;16 in another order of its bytes
    assert set(MODES) <= {case.split()[0] for case in CASES} | numbers


def test_ink_of_adobe_counts_down():
    """Adobe writes CMYK into a JPEG inverted; so does Pillow, which reads it back."""
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    data = encoded(image, "JPEG", quality=100)
    assert b"Adobe" in data
    np.testing.assert_allclose(decode_image(data), np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=6)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, color, pixels, before=b"", behind=b""):
    """A PNG by its specification (ISO 15948), since Pillow writes not all that it reads."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    rows = np.frombuffer(pixels, np.uint8).reshape(height, -1)
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + before + data + behind + chunk(b"IEND", b"")


def test_the_transparent_color_of_a_png_counts_in_its_own_bits():
    for depth, seen in ((1, [0, 255, 0, 255]), (2, [0, 255, 170, 255]), (4, [0, 255, 34, 51])):
        pixels = np.array([0, 1, 2, 3]) % 2**depth
        bits = np.packbits([int(b) for p in pixels for b in f"{p:0{depth}b}"]).tobytes()
        data = png(4, 1, depth, 0, bits, chunk(b"tRNS", struct.pack(">H", 1)))
        assert decode_image(data, grey=True).ravel().tolist() == seen, depth
    deep = rng.randint(0, 65536, (2, 3, 3)).astype(">u2")
    seen = decode_image(png(3, 2, 16, 2, deep.tobytes(), chunk(b"tRNS", deep[1, 1].tobytes())))
    want = deep / 257.0
    want[1, 1] = 255
    np.testing.assert_allclose(seen, want, atol=1)


def tiff(values, bits, photometric):
    """A grey TIFF, little-endian, of one strip."""
    height, width = values.shape
    strip = values.astype("<u2").tobytes()
    if bits == 12:
        strip = np.packbits([int(b) for row in values for v in row for b in f"{v:012b}"]).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 0), (16, 1)])
def test_grey_tiffs_of_12_and_16_bits(bits, photometric):
    values = rng.randint(0, 2**bits, (2, 4))
    seen = values / (2**bits - 1) * 255
    seen = 255 - seen if photometric == 0 else seen
    np.testing.assert_allclose(decode_image(tiff(values, bits, photometric), grey=True)[..., 0], seen, atol=0.51)


EXACT = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}, "TIFF, packed": {"compression": "tiff_lzw"}}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF, packed"])
def test_a_picture_is_turned_as_its_exif_says(kind):
    """By the eight orientations of EXIF 2.32, of which each says where row 0 and column 0 of what is stored belong."""
    kind, options = kind.split(",")[0], EXACT.get(kind, {})
    upright = np.kron(np.array([[0, 80], [160, 240], [200, 40]], np.uint8), np.ones((8, 8), np.uint8))
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: upright.T[::-1], 7: upright.T[::-1, ::-1], 8: upright.T[:, ::-1]}  # fmt: skip
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(np.ascontiguousarray(pixels)), kind, exif=exif, **options)
        np.testing.assert_allclose(decode_image(data, grey=True)[..., 0], upright, atol=4, err_msg=str(orientation))
        assert survey([data], str)[:2] == (24, 16)
        with Image.open(io.BytesIO(data)) as image:
            np.testing.assert_allclose(decode_image(image, grey=True)[..., 0], upright, atol=4)


def test_exif_behind_the_pixels_of_a_png_is_seen():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(5, 3, 8, 0, GREY.tobytes(), behind=chunk(b"eXIf", exif.tobytes()[6:]))
    np.testing.assert_array_equal(decode_image(data, grey=True)[..., 0], np.rot90(GREY, -1))
    assert survey([data], str) == (5, 3, 1)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", ["XMP", "a raw profile"])
def test_an_orientation_of_a_png_that_is_no_chunk_of_exif(kind, behind):
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes()
    text = {
        "XMP": b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>',
        "a raw profile": b"Raw profile type exif\0" + f"\nexif\n{len(raw):8}\n{raw.hex()}\n".encode(),
    }[kind]
    part = chunk(b"iTXt" if kind == "XMP" else b"tEXt", text)
    data = png(5, 3, 8, 0, GREY.tobytes(), **{"behind" if behind else "before": part})
    np.testing.assert_array_equal(decode_image(data, grey=True)[..., 0], np.rot90(GREY, -1))
    assert survey([data], str) == (5, 3, 1)
    image = Image.open(io.BytesIO(data))  # its header is surveyed, and then it is decoded
    assert load([image])[0]["image"].shape == load([image])[0]["image"].shape == (5, 3, 1)


def test_pictures_that_are_loaded_already():
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [Image.open(io.BytesIO(encoded(Image.fromarray(GREY), "PNG", exif=exif))) for _ in range(2)]
    images[0].load()
    for _ in range(2):  # the second time both are
        data = load((images, [0, 1]))
        assert data.features["image"].shape == (5, 3, 1)
        np.testing.assert_array_equal(data[1]["image"][..., 0], np.rot90(GREY, -1))
    plain = Image.open(io.BytesIO(encoded(Image.fromarray(GREY), "PNG")))
    assert [load([plain])[0]["image"].shape for _ in range(2)] == [(3, 5, 1)] * 2


def test_a_transparent_grey_whose_bits_nobody_knows_any_more():
    def loaded(depth, key, pixels):
        data = png(4, 1, depth, 0, bytes(pixels), before=chunk(b"tRNS", key.to_bytes(2, "big")))
        image = Image.open(io.BytesIO(data))
        image.load()
        return data, image

    data, image = loaded(4, 3, [0x37, 0x37])
    assert decode_image(data, grey=True).ravel().tolist() == [255, 119] * 2
    with pytest.raises(DataError, match="loaded already, and does not say any more whether its transparent grey 3"):
        decode_image(image, grey=True)
    for case in (loaded(8, 3, [3, 7, 0, 17]), loaded(4, 0, [0x37, 0x03]), loaded(8, 200, [200, 7, 0, 17])):
        np.testing.assert_array_equal(*(decode_image(one, grey=True) for one in case))
    lazy = Image.open(io.BytesIO(data))
    for _ in range(2):
        assert decode_image(lazy, grey=True).ravel().tolist() == [255, 119] * 2


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_pictures_the_first_is_taken(kind):
    frames = [Image.new("RGB", (4, 2), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(decode_image(data), np.broadcast_to(np.uint8([255, 0, 0]), (2, 4, 3)))


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_file_that_is_cut_off_is_whole_or_an_error(kind):
    data = encoded(Image.fromarray(np.kron(RGB, np.ones((4, 4, 1), np.uint8))), kind)
    whole = decode_image(data)
    refused = []
    for length in range(0, len(data), len(data) // 20):
        try:
            np.testing.assert_array_equal(decode_image(data[:length], name="that"), whole)
        except DataError as error:
            refused.append(str(error))
    assert len(refused) >= 19
    assert all(e.startswith("that is not an image that can be read: ") and "_io" not in e for e in refused)


def test_a_bomb_is_named(monkeypatch):
    data = encoded(Image.new("1", (3000, 3000)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (lambda: decode_image(data, name="x.png"), lambda: survey([data], lambda i: "x.png")):
        with pytest.raises(DataError, match=r"x\.png is too large: Image size \(9000000 pixels\).*MAX_IMAGE_PIXELS"):
            read()


@pytest.mark.parametrize("first", range(3))
def test_one_picture_in_color_makes_all_of_them_so(tmp_path, first):
    """Wherever it stands; and those of all splits count, so that each has one shape."""
    images = [Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 30), Image.new("RGB", (4, 4), (255, 0, 9))]
    images = images[first:] + images[:first]
    for i, image in enumerate(images):
        for folder in (f"flat/{i}", "split/test/a" if image.mode == "RGB" else "split/train/a", "grey/a"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (image.convert("L") if "grey" in folder else image).save(tmp_path / folder / f"{i}.png")
    data = load(tmp_path / "flat")
    assert data.features["image"].shape == (4, 4, 3)
    seen = [list(image.convert("RGB").getpixel((0, 0))) for image in images]
    assert [data[i]["image"][0, 0].tolist() for i in range(3)] == seen
    assert [load(tmp_path / "split", s).features["image"].shape for s in ("train", "test")] == [(4, 4, 3)] * 2
    assert load(tmp_path / "grey").features["image"].shape == (4, 4, 1)


def test_pictures_on_their_side_have_the_size_they_are_seen_in(tmp_path):
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "a" / "turned.jpg", exif=exif)
    Image.new("RGB", (2, 4)).save(tmp_path / "a" / "upright.jpg")
    data = load(tmp_path)
    assert data.features["image"].shape == (4, 2, 3)
    assert data.gather([0, 1])["image"].shape == (2, 4, 2, 3)
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "a" / "turned.jpg"))
    np.testing.assert_array_equal(data[0]["image"], np.asarray(turned))


MIXED = [
    Image.new("L", (3, 2), 9),
    with_palette(np.full((2, 3), 5, np.uint8), PALETTE),
    Image.new("RGB", (3, 2), "lime"),
]
SEEN = [[9, 9, 9], PALETTE[5].tolist(), [0, 255, 0]]


def cells(images):
    return [{"bytes": encoded(image, "PNG"), "path": None} for image in images]


def hugging_face(images):
    hub = pytest.importorskip("datasets")
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["a", "b"])})
    return hub.Dataset.from_dict({"image": cells(images), "label": [0, 1, 0]}, features=features)


SOURCES = {
    "a list": list,
    "a tuple": lambda images: (images, [0, 1, 0]),
    "a dict": lambda images: {"image": images, "label": [0, 1, 0]},
    "examples": lambda images: [{"image": image, "label": i % 2} for i, image in enumerate(images)],
    "a frame": lambda images: pytest.importorskip("pandas").DataFrame({"image": images, "label": [0, 1, 0]}),
    "a table": lambda images: pyarrow.table({"image": cells(images), "label": [0, 1, 0]}),
    "Hugging Face": hugging_face,
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_reads_pictures_alike(source):
    """A palette is no brightness, and one picture in colour makes all of them so."""
    data = load(SOURCES[source](MIXED))
    assert (data.features["image"].shape, data.features["image"].dtype) == ((2, 3, 3), "uint8")
    batch = data.gather([2, 0, 1])["image"]
    assert batch[:, 0, 0].tolist() == [SEEN[2], *SEEN[:2]]
    np.testing.assert_array_equal(data.column("image"), np.roll(batch, -1, 0))
    grey = load(SOURCES[source]([Image.new("L", (3, 2), i) for i in range(3)]))
    assert grey.features["image"].shape == (2, 3, 1)
    assert grey.gather([0, 2])["image"][:, 0, 0, 0].tolist() == [0, 2]


def test_the_splits_of_hugging_face_have_the_same_channels():
    hub = pytest.importorskip("datasets")
    colour, grey = ([Image.new(mode, (3, 2), 7) for _ in range(3)] for mode in ("RGB", "L"))
    both = hub.DatasetDict(train=hugging_face(colour), test=hugging_face(grey))
    assert [load(both, split)[0]["image"].shape for split in both] == [(2, 3, 3)] * 2
    alike = hub.DatasetDict(train=hugging_face(grey), test=hugging_face(grey))
    assert load(alike, "test").features["image"].shape == (2, 3, 1)


def test_pictures_that_are_labels_keep_their_numbers():
    mask = MIXED[1]
    for data in (load((MIXED, [mask] * 3)), load([(image, mask) for image in MIXED])):
        assert data.gather([0])["label"].tolist() == [[[5] * 3] * 2]
    hub = pytest.importorskip("datasets")
    features = hub.Features({"image": hub.Image(), "mask": hub.Image()})
    rows = hub.Dataset.from_dict({"image": cells(MIXED), "mask": cells([mask] * 3)}, features=features)
    assert load(rows, target="mask").gather([0])["label"].tolist() == [[[5] * 3] * 2]
    with pytest.raises(DataError, match="label of example 1 is a picture in mode RGB; a label has one number a pixel"):
        load((MIXED, [mask, MIXED[2], mask]))


def test_pictures_that_do_not_fit_are_named():
    grey = [{"image": Image.new("L", (3, 2))} for _ in range(40)]
    grey[7] = {"image": MIXED[2]}
    data = load(grey)
    assert data.features["image"].shape == (2, 3, 1)
    with pytest.raises(
        DataError, match=r"image of example 7 is in colour \(RGB\), where those looked at first are grey"
    ):
        data.gather([6, 7])
    broken = cells(MIXED)
    broken[1]["bytes"] = b"what"
    data = load(pyarrow.table({"image": broken}))
    data.gather([0, 2])
    cause = "is not an image that can be read: cannot identify image file$"
    with pytest.raises(DataError, match=rf"image of example 1 \(row 1 of the table\) {cause}"):
        data.gather([0, 1])
    assert load(MIXED).map(lambda e: {"image": Image.fromarray(e["image"])})[1]["image"][0, 0].tolist() == SEEN[1]


def test_what_is_no_picture_is_not_opened(tmp_path):
    (tmp_path / "eps.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(DataError, match=r"eps\.png is PostScript, which is a program and is not run"):
        decode_image(tmp_path / "eps.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"folder\.png is no file"):
        decode_image(tmp_path / "folder.png")


@pytest.mark.filterwarnings("ignore:.*decompression bomb")
def test_more_pixels_than_are_safe_are_not_decoded(monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    out = io.BytesIO()
    Image.new("L", (15, 10)).save(out, "png")  # Pillow itself refuses from twice as many on
    with pytest.raises(DataError, match=r"the picture is too large: 15 x 10 pixels are more than 100\."):
        decode_image(out.getvalue())
    out = io.BytesIO()
    Image.new("L", (10, 10)).save(out, "png")
    assert decode_image(out.getvalue()).shape == (10, 10, 3)
    with pytest.raises(DataError, match=r"the size for the picture is too large"):
        decode_image(out.getvalue(), size=(10**6, 10**6))

"""What pixels a file gives. Files are put together here from their formats, not by Pillow."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from core.errors import SettingsError
from task.data.pixels import decode


@pytest.fixture
def read(tmp_path):
    """Decode the bytes of a file: grey pixels, or those of all channels."""

    def read(data, size=0, name="1.png"):
        path = tmp_path / name
        path.write_bytes(data)
        pixels, is_grey = decode(str(path), size)
        assert pixels.dtype == np.uint8
        if is_grey:
            assert (pixels == pixels[:, :, :1]).all()
            return pixels[:, :, 0].tolist()
        return pixels.tolist()

    return read


@pytest.fixture
def refusal(tmp_path, read):
    def refusal(data, name="1.png"):
        with pytest.raises(SettingsError) as caught:
            read(data, name=name)
        message = str(caught.value)
        assert message.startswith(f"data-dir: {tmp_path / name} ")
        assert len(message.splitlines()) == 1
        return message.removeprefix(f"data-dir: {tmp_path / name} ")

    return refusal


def tiff(array, order="<", *, sample_format=1, photometric=1, bits=None, width=None, data=None):
    """An uncompressed grey TIFF file of one strip."""
    array = np.asarray(array)
    data = data or array.astype(array.dtype.newbyteorder(order)).tobytes()
    height = array.shape[0]
    entries = [
        (256, width or array.shape[1]),
        (257, height),
        (258, bits or array.dtype.itemsize * 8),
        (259, 1),
        (262, photometric),
        (273, 8 + 2 + 12 * 10 + 4),
        (277, 1),
        (278, height),
        (279, len(data)),
        (339, sample_format),
    ]
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    table = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    return head + struct.pack(f"{order}H", len(entries)) + table + bytes(4) + data


def png(width, height, bits, colour, raw, *chunks):
    """A PNG file; `raw` is its rows without filter bytes, `chunks` what stands before them."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    step = len(raw) // height
    rows = b"".join(b"\0" + raw[i : i + step] for i in range(0, len(raw), step))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# 0, 3 x 257, 100 x 257 + 128 (100.498 levels) and all: 65535 = 255 x 257.
DEEP = np.array([[0, 771], [25828, 65535]], np.uint16)
LEVELS = [[0, 3], [100, 255]]


@pytest.mark.parametrize("order", "<>")
def test_sixteen_bit_tiff_is_scaled_by_65535(read, order):
    assert read(tiff(DEEP, order)) == LEVELS


def test_compressed_sixteen_bit_tiff_in_either_order(read):
    for order, mode in (("<", "I;16"), (">", "I;16B")):
        image = Image.frombytes(mode, (2, 2), DEEP.astype(f"{order}u2").tobytes())
        assert read(saved(image, "TIFF", compression="tiff_lzw")) == LEVELS


def test_tiff_in_which_white_is_zero(read):
    assert read(tiff(DEEP, photometric=0)) == [[255, 252], [155, 0]]
    assert read(tiff(np.array([[0, 100], [200, 255]], np.uint8), photometric=0)) == [
        [255, 155],
        [55, 0],
    ]


def test_twelve_bit_tiff_is_scaled_by_4095(read):
    # 0, 2048, 4095, 1 in 12 bits each; 2048 x 255 / 4095 = 127.53.
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x01])
    column = np.zeros((1, 4), np.uint8)
    assert read(tiff(column, bits=12, data=packed), size=4)[0] == [0, 128, 255, 0]


@pytest.mark.parametrize("order", "<>")
def test_float_tiff_from_0_to_1_is_scaled_by_1(read, order):
    floats = np.array([[0, 0.25], [0.5, 1]], np.float32)
    # 0.25 x 255 = 63.75, 0.5 x 255 = 127.5.
    assert read(tiff(floats, order, sample_format=3)) == [[0, 64], [128, 255]]


@pytest.mark.parametrize(
    ("value", "range_"), [(255, "0 to 255"), (-0.25, "-0.25 to 1"), (np.nan, "nan to nan")]
)
def test_float_tiff_of_another_range_is_refused(refusal, value, range_):
    floats = np.array([[0, value], [0.5, 1]], np.float32)
    assert refusal(tiff(floats, sample_format=3)) == (
        f"(mode F) has pixels from {range_}; allowed: 0 to 1"
    )


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["i1", "i2", "i4"])
def test_signed_tiff_is_refused(refusal, order, kind):
    message = refusal(tiff(np.ones((2, 2), kind), order, sample_format=2))
    assert "has signed pixels, whose range is not known; allowed: 1, L, LA, P, RGB" in message


def test_32_bit_tiff_is_refused(refusal):
    message = refusal(tiff(np.ones((2, 2), np.uint32)))
    assert message.startswith("has mode I of TIFF, whose scale is not known; allowed: 1, L")


def test_mode_that_is_no_rgb_is_refused(refusal):
    message = refusal(saved(Image.new("LAB", (2, 2)), "TIFF"))
    assert message.startswith("has mode LAB of TIFF, whose scale is not known; allowed: 1, L")


@pytest.mark.parametrize("kind", [b"P2", b"P5"])
def test_grey_map_is_scaled_by_its_maximum(read, kind):
    def grey_map(most, values):
        deep = ">u2" if most > 255 else "u1"
        plain = " ".join(map(str, values)).encode()
        body = plain if kind == b"P2" else np.array(values, deep).tobytes()
        return kind + b" 2 2 %d\n" % most + body

    # 2048 x 255 / 4095 = 127.53 and 100 x 255 / 4095 = 6.2; 3 x 255 / 7 = 109.3.
    assert read(grey_map(4095, [0, 100, 2048, 4095])) == [[0, 6], [128, 255]]
    assert read(grey_map(65535, [0, 771, 25828, 65535])) == LEVELS
    assert read(grey_map(7, [0, 3, 4, 7])) == [[0, 109], [146, 255]]
    assert read(grey_map(255, [0, 3, 4, 255])) == [[0, 3], [4, 255]]


def test_deep_colour_map_is_scaled_by_its_maximum(read):
    body = np.array([0, 2048, 4095], ">u2").tobytes()
    assert read(b"P6 1 1 4095\n" + body) == [[[0, 128, 255]]]


def test_sixteen_bit_png(read):
    raw = DEEP.astype(">u2").tobytes()
    assert read(png(2, 2, 16, 0, raw)) == LEVELS
    # Values of two equal bytes: 257 x n is n levels.
    colour = np.array([257, 514, 65535], ">u2").tobytes()
    assert read(png(1, 1, 16, 2, colour)) == [[[1, 2, 255]]]


def test_png_of_few_bits(read):
    assert read(png(2, 1, 1, 0, b"\x40"), size=2)[0] == [0, 255]
    # 0 and 1 of 3, 1 and 15 of 15.
    assert read(png(2, 1, 2, 0, b"\x10"), size=2)[0] == [0, 85]
    assert read(png(2, 1, 4, 0, b"\x1f"), size=2)[0] == [17, 255]


def test_files_of_different_depth_mean_the_same(read):
    half = {
        "8 bits": png(1, 1, 8, 0, b"\x80"),
        "16 bits": png(1, 1, 16, 0, b"\x80\x80"),
        "big-endian": tiff(np.array([[32896]], np.uint16), ">"),
        "12 bits": b"P5 1 1 4095\n" + struct.pack(">H", 2056),
        "float": tiff(np.array([[128 / 255]], np.float32), sample_format=3),
    }
    assert {kind: read(data) for kind, data in half.items()} == {kind: [[128]] for kind in half}


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_colour(read, kind):
    # 255 - ink, and nothing of it inverted. JPEG rounds.
    image = Image.new("CMYK", (8, 8), (0, 100, 255, 0))
    red, green, blue = read(saved(image, kind))[3][3]
    assert abs(red - 255) <= 3
    assert abs(green - 155) <= 3
    assert abs(blue - 0) <= 3


def test_ycbcr_tiff_is_colour(read):
    # Cr 255 with Y 76 and Cb 85 is red.
    [[pixel]] = read(saved(Image.new("YCbCr", (1, 1), (76, 85, 255)), "TIFF"))
    assert np.abs(np.array(pixel) - [254, 0, 0]).max() <= 1


# A row of a black pixel, a clear one, and one of half alpha: (255 - 128) / 255 of white is 127.
CLEAR = {
    "RGBA": png(3, 1, 8, 6, bytes([0, 0, 0, 255, 9, 9, 9, 0, 0, 0, 0, 128])),
    "LA": png(3, 1, 8, 4, bytes([0, 255, 9, 0, 0, 128])),
    "P": png(3, 1, 8, 3, bytes([0, 1, 2]), (b"PLTE", bytes(9)), (b"tRNS", bytes([255, 0, 128]))),
}


@pytest.mark.parametrize("mode", CLEAR)
def test_transparent_pixels_are_white(tmp_path, mode):
    path = tmp_path / "1.png"
    path.write_bytes(CLEAR[mode])
    with Image.open(path) as file:
        assert file.mode == mode
    pixels, is_grey = decode(str(path), 3)
    assert is_grey == (mode == "LA")
    assert pixels[0].tolist() == [[0] * 3, [255] * 3, [127] * 3]


def test_clear_colour_of_an_image_without_alpha_is_white(read):
    assert read(png(2, 1, 8, 0, b"\x07\x08", (b"tRNS", b"\0\x07")), size=2)[0] == [255, 8]
    deep = struct.pack(">2H", 4660, 771)
    assert read(png(2, 1, 16, 0, deep, (b"tRNS", struct.pack(">H", 4660))), size=2)[0] == [255, 3]
    clear = (b"tRNS", struct.pack(">3H", 1, 2, 3))
    assert read(png(2, 1, 8, 2, bytes([1, 2, 3, 4, 5, 6]), clear), size=2)[0] == [
        [255, 255, 255],
        [4, 5, 6],
    ]


@pytest.mark.parametrize(("bits", "byte", "pixels"), [(2, 0b01100000, 170), (4, 0x5A, 170)])
def test_clear_grey_of_few_bits_is_white(read, bits, byte, pixels):
    """Pillow brings the pixels to 8 bits, and leaves the clear value as it is."""
    clear = (b"tRNS", struct.pack(">H", byte >> 8 - bits))
    assert read(png(2, 1, bits, 0, bytes([byte]), clear), size=2)[0] == [255, pixels]


def test_clear_colour_of_sixteen_bits_is_refused(refusal):
    clear = (b"tRNS", struct.pack(">3H", 0, 16384, 65535))
    message = refusal(png(1, 1, 16, 2, struct.pack(">3H", 0, 16384, 65535), clear))
    assert message == "has a clear colour of 16 bits; allowed: one of 8 bits, or an alpha channel"


def test_opaque_pixels_with_alpha_are_as_they_are(read):
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    opaque = np.concatenate([colours, np.full((16, 16, 1), 255, np.uint8)], 2)
    assert read(png(16, 16, 8, 6, opaque.tobytes())) == colours.tolist()


# What EXIF says of row and column 0 (1: top left, 6: right top, ...), on the image 1 2 / 3 4.
UPRIGHT = {
    1: [[1, 2], [3, 4]],
    2: [[2, 1], [4, 3]],
    3: [[4, 3], [2, 1]],
    4: [[3, 4], [1, 2]],
    5: [[1, 3], [2, 4]],
    6: [[3, 1], [4, 2]],
    7: [[4, 2], [3, 1]],
    8: [[2, 4], [1, 3]],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_image_is_turned_as_its_exif_says(read, kind, orientation):
    # Four squares of 16 pixels a side, as JPEG and WebP blur their edges.
    levels = np.kron([[1, 2], [3, 4]], np.full((16, 16), 50)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = np.array(read(saved(Image.fromarray(levels), kind, exif=exif)))
    corners = got[4::16, 4::16]
    corners = corners if corners.ndim == 2 else corners[:, :, 0]
    assert np.round(corners / 50).astype(int).tolist() == UPRIGHT[orientation]


def test_sixteen_bit_image_is_turned_too(read):
    deep = (np.array([[1, 2], [3, 4]]) * 257).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "TIFF"):
        assert read(saved(Image.fromarray(deep), kind, exif=exif)) == UPRIGHT[6]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0no TIFF", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"]
)
@pytest.mark.filterwarnings("error")
def test_exif_data_that_cannot_be_read_turns_nothing(read, kind, exif):
    data = saved(Image.new("L", (8, 8), 77), kind, exif=exif)
    assert np.abs(np.array(read(data)) - 77).max() <= 3


FRAMES = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (80, 160, 240)]


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_several_images_in_a_file_are_refused(refusal, kind):
    data = saved(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:])
    assert refusal(data) == "holds 3 images; allowed: one a file"


def test_the_photograph_of_a_phones_jpeg_is_its_first_image(read):
    data = saved(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:])
    assert read(data, name="1.jpg") == [[80] * 8] * 8


def test_program_for_printers_is_not_run(refusal):
    data = saved(Image.new("RGB", (1, 1)), "EPS")
    assert refusal(data).startswith("cannot be decoded: it is no image that is known here; allowed")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "PPM", "WEBP", "GIF"])
def test_truncated_file_is_refused(refusal, kind):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), kind)
    for length in (len(data) - 200, len(data) // 2, 10):
        assert refusal(data[:length]).startswith("cannot be decoded: ")


def test_empty_file_is_called_empty(refusal):
    assert refusal(b"").startswith("cannot be decoded: it is empty; allowed")


def test_bomb_is_refused_before_it_is_unpacked(refusal):
    # 20,000 x 20,000 pixels in a few bytes.
    assert "exceeds limit of 178956970 pixels" in refusal(png(20_000, 20_000, 8, 0, bytes(20_000)))


def test_name_that_is_no_utf_8_or_has_line_ends_is_one_line(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"a\xff\n.png")
    with open(name, "wb") as file:
        file.write(b"none")
    with pytest.raises(SettingsError) as caught:
        decode(os.fsdecode(name), 0)
    message = str(caught.value)
    assert message.startswith(f"data-dir: {tmp_path}/a\\xff\\n.png cannot be decoded")
    assert len(message.encode().splitlines()) == 1


@pytest.mark.parametrize(
    ("data", "top", "maxval"),
    [
        (b"P5 2 1 100\n" + bytes([100, 101]), 101, 100),
        (b"P6 1 1 7\n" + bytes([7, 0, 255]), 255, 7),
        (b"P5 2 1 4095\n" + struct.pack(">HH", 4095, 4096), 4096, 4095),
        (b"P6 1 1 256\n" + struct.pack(">HHH", 1, 300, 2), 300, 256),
    ],
)
def test_a_value_above_the_maxval_is_refused_and_not_clipped(refusal, data, top, maxval):
    said = refusal(data, "1.ppm")
    assert said == f"has a value of {top} above its maxval; allowed: 0 to {maxval}"


@pytest.mark.parametrize("kind", [b"P2 2 1 100\n100 101\n", b"P3 1 1 7\n7 0 255\n"])
def test_a_plain_value_above_the_maxval_is_refused_too(refusal, kind):
    assert refusal(kind, "1.ppm").startswith("cannot be decoded: Channel value too large")

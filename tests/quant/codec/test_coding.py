"""Entropy-coded codes: exact for every width, near the entropy, and strict about bad input."""

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from measuring import peak_memory
from specs import spec_of_state, to_bits

from quant import (
    PackingError,
    UpdateError,
    decode,
    encode,
    fit_scales,
    largest_code,
    packed_size,
    payload_size,
    quantize_state,
)
from quant.codec.coding import compress_codes, decompress, read_codes
from quant.codec.layout import HEADER

WIDTHS = range(2, 17)


def some_codes(bits, count, seed=0, spread=0.5):
    rng = np.random.default_rng(seed)
    limit = largest_code(bits)
    codes = np.clip(np.rint(rng.normal(0, spread * limit, count)), -limit, limit)
    return codes.astype(np.int8 if bits <= 8 else np.int16)


def decompress_codes(data, bits, count, start=None):
    return read_codes(decompress(data, bits, count), bits, count, start)


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_come_back_with_and_without_a_start(bits, count):
    codes, start = some_codes(bits, count), some_codes(bits, count, seed=1)
    limit = largest_code(bits)
    # The differences of the extremes leave the grid, and come back onto it.
    codes[:2], start[:2] = (limit, -limit)[:count], (-limit, limit)[:count]
    for known in (None, start):
        back = decompress_codes(compress_codes(codes, bits, known), bits, count, known)
        assert back.dtype == codes.dtype
        assert np.array_equal(back, codes)


@pytest.mark.parametrize("bits", [2, 3])
def test_every_pair_of_code_and_start_comes_back(bits):
    limit = largest_code(bits)
    levels = np.arange(-limit, limit + 1, dtype=np.int8)
    codes, start = (grid.ravel() for grid in np.meshgrid(levels, levels))
    assert np.array_equal(
        decompress_codes(compress_codes(codes, bits, start), bits, codes.size, start), codes
    )


def entropy(values):
    shares = np.unique(values, return_counts=True)[1] / len(values)
    return -(shares * np.log2(shares)).sum()


@pytest.mark.parametrize(
    ("bits", "spread"),
    [(2, 0.5), (3, 0.3), (3, 0.5), *((b, s) for b in range(4, 17) for s in (0.1, 0.3, 0.5))],
)
def test_the_size_is_near_the_entropy(bits, spread):
    codes = some_codes(bits, 400_000, spread=spread)
    # Huffman's method spends less than a bit a byte beyond it, and the low bits are nearly noise.
    assert 8 * len(compress_codes(codes, bits)) / codes.size <= 1.04 * entropy(codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_differences_are_near_their_entropy(bits):
    start = some_codes(bits, 400_000, seed=1, spread=0.3)
    limit = largest_code(bits)
    moved = start + np.random.default_rng(2).normal(0, max(0.5, 0.04 * limit), start.size)
    codes = np.clip(np.rint(moved), -limit, limit).astype(start.dtype)
    size = 8 * len(compress_codes(codes, bits, start)) / codes.size
    # Most at 5 bits, as no byte holds two.
    assert size <= 1.15 * entropy(codes.astype(int) - start)


@pytest.mark.parametrize("step", [1, 3, 10, 30])
@pytest.mark.parametrize("bits", range(9, 17))
def test_small_differences_are_near_their_entropy(bits, step):
    """Where all are in the low bits: most at 15 bits, as 7 low ones lie across bytes."""
    start = some_codes(bits, 400_000, seed=1, spread=0.3)
    moved = start + np.rint(np.random.default_rng(2).normal(0, step, start.size))
    limit = largest_code(bits)
    codes = np.clip(moved, -limit, limit).astype(start.dtype)
    size = 8 * len(compress_codes(codes, bits, start)) / codes.size
    assert size <= entropy(codes.astype(int) - start) + 1.5


def test_the_planes_of_a_small_model_have_tables_of_their_own():
    """The low bits are noise: in one table with the high ones these would gain half as much."""
    codes = some_codes(12, 60_000, spread=0.1)
    assert 8 * len(compress_codes(codes, 12)) / codes.size <= 4 + 1.03 * entropy((codes + 8) >> 4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12])
def test_steps_from_a_start_are_shorter_where_most_codes_stay_near(bits):
    start = some_codes(bits, 50_000)
    rng = np.random.default_rng(3)
    moved = start + rng.integers(-1, 2, start.size) * (rng.random(start.size) < 0.3)
    codes = np.clip(moved, -largest_code(bits), largest_code(bits)).astype(start.dtype)
    assert len(compress_codes(codes, bits, start)) < 0.9 * len(compress_codes(codes, bits))


def frame(data, claims=True, level=9):
    """What any client could make of data with the library alone."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=claims
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


@pytest.mark.parametrize("count", [10, 1000])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_what_is_not_so_many_codes_is_rejected(bits, count):
    good = compress_codes(some_codes(bits, count), bits)
    another = good + compress_codes(some_codes(bits, count), bits)
    for bad in (b"", good[:-1], good[1:], good + b"\0", another, b"\xff" * 20, frame(b"")):
        with pytest.raises(PackingError):
            decompress_codes(bad, bits, count)
    for other in (count - 9, count + 9):
        with pytest.raises(PackingError):
            decompress_codes(good, bits, other)


def header_size(data):
    """Bytes before the first block (RFC 8878, 3.1.1.1), without a dictionary."""
    descriptor = data[0]
    single_segment = descriptor >> 5 & 1
    return 1 + (1 - single_segment) + (single_segment, 2, 4, 8)[descriptor >> 6]


@pytest.mark.parametrize(
    ("codes", "kinds"),
    [
        (np.zeros(300_000, np.int8), {1}),  # one byte, repeated
        (np.random.default_rng(0).integers(-127, 128, 300_000, np.int8), {0}),  # stored
        (some_codes(8, 300_000), {2}),  # compressed
    ],
)
def test_every_kind_of_block_is_read(codes, kinds):
    data = compress_codes(codes, 8)
    place, found = header_size(data), []
    while place < len(data):
        header = int.from_bytes(data[place : place + 3], "little")
        found.append(header >> 1 & 3)
        place += 3 + (1 if found[-1] == 1 else header >> 3)
    assert len(found) >= 3
    assert kinds <= set(found)
    assert np.array_equal(decompress_codes(data, 8, codes.size), codes)


@pytest.mark.parametrize("flag", [1, 2, 4, 8, 16])
def test_a_frame_that_says_it_holds_more_than_codes_is_rejected(flag):
    """A dictionary, a checksum, or what no version of the format has yet (RFC 8878, 3.1.1.1.1)."""
    good = compress_codes(some_codes(8, 1000), 8)
    with pytest.raises(PackingError):
        decompress_codes(bytes([good[0] | flag]) + good[1:], 8, 1000)


def as_blocks(*contents, last=True):
    """Blocks of a frame as any sender could write them: `bytes` as they are, else (byte, times)."""
    parts = []
    for i, content in enumerate(contents):
        is_last = last and i == len(contents) - 1
        repeated = isinstance(content, tuple)
        length = content[1] if repeated else len(content)
        parts.append((is_last | repeated << 1 | length << 3).to_bytes(3, "little"))
        parts.append(content[0] if repeated else content)
    return b"".join(parts)


# Of a frame of several segments, with a window of a kibibyte, that says its size in four bytes.
DESCRIPTOR = b"\x80\x00"


def test_a_frame_that_anyone_wrote_is_read_to_its_end():
    count, part = 60_000, (b"\1", 1000)
    header = DESCRIPTOR + count.to_bytes(4, "little")
    good = header + as_blocks(*[part] * 60)
    assert decompress_codes(good, 8, count).tolist() == [1] * count
    reserved = (1 | 3 << 1 | 9 << 3).to_bytes(3, "little") + b"anything."
    for bad in (
        *(header + as_blocks(*[part] * number) for number in (59, 61)),
        header + as_blocks(*[part] * 60, last=False),
        header + as_blocks(*[part] * 60, last=False) + reserved,
        # All that is needed comes before what cannot be read.
        header + as_blocks(*[part] * 160, last=False) + reserved,
        good + as_blocks(part),
    ):
        with pytest.raises(PackingError, match="cannot be read"):
            decompress_codes(bad, 8, count)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_decompression_equals_the_strict_call_of_the_library(data):
    count = data.draw(st.sampled_from([1, 300, 5000, 150_000]))
    frame = bytearray(compress_codes(some_codes(8, count, seed=count, spread=0.02), 8))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    coder = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    try:
        decompressed = decompress(bytes(frame), 8, count)
    except PackingError:
        return
    assert decompressed.tobytes() == coder.decompress(bytes(frame), allow_extra_data=False)


def test_nothing_is_allocated_for_what_is_not_claimed():
    data = compress_codes(some_codes(8, 1000), 8)

    def attempt():
        with pytest.raises(PackingError, match="not those of"):
            decompress(data, 8, 2**46)

    assert peak_memory(attempt) < 1_000_000


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_payload_that_is_read_twice_gives_the_same_codes(bits):
    """Where they are left in the memory that they were decompressed to, this is another one."""
    codes, start = some_codes(bits, 1000), some_codes(bits, 1000, seed=1)
    data, known = compress_codes(codes, bits, start), start.copy()
    first = decompress_codes(data, bits, 1000, start)
    assert np.array_equal(decompress_codes(data, bits, 1000, start), codes)
    assert np.array_equal(first, codes)
    assert np.array_equal(start, known)


@pytest.mark.parametrize("claims", [True, False])
def test_a_bomb_is_rejected_before_it_is_decompressed(claims):
    """A hundred megabytes of zeros in ten kilobytes, which says so or does not."""
    bomb = frame(bytes(100_000_000), claims)
    assert len(bomb) < 15_000

    def attempt():
        with pytest.raises(PackingError, match="not those of 100000 weights"):
            decompress_codes(bomb, 4, 100_000)

    assert peak_memory(attempt) < 1_000_000


def test_a_bomb_that_claims_to_be_so_many_codes_is_rejected():
    """The header of 50,000 bytes before blocks that decompress to a hundred megabytes."""
    header, blocks = frame(bytes(50_000)), frame(bytes(100_000_000))
    bomb = header[: header_size(header)] + blocks[header_size(blocks) :]

    def attempt():
        with pytest.raises(PackingError, match="cannot be read"):
            decompress_codes(bomb, 4, 100_000)

    assert peak_memory(attempt) < 1_000_000


@pytest.mark.parametrize("from_start", [False, True])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_a_word_of_the_wider_container_is_rejected(bits, from_start):
    container = 4 if bits == 3 else 8
    codes = np.zeros(100, np.int8)
    codes[50] = largest_code(bits) + 1
    start = np.zeros_like(codes) if from_start else None
    with pytest.raises(PackingError, match=f"off the grid of width {bits}"):
        decompress_codes(compress_codes(codes, container), bits, 100, start)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_code_below_the_symmetric_grid_is_rejected(bits):
    codes = some_codes(bits, 1000)
    codes[500] = -largest_code(bits) - 1
    with pytest.raises(PackingError, match=f"off the grid of width {bits}"):
        decompress_codes(compress_codes(codes, bits), bits, 1000)


@pytest.mark.parametrize("from_start", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_decompressed_codes_are_neither_more_nor_fewer(bits, from_start):
    codes = some_codes(bits, 1000)
    start = codes if from_start else None
    decompressed = decompress(compress_codes(codes, bits, start), bits, 1000)
    for bad in (np.append(decompressed, np.uint8(0)), decompressed[:-1]):
        with pytest.raises(PackingError, match="bytes; got"):
            read_codes(bad, bits, 1000, start)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_difference_that_leads_off_the_grid_is_rejected(bits):
    """One level beyond the largest code, where there is room in the words but none on the grid."""
    limit = largest_code(bits)
    start = np.full(100, limit, np.int8 if bits <= 8 else np.int16)
    one_more = compress_codes(np.ones_like(start), bits, np.zeros_like(start))
    with pytest.raises(PackingError, match=f"off the grid of width {bits}"):
        decompress_codes(one_more, bits, 100, start)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64, ">i2", ">i8"])
def test_codes_may_come_in_wider_integers(dtype):
    codes, start = some_codes(4, 1000).astype(dtype), some_codes(4, 1000, seed=1).astype(dtype)
    back = decompress_codes(compress_codes(codes, 4, start), 4, 1000, start)
    assert back.dtype == np.int8
    assert np.array_equal(back, codes)


# --- in a payload ---------------------------------------------------------------------------------


def model(seed=0, moved=0.0):
    generator = torch.Generator().manual_seed(0)
    state = {
        "w": torch.randn(40, 60, generator=generator),
        "b": torch.randn(40, generator=generator),
    }
    step = torch.Generator().manual_seed(seed)
    return {n: t + moved * torch.randn(t.shape, generator=step) for n, t in state.items()}


SPEC = spec_of_state(model())


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 11, 16])
def test_a_coded_payload_is_the_same_update_in_fewer_bytes(bits):
    start, update = to_bits(model(), bits), to_bits(model(1, moved=0.05), bits)
    plain = encode(update)
    coded = encode(update, coded=True)
    from_start = encode(update, coded=True, start=start)
    assert len(from_start) < len(plain) == payload_size(SPEC, bits)
    assert len(from_start) <= len(coded) <= len(plain)
    for data in (plain, coded, from_start):
        back = decode(data, SPEC, bits, start=start)
        assert torch.equal(back.quantized["w"].codes.int(), update.quantized["w"].codes.int())
        assert torch.equal(back.quantized["w"].scale, update.quantized["w"].scale)
        assert torch.equal(back.floats["b"], update.floats["b"])


def test_codes_that_do_not_get_shorter_are_packed():
    generator = torch.Generator().manual_seed(0)
    uniform = {"w": torch.rand(40, 60, generator=generator) * 2 - 1, "b": torch.zeros(40)}
    update = to_bits(uniform, 8)
    assert encode(update, coded=True) == encode(update)
    # Nothing is quantized at all.
    update = to_bits(uniform, 32)
    assert encode(update, coded=True) == encode(update)


def test_a_payload_that_refers_to_codes_that_were_not_sent_is_rejected():
    start, update = to_bits(model(), 4), to_bits(model(1, moved=0.05), 4)
    data = encode(update, coded=True, start=start)
    with pytest.raises(UpdateError, match="refers to codes that were not sent"):
        decode(data, SPEC, 4)


@pytest.mark.parametrize("dither", [0, 5])
@pytest.mark.parametrize("sent_bits", [2, 4, 8, 32])
def test_a_start_of_any_width_is_rounded_as_the_update_was(sent_bits, dither):
    """A client that was sent float32, or other codes, refers to what they are on its own grid."""
    sent = to_bits(model(), sent_bits)
    received = sent.dequantize()
    moved = {name: tensor + 0.01 for name, tensor in received.items()}
    scales = fit_scales(moved, ["w"], 4)
    update = quantize_state(moved, 4, scales, dither=dither)
    plain, alone = encode(update), encode(update, coded=True)
    data = encode(update, coded=True, start=sent, dither=dither)
    assert len(data) < len(alone) < len(plain)
    back = decode(data, SPEC, 4, start=sent, dither=dither)
    assert torch.equal(back.quantized["w"].codes, update.quantized["w"].codes)
    began = quantize_state(received, 4, scales, dither=dither).quantized["w"].codes
    assert (began != update.quantized["w"].codes).float().mean() < 0.5


def test_a_scale_too_small_to_divide_a_start_by_is_rejected():
    start = to_bits(model(), 32)
    update = to_bits(model(1, moved=0.05), 4)
    data = encode(update, coded=True, start=start)
    tiny = np.float32(1e-42).tobytes()
    at = data.index(update.quantized["w"].scale[:1].numpy().tobytes())
    altered = bytearray(data[:at] + tiny + data[at + 4 :])
    head, rest = bytes(altered[: HEADER.size - 8]), bytes(altered[HEADER.size :])
    checksum = xxhash.xxh3_64(head, seed=0)
    checksum.update(rest)
    sealed = head + checksum.intdigest().to_bytes(8, "little") + rest
    with pytest.raises(UpdateError, match="its codes cannot be read: a scale is too small"):
        decode(sealed, SPEC, 4, start=start)


def test_a_coded_payload_is_shorter_than_a_packed_one_or_it_is_rejected():
    """What is longer can only be a bomb, or a client that pads."""
    update = to_bits(model(), 4)
    data = encode(update)
    codes = update.quantized["w"].codes.numpy().ravel()
    head = data[: len(data) - packed_size(codes.size, 4)]
    stored = frame(np.random.default_rng(0).bytes(codes.size // 2))
    long = head[:7] + b"\1" + head[8:] + stored
    with pytest.raises(UpdateError, match="coded, takes less than"):
        decode(long, SPEC, 4)

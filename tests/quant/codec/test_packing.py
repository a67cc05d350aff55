from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quant import PackingError, pack, packed_size, unpack

WIDTHS = range(2, 17)
BLOCK = 524_288


def limit_of(bits):
    return 2 ** (bits - 1) - 1


def random_codes(bits, count, seed=0):
    limit = limit_of(bits)
    return np.random.default_rng(seed).integers(-limit, limit, count, np.int16, endpoint=True)


def reference_block(words, bits, padding=0):
    """The documented layout of one block in plain integers; `padding` fills the last slices."""
    if bits > 8:
        return bytes(w & 255 for w in words) + reference_block(
            [w >> 8 for w in words], bits - 8, padding
        )
    slices = 8 // gcd(8, bits)
    length = -(-len(words) // slices)
    words = list(words) + [padding] * (slices * length - len(words))
    big = [sum(words[s * length + i] << (s * bits) for s in range(slices)) for i in range(length)]
    planes = slices * bits // 8
    return bytes((word >> (8 * plane)) & 255 for plane in range(planes) for word in big)


def word_of(code, bits):
    offset = 0 if bits in (8, 16) else 2 ** (bits - 1)
    return (int(code) + offset) % 2**bits


def reference_pack(codes, bits):
    words = [word_of(code, bits) for code in codes]
    starts = range(0, len(words), BLOCK)
    return b"".join(reference_block(words[s : s + BLOCK], bits) for s in starts)


@st.composite
def codes_and_bits(draw):
    bits = draw(st.sampled_from(list(WIDTHS)))
    limit = limit_of(bits)
    codes = st.integers(-limit, limit) | st.sampled_from([-limit, limit, 0])
    return draw(arrays(np.int16, st.integers(0, 200), elements=codes)), bits


@settings(max_examples=200, deadline=None)
@given(codes_and_bits())
def test_round_trip_and_layout(case):
    codes, bits = case
    data = pack(codes, bits)
    assert data == reference_pack(codes, bits)
    back = unpack(data, bits, codes.size)
    assert back.dtype == (np.int8 if bits <= 8 else np.int16)
    assert np.array_equal(back, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_round_trip_for_every_short_count(bits):
    for count in range(50):
        codes = random_codes(bits, count, seed=count)
        data = pack(codes, bits)
        assert len(data) == packed_size(count, bits)
        assert np.array_equal(unpack(data, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 13])
def test_round_trip_across_the_block_border(bits, count):
    codes = random_codes(bits, count)
    data = pack(codes, bits)
    assert len(data) == packed_size(count, bits)
    assert np.array_equal(unpack(data, bits, count), codes)


@pytest.mark.parametrize("bits", [3, 11])
def test_layout_across_the_block_border(bits):
    codes = random_codes(bits, BLOCK + 5)
    assert pack(codes, bits) == reference_pack(codes, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_of_the_grid_round_trips(bits):
    limit = limit_of(bits)
    codes = np.arange(-limit, limit + 1)
    assert np.array_equal(unpack(pack(codes, bits), bits, codes.size), codes)


def test_layout_by_hand():
    # 2 bits, offset 2, patterns 3 1 2 3; 4 slices of one code: 3 + 1*4 + 2*16 + 3*64 = 231.
    assert pack(np.array([1, -1, 0, 1]), 2) == bytes([231])
    # 4 bits, offset 8, patterns 9 7 15 1; 2 slices (9 7), (15 1): 9 + 15*16 and 7 + 1*16.
    assert pack(np.array([1, -1, 7, -7]), 4) == bytes([249, 23])
    # 12 bits, offset 2048: 2049 = 0x801, 2047 = 0x7FF; low bytes raw, then 8 + 7*16 = 0x78.
    assert pack(np.array([1, -1]), 12) == bytes([0x01, 0xFF, 0x78])
    # 8 and 16 bits, no offset: one byte each; 0x0001 and 0x8001, the low plane, then the high one.
    assert pack(np.array([1, -127]), 8) == bytes([1, 129])
    assert pack(np.array([1, -32767]), 16) == bytes([1, 1, 0x00, 0x80])


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_size_is_the_information_plus_at_most_bits_bytes(bits):
    for count in [*range(70), BLOCK - 1, BLOCK, BLOCK + 1, 10**6 + 7, 11 * BLOCK + 3]:
        # Exact comparison in eighths of a byte.
        assert 0 <= 8 * packed_size(count, bits) - count * bits <= 8 * bits
    assert packed_size(0, bits) == 0


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64])
def test_every_integer_type_and_shape_packs_alike(bits, dtype):
    codes = np.array([[1, 0, 1], [0, 0, 1]], dtype)
    expected = reference_pack([1, 0, 1, 0, 0, 1], bits)
    assert pack(codes, bits) == expected
    # C order counts, not the memory's; and the value, not its bytes.
    assert pack(np.asfortranarray(codes), bits) == expected
    assert pack(codes.astype(codes.dtype.newbyteorder(">")), bits) == expected


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint8, np.uint16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_value_of_a_type_packs_or_is_refused(bits, dtype):
    """Also where adding the offset wraps around in the type that the codes came in."""
    ends = np.iinfo(dtype)
    for value in range(ends.min, ends.max + 1, 1 if ends.bits == 8 else 97):
        codes = np.array([0, value], dtype)
        if abs(value) <= limit_of(bits):
            assert pack(codes, bits) == reference_pack([0, value], bits)
        else:
            with pytest.raises(ValueError, match="must lie in"):
                pack(codes, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_off_the_grid_are_refused(bits):
    limit = limit_of(bits)
    for bad in [limit + 1, -limit - 1, 2**bits, 2**16, -(2**40)]:
        with pytest.raises(ValueError, match="must lie in"):
            pack(np.array([0, bad, 0], np.int64), bits)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, bool, complex])
def test_arrays_that_hold_no_integers_are_refused(dtype):
    with pytest.raises(ValueError, match="integers"):
        pack(np.zeros(4, dtype), 4)


@pytest.mark.parametrize("bits", [0, 1, 17, 32, True])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 16"):
        pack(np.zeros(4, np.int16), bits)
    with pytest.raises(ValueError, match="2 to 16"):
        unpack(bytes(4), bits, 4)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 8, 33, BLOCK + 3])
def test_wrong_lengths_are_refused(bits, count):
    data = bytes(pack(random_codes(bits, count), bits))
    for wrong in [data + b"\0", data[:-1], b""]:
        if wrong != data:
            with pytest.raises(PackingError, match="bytes"):
                unpack(wrong, bits, count)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("place", [0, 4, 10])
def test_the_pattern_below_the_grid_is_refused(bits, place):
    words = [word_of(code, bits) for code in random_codes(bits, 11)]
    assert np.array_equal(unpack(reference_block(words, bits), bits, 11), random_codes(bits, 11))
    words[place] = word_of(-(2 ** (bits - 1)), bits)
    with pytest.raises(PackingError, match="below"):
        unpack(reference_block(words, bits), bits, 11)


@pytest.mark.parametrize("bits", [b for b in WIDTHS if b % 8])
def test_padding_that_is_not_zero_is_refused(bits):
    words = [2 ** (bits - 1)]  # one code 0; the other slices are padding
    narrow = bits - 8 if bits > 8 else bits
    assert unpack(reference_block(words, bits), bits, 1).tolist() == [0]
    for padding in {1, 2 ** (narrow - 1), 2**narrow - 1}:
        with pytest.raises(PackingError, match="padding"):
            unpack(reference_block(words, bits, padding), bits, 1)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_accepted_bytes_are_those_that_pack_writes(data):
    # No two payloads stand for the same codes.
    bits = data.draw(st.sampled_from(list(WIDTHS)))
    count = data.draw(st.integers(0, 20))
    size = packed_size(count, bits)
    raw = data.draw(st.binary(min_size=size, max_size=size))
    try:
        codes = unpack(raw, bits, count)
    except PackingError:
        words = reference_words(raw, bits, count)
        assert word_of(-(2 ** (bits - 1)), bits) in words[:count] or any(words[count:])
    else:
        assert pack(codes, bits) == raw


def reference_words(raw, bits, count):
    """Inverse of `reference_block`, padding included (its high bits above 8 bits)."""
    if bits > 8:
        high = reference_words(raw[count:], bits - 8, count)
        return [h << 8 | low for h, low in zip(high, raw, strict=False)] + high[count:]
    slices = 8 // gcd(8, bits)
    length = -(-count // slices)
    big = [int.from_bytes(raw[i::length], "little") for i in range(length)]
    return [big[i] >> (s * bits) & (2**bits - 1) for s in range(slices) for i in range(length)]


def test_a_memoryview_unpacks():
    codes = random_codes(5, 100)
    assert np.array_equal(unpack(memoryview(b"?" + pack(codes, 5))[1:], 5, 100), codes)

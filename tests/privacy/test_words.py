import numpy as np
import pytest

from privacy.errors import MessageError
from privacy.words import pack, packed_size, to_signed, to_words, unpack, word_type

BLOCK = 1 << 19


@pytest.mark.parametrize("bits", range(1, 63))
def test_words_come_back_and_take_no_bit_too_many(bits):
    rng = np.random.default_rng(bits)
    for count in (0, 1, 7, 8, 9, 64, 1001):
        words = rng.integers(0, 1 << bits, count, dtype=np.uint64).astype(word_type(bits))
        data = pack(words, bits)
        assert len(data) == packed_size(count, bits) == (count * bits + 7) // 8
        np.testing.assert_array_equal(unpack(data, bits, count), words)


def test_more_than_one_block_comes_back():
    words = np.random.default_rng(0).integers(0, 1 << 11, BLOCK + 13).astype(np.uint16)
    np.testing.assert_array_equal(unpack(pack(words, 11), 11, words.size), words)


def test_bits_above_are_not_packed():
    assert pack(np.array([0xFFFF] * 9, np.uint16), 9) == pack(np.array([511] * 9, np.uint16), 9)


def test_a_word_of_16_bits_is_its_little_endian_bytes_by_plane():
    words = np.arange(8, dtype=np.uint16) + 0x1200
    assert pack(words, 16) == bytes(range(8)) + b"\x12" * 8
    assert pack(words[:2], 16) == b"\x00\x12\x01\x12"


@pytest.mark.parametrize("bits", [1, 2, 8, 9, 16, 27, 32, 33, 62])
def test_signed_values_come_back_at_both_ends(bits):
    half = 1 << (bits - 1)
    values = np.array([-half, -1, 0, half - 1])
    np.testing.assert_array_equal(to_signed(to_words(values, bits), bits), values)
    for wrong in (half, -half - 1):
        with pytest.raises(ValueError, match=f"outside of {bits} bits"):
            to_words(np.array([0, wrong]), bits)


def test_values_must_be_integers():
    with pytest.raises(ValueError, match="float64; allowed are integers"):
        to_words(np.zeros(3), 4)


@pytest.mark.parametrize("bits", [0, -1, 63, 64])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="allowed are 1 to 62"):
        word_type(bits)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_length_is_rejected(change):
    data = bytes(packed_size(10, 9) + change)
    with pytest.raises(MessageError, match=r"have 1[13] bytes; allowed: 12"):
        unpack(data, 9, 10)


def test_each_bit_of_padding_is_looked_at():
    count, bits = 9, 9  # 81 bits in 11 bytes
    for padding in range(1, 8):
        data = bytearray(packed_size(count, bits))
        data[-1] = 1 << padding
        with pytest.raises(MessageError, match="not zero"):
            unpack(bytes(data), bits, count)
    data[-1] = 1
    assert unpack(bytes(data), bits, count)[-1] == 256

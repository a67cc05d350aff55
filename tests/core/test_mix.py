from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from core.errors import SettingsError
from core.mix import check_client_bits, parse_mix, widths_of_partitions

WIDTHS = [*range(2, 17), 32]


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_is_taken(bits):
    assert check_client_bits(bits, "bits") == bits


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 31, 33, True, 8.0, "8", None])
def test_other_widths_are_refused_with_the_origin(bits):
    with pytest.raises(SettingsError) as caught:
        check_client_bits(bits, "bits of node 7")
    expected = f"bits of node 7: {bits!r} is not a bit-width; allowed: 2 to 16, or 32"
    assert str(caught.value) == expected


def test_mix_keeps_the_order_it_was_written_in():
    assert list(parse_mix("32:0.2, 4:0.3,8:0.5").items()) == [(32, 0.2), (4, 0.3), (8, 0.5)]


def test_thirds_add_up_within_the_tolerance():
    assert parse_mix("4:0.3333333,8:0.3333333,32:0.3333333")[4] == 0.3333333


@pytest.mark.parametrize(
    ("mix", "clients", "counts"),
    [
        ("8:0.5,32:0.5", 10, {8: 5, 32: 5}),
        ("8:0.8,32:0.2", 10, {8: 8, 32: 2}),
        ("32:0.2,8:0.8", 10, {32: 2, 8: 8}),
        # 2.5 each: floors make 8, the two seats left go to the first two of equal remainders.
        ("4:0.25,8:0.25,16:0.25,32:0.25", 10, {4: 3, 8: 3, 16: 2, 32: 2}),
        # 29 and 71 exactly, although 0.29 * 100 is 28.999999999999996.
        ("8:0.29,32:0.71", 100, {8: 29, 32: 71}),
        ("2:0.1,4:0.2,8:0.3,32:0.4", 10, {2: 1, 4: 2, 8: 3, 32: 4}),
        # 2.5 each: the first gets the odd client.
        ("8:0.5,32:0.5", 5, {8: 3, 32: 2}),
        # 3.5 and 1.5: the same tie.
        ("8:0.7,32:0.3", 5, {8: 4, 32: 1}),
        # 1.25, 1.5, 2.25: the one seat left goes to the second.
        ("4:0.25,8:0.3,32:0.45", 5, {4: 1, 8: 2, 32: 2}),
        # 0.9, 2.1, 3.0 of 6: the one seat left goes to the first.
        ("4:0.15,8:0.35,32:0.5", 6, {4: 1, 8: 2, 32: 3}),
        ("8:1", 3, {8: 3}),
    ],
)
def test_largest_remainder_by_hand(mix, clients, counts):
    widths = widths_of_partitions(parse_mix(mix), clients)
    assert widths == [bits for bits, count in counts.items() for _ in range(count)]


@st.composite
def mixes(draw):
    widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=6, unique=True))
    parts = draw(st.lists(st.integers(1, 1000), min_size=len(widths), max_size=len(widths)))
    return {bits: part / sum(parts) for bits, part in zip(widths, parts, strict=True)}


@given(mixes(), st.integers(1, 300))
def test_counts_add_up_and_lie_within_one_of_the_share(shares, clients):
    try:
        widths = widths_of_partitions(shares, clients)
    except SettingsError:
        # Refused only where a width has less than one whole client.
        assert min(shares.values()) * clients < 1
        assume(False)
    counts = Counter(widths)
    assert len(widths) == clients
    assert list(dict.fromkeys(widths)) == list(shares)
    for bits, share in shares.items():
        assert abs(counts[bits] - share * clients) < 1


@pytest.mark.parametrize(
    ("mix", "clients", "empty"),
    [("8:0.5,32:0.5", 1, 32), ("8:0.01,32:0.99", 10, 8), ("4:0.4,8:0.3,32:0.3", 2, 32)],
)
def test_too_few_clients_are_refused(mix, clients, empty):
    with pytest.raises(SettingsError) as caught:
        widths_of_partitions(parse_mix(mix), clients)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    expected = f"bit-mix: '{mix}' leaves width {empty} without a client among {clients}; "
    assert message.startswith(expected)

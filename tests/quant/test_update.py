import pickle
import random
import struct
from dataclasses import replace

import pytest
import torch
from measuring import peak_memory
from specs import difference_of, spec_of_state, to_bits
from xxhash import xxh3_64_intdigest

from quant import (
    QuantizedTensor,
    Update,
    UpdateError,
    UpdateSpec,
    absmax_scale,
    decode,
    encode,
    largest_code,
    payload_size,
    quantize_difference,
    without_noise,
)

WIDTHS = [*range(2, 17), 32]

# Where the documented layout puts the fields of the header.
MAGIC, VERSION, BITS, CONTENT, CODING, TABLE_BYTES, CHECKSUM, TABLE = 0, 4, 5, 6, 7, 8, 12, 20


def small_state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "conv.weight": (4, 3, 3, 3),
        "conv.bias": (4,),
        "bn.running_mean": (4,),
        "a.weight": (5, 7),
        "bn.scalar": (),
    }
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**state, "bn.num_batches_tracked": torch.tensor(3)}


SPEC = spec_of_state(small_state())


def with_checksum(data):
    """The payload with the checksum that fits it, as a malicious sender would send it."""
    checksum = xxh3_64_intdigest(data[:CHECKSUM] + data[TABLE:])
    return data[:CHECKSUM] + struct.pack("<Q", checksum) + data[TABLE:]


def with_byte(data, position, value):
    return data[:position] + bytes([value]) + data[position + 1 :]


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype == torch.float32
        assert value.shape == b[name].shape
        assert value.numpy().tobytes() == b[name].numpy().tobytes(), name


def tiny_update():
    """One channel of 2-bit codes and a bias."""
    codes = QuantizedTensor(torch.tensor([[1, -1, 0, 1]]), torch.tensor([0.5]))
    return Update(2, "weights", {"w": codes}, {"b": torch.tensor([2.0])})


def tiny_payload(scale=0.5, codes=231, bias=2.0):
    """The payload of `tiny_update`, written by hand from the documented layout."""
    # w: 1 name byte, codes, 2 dimensions 1 x 4; b: 1 name byte, floats, 1 dimension of 1.
    table = struct.pack("<HcBBII", 1, b"w", 1, 2, 1, 4) + struct.pack("<HcBBI", 1, b"b", 0, 1, 1)
    header = struct.pack("<4sBBBBIQ", b"PRWD", 9, 2, 0, 0, len(table), 0)
    # Patterns code + 2: 3 + 1*4 + 2*16 + 3*64 = 231.
    return with_checksum(header + table + struct.pack("<ffB", scale, bias, codes))


TINY_SPEC = UpdateSpec({"b": (1,), "w": (1, 4)}, {"w"})


def test_payload_by_hand():
    assert encode(tiny_update()) == tiny_payload()
    update = decode(tiny_payload(), TINY_SPEC, 2)
    assert update.bits == 2
    assert update.content == "weights"
    assert update.quantized["w"].codes.tolist() == [[1, -1, 0, 1]]
    assert update.dequantize()["w"].tolist() == [[0.5, -0.5, 0, 0.5]]
    assert update.floats["b"].tolist() == [2]


def test_a_payload_is_good_for_its_own_round_only():
    """The same bytes but for the checksum, which starts from the round."""
    update, stamps = to_bits(small_state(), 4), (0, 1, 2, 255, 256, 65536, 2**32 - 1)
    sent = {stamp: encode(update, stamp=stamp) for stamp in stamps}
    assert sent[0] == encode(update)
    assert len({data[:CHECKSUM] + data[TABLE:] for data in sent.values()}) == 1
    checksum = xxh3_64_intdigest(sent[0][:CHECKSUM] + sent[0][TABLE:], 256)
    assert struct.unpack_from("<Q", sent[256], CHECKSUM) == (checksum,)
    for stamp, data in sent.items():
        for other in stamps:
            if other == stamp:
                same_bits(decode(data, SPEC, 4, stamp=other).dequantize(), update.dequantize())
                continue
            with pytest.raises(UpdateError, match="or is of another round"):
                decode(data, SPEC, 4, stamp=other)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_server_gets_the_clients_own_weights_bit_for_bit(bits):
    sent = to_bits(small_state(), bits)
    received = decode(encode(sent), SPEC, bits)
    same_bits(received.dequantize(), sent.dequantize())
    for name, tensor in sent.quantized.items():
        assert torch.equal(received.quantized[name].codes.int(), tensor.codes.int())
        assert torch.equal(received.quantized[name].scale, tensor.scale)
    assert encode(received) == encode(sent)


def test_full_width_sends_the_state_itself():
    state = small_state()
    del state["bn.num_batches_tracked"]
    same_bits(decode(encode(to_bits(state, 32)), SPEC, 32).dequantize(), state)


@pytest.mark.parametrize("bits", WIDTHS)
def test_spec_size_is_exact(bits):
    assert len(encode(to_bits(small_state(), bits))) == payload_size(SPEC, bits)
    # By hand: 108 + 35 codes with 4 + 5 scales, 9 floats; the table has 5 names of 11, 8, 9, 15 and
    # 9 bytes, 4 bytes more each, and 4 + 2 + 1 + 1 + 0 sizes. Padding is at most `bits` bytes.
    table = 11 + 8 + 9 + 15 + 9 + 5 * 4 + 4 * 8
    quantized = 143 * 4 if bits == 32 else 9 * 4 + 143 * bits / 8
    excess = payload_size(SPEC, bits) - (20 + table + quantized + 9 * 4)
    assert 0 <= excess <= (0 if bits == 32 else bits)


@pytest.mark.parametrize("bits", [3, 32])
def test_the_order_of_the_mappings_does_not_matter(bits):
    state = small_state()
    backwards = dict(reversed(state.items()))
    assert encode(to_bits(state, bits)) == encode(to_bits(backwards, bits))
    update = to_bits(state, bits)
    turned = replace(
        update,
        quantized=dict(reversed(update.quantized.items())),
        floats=dict(reversed(update.floats.items())),
    )
    assert encode(turned) == encode(update)
    decoded = decode(encode(update), spec_of_state(backwards), bits)
    same_bits(decoded.dequantize(), update.dequantize())


def test_which_tensors_are_quantized():
    # Two and more dimensions; the integer counter is not sent at all.
    update = to_bits(small_state(), 4)
    assert sorted(update.quantized) == ["a.weight", "conv.weight"]
    assert sorted(update.floats) == ["bn.running_mean", "bn.scalar", "conv.bias"]
    assert to_bits(small_state(), 32).quantized == {}


def test_given_scales_are_used():
    state = small_state()
    scale = absmax_scale(state["a.weight"], 3) * 2
    update = to_bits(state, 3, {"a.weight": scale})
    assert torch.equal(update.quantized["a.weight"].scale, scale)
    # Twice the absmax scale leaves codes of at most 3 / 2, which round to 2 at most.
    assert update.quantized["a.weight"].codes.abs().max() == 2


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_difference_round_trip(bits):
    update = replace(to_bits(small_state(), bits), content="difference")
    data = encode(update)
    assert decode(data, SPEC, bits, "difference").content == "difference"
    with pytest.raises(UpdateError, match="content"):
        decode(data, SPEC, bits, "weights")
    with pytest.raises(UpdateError, match="content"):
        decode(encode(to_bits(small_state(), bits)), SPEC, bits, "difference")


def mutations(data, rng, count):
    """Random alterations of a payload, none of them the payload itself."""
    while count:
        kind = rng.randrange(6)
        at, to = sorted(rng.sample(range(len(data) + 1), 2))
        if kind == 0:  # a few flipped bits
            new = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                new[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # cut short, or a hole
            new = rng.choice([data[:at], data[at:], data[:at] + data[to:]])
        elif kind == 2:  # longer
            extra = rng.randbytes(rng.randint(1, 20))
            new = rng.choice([data + extra, data[:at] + extra + data[at:], extra + data])
        elif kind == 3:  # a stretch copied over another
            new = bytearray(data)
            size = min(to - at, len(data) - to)
            new[to : to + size] = data[at : at + size]
        elif kind == 4:  # a stretch of noise
            new = data[:at] + rng.randbytes(to - at) + data[to:]
        else:  # a field of the header
            new = bytearray(data)
            new[rng.randrange(TABLE)] = rng.randrange(256)
        if bytes(new) != data:
            count -= 1
            yield bytes(new)


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 11, 16, 32])
def test_every_altered_payload_is_rejected(bits):
    data = encode(to_bits(small_state(), bits))
    decode(data, SPEC, bits)
    for altered in mutations(data, random.Random(bits), 1500):
        with pytest.raises(UpdateError):
            decode(altered, SPEC, bits)


def test_every_single_bit_matters():
    data = tiny_payload()
    for position in range(8 * len(data)):
        altered = bytearray(data)
        altered[position // 8] ^= 1 << (position % 8)
        with pytest.raises(UpdateError):
            decode(bytes(altered), TINY_SPEC, 2)


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 11, 16, 32])
def test_an_altered_payload_with_a_fitting_checksum_is_refused_or_sane(bits):
    data = encode(to_bits(small_state(), bits))
    accepted = rejected = 0
    for altered in mutations(data, random.Random(bits), 1000):
        if len(altered) < TABLE:
            continue
        try:
            update = decode(with_checksum(altered), SPEC, bits)
        except UpdateError:
            rejected += 1
            continue
        accepted += 1
        assert update.bits == bits
        assert update.content == "weights"
        shapes = {name: tuple(t.shape) for name, t in update.dequantize().items()}
        assert shapes == SPEC.shapes
        for tensor in update.quantized.values():
            assert (tensor.scale > 0).all()
            assert tensor.scale.isfinite().all()
            assert tensor.codes.int().abs().max() <= largest_code(bits)
        for value in update.dequantize().values():
            assert value.isfinite().all()
    assert accepted > 20
    assert rejected > 300


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (MAGIC, ord("Q"), "begins with"),
        (VERSION, 1, "version 1"),
        (BITS, 8, "8 bits"),
        (CONTENT, 1, "content 1"),
        (CONTENT, 9, "content 9"),
        (CODING, 1, "coded, takes less than"),
        (CODING, 3, "coding 3"),
        (TABLE_BYTES, 0, "table"),
        (TABLE_BYTES + 3, 255, "table"),
        (TABLE, 2, "table"),
    ],
)
def test_header_edits_are_refused_by_name(position, value, message):
    data = encode(to_bits(small_state(), 4))
    with pytest.raises(UpdateError, match=message):
        decode(with_checksum(with_byte(data, position, value)), SPEC, 4)


@pytest.mark.parametrize("declared", [b for b in WIDTHS if b != 4])
def test_another_width_than_declared_is_rejected(declared):
    data = encode(to_bits(small_state(), 4))
    with pytest.raises(UpdateError, match=f"4 bits; the client declared {declared}"):
        decode(data, SPEC, declared)


@pytest.mark.parametrize("bits", [0, 1, 17, 31, 255])
def test_a_width_that_does_not_exist_is_rejected(bits):
    # A client that lies in its declaration and in the header alike.
    data = encode(to_bits(small_state(), 4))
    with pytest.raises(ValueError, match=f"bits: {bits} is not allowed"):
        decode(with_checksum(with_byte(data, BITS, bits)), SPEC, bits)


@pytest.mark.parametrize(
    "edit",
    [
        {"conv.weight": (4, 3, 3, 4)},
        {"conv.weight": (3, 4, 3, 3)},  # as many bytes of codes, one scale fewer
        {"a.weight": (5, 7, 1)},
        {"conv.bias": (2, 2)},
        {"conv.bias": None, "conv.bios": (4,)},  # same length, another name
        {"conv.bias": None},
        {"more": (1,)},
    ],
)
@pytest.mark.parametrize("bits", [2, 16, 32])
def test_another_model_is_rejected(edit, bits):
    shapes = {n: s for n, s in {**SPEC.shapes, **edit}.items() if s is not None}
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(UpdateError):
        decode(encode(to_bits(state, bits)), SPEC, bits)


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.5, -1e-45, torch.inf, -torch.inf, torch.nan])
def test_a_scale_that_is_not_a_positive_number_is_rejected(scale):
    with pytest.raises(UpdateError, match="a scale is not"):
        decode(tiny_payload(scale=scale), TINY_SPEC, 2)


@pytest.mark.parametrize("bias", [torch.inf, -torch.inf, torch.nan])
def test_a_float_that_is_not_finite_is_rejected(bias):
    with pytest.raises(UpdateError, match="not finite"):
        decode(tiny_payload(bias=bias), TINY_SPEC, 2)


def test_a_code_below_the_grid_is_rejected():
    # Patterns 0 1 2 3 in place of 3 1 2 3: the first stands for -2, which 2 bits do not have.
    with pytest.raises(UpdateError, match="below the symmetric grid"):
        decode(tiny_payload(codes=228), TINY_SPEC, 2)


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize(("largest", "accepted"), [(0.9e8, True), (1.1e8, False), (3e38, False)])
def test_a_grid_that_no_network_needs_is_rejected(bits, largest, accepted):
    # The grid reaches to scale * largest code; 1e8 is the limit.
    code = largest_code(bits)
    tensor = QuantizedTensor(torch.full((1, 2), code), torch.tensor([largest / code]))
    data = encode(Update(bits, "weights", {"w": tensor}, {}))
    spec = UpdateSpec({"w": (1, 2)}, {"w"})
    if accepted:
        assert decode(data, spec, bits).dequantize()["w"].isfinite().all()
    else:
        with pytest.raises(UpdateError, match="a scale is so large"):
            decode(data, spec, bits)


def test_a_float_that_no_network_needs_is_rejected():
    data = encode(Update(32, "weights", {}, {"w": torch.tensor([3e38, 0.0])}))
    with pytest.raises(UpdateError, match=r"a value exceeds 1e\+08"):
        decode(data, UpdateSpec({"w": (2,)}), 32)


def test_a_negative_variance_is_refused_as_weights_and_taken_as_a_difference():
    floats = {"bn.running_var": torch.tensor([1.0, -0.5])}
    spec = UpdateSpec({"bn.running_var": (2,)})
    with pytest.raises(UpdateError, match=r"bn\.running_var is a variance"):
        decode(encode(Update(32, "weights", {}, floats)), spec, 32)
    data = encode(Update(32, "difference", {}, floats))
    assert decode(data, spec, 32, "difference").floats["bn.running_var"][1] == -0.5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantized_differences_are_unbiased_and_within_their_variance_bound(bits):
    """E[Q(x)] = x and E|Q(x) - x|^2 <= n max|x|^2 / (4 s^2); 2,000 draws, 6 standard errors."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 50, generator=generator)
    draws = torch.stack(
        [difference_of({"w": x}, bits, generator).dequantize()["w"] for _ in range(2000)]
    )
    step = x.abs().amax(1, keepdim=True) / largest_code(bits)
    # A draw is one of two neighbours: its standard deviation is at most half a step.
    assert ((draws.mean(0) - x).abs() <= 6 * 0.5 * step / 2000**0.5).all()
    squared = (draws - x).square().sum(2).mean(0)
    assert (squared <= x.shape[1] * step[:, 0] ** 2 / 4 * 1.02).all()
    assert (squared > 0).all()


def heard(difference, bits, seed):
    """A difference by the wire, dequantized as it is and without the noise that is known."""
    first, again = (torch.Generator().manual_seed(seed) for _ in range(2))
    update = quantize_difference(difference, bits, first, ["b", "a"])
    spec = UpdateSpec.of(difference, ["b", "a"])
    update = decode(encode(update), spec, bits, "difference")
    return update.dequantize(), without_noise(update, again)


def drawn(kind):
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(16, 300, generator=generator)
    kept = {"dense": 1.0, "sparse": 0.05}[kind]
    return {"b": normal * (torch.rand(16, 300, generator=generator) < kept), "a": normal[:4]}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("kind", "most"), [("dense", 0.6), ("sparse", 1.05)])
def test_known_noise_is_no_error_and_the_rest_is_right_on_average(bits, kind, most):
    """Where nothing moved, stochastic rounding has no error, and none is brought in."""
    difference, errors = drawn(kind), []
    for seed in range(60):
        plain, without = heard(difference, bits, seed)
        errors.append([values["b"] - difference["b"] for values in (plain, without)])
    plain, without = (torch.stack(of) for of in zip(*errors, strict=True))
    assert without.square().mean() < most * plain.square().mean()
    # The mean over n draws is off by the n-th part of the variance.
    assert without.mean(0).square().mean() < 1.5 * without.square().mean() / 60


@pytest.mark.parametrize("data", [b"", b"P", b"PRWD", bytes(15), bytes(16), bytes(10_000)])
def test_short_and_empty_payloads_are_rejected(data):
    with pytest.raises(UpdateError):
        decode(data, SPEC, 4)


def peak_of_rejection(data, spec, bits):
    def reject():
        with pytest.raises(UpdateError):
            decode(data, spec, bits)

    return peak_memory(reject)


@pytest.mark.parametrize("bits", [4, 32])
def test_a_claim_of_terabytes_is_refused_without_allocation(bits):
    big = 2**32 - 1
    data = encode(to_bits(small_state(), bits))
    claims = [
        data[:TABLE_BYTES] + struct.pack("<I", big) + data[CHECKSUM:],
        # The sizes of a.weight, the table's first entry: 2 + 8 + 1 + 1 bytes in.
        data[: TABLE + 12] + struct.pack("<II", big, big) + data[TABLE + 20 :],
    ]
    for claim in claims:
        assert peak_of_rejection(with_checksum(claim), SPEC, bits) < 200_000
    # And a short payload for a model that is as large.
    huge = UpdateSpec({"w": (big, big)}, {"w"})
    table = struct.pack("<HcBBII", 1, b"w", int(bits == 4), 2, big, big)
    header = struct.pack("<4sBBBBIQ", b"PRWD", 9, bits, 0, 0, len(table), 0)
    assert peak_of_rejection(with_checksum(header + table), huge, bits) < 200_000


def test_encoding_refuses_what_is_not_finite():
    for bad in (torch.nan, torch.inf):
        update = tiny_update()
        update.floats["b"][0] = bad
        with pytest.raises(ValueError, match="finite"):
            encode(update)
        update = tiny_update()
        update.quantized["w"].scale[0] = bad
        with pytest.raises(ValueError, match="finite"):
            encode(update)


@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("sign", [1, -1])
def test_encoding_refuses_codes_off_the_grid(bits, sign):
    # 65536 + 1 is 1 in 16 bits: the check must see the code before it is cut.
    for code in (largest_code(bits) + 1, 2**16 + 1, 2**40):
        tensor = QuantizedTensor(torch.tensor([[0, sign * code]]), torch.tensor([0.5]))
        with pytest.raises(ValueError, match="must lie in"):
            encode(Update(bits, "weights", {"w": tensor}, {}))


def test_encoding_refuses_codes_that_are_no_integers():
    tensor = QuantizedTensor(torch.tensor([[0.0, 0.9]]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="integers"):
        encode(Update(4, "weights", {"w": tensor}, {}))


@pytest.mark.parametrize("bits", [0, 1, 17, 33])
def test_encoding_refuses_other_widths(bits):
    with pytest.raises(ValueError, match="2 to 16, or 32"):
        encode(replace(tiny_update(), bits=bits))


def test_encoding_refuses_codes_at_32_bits():
    with pytest.raises(ValueError, match="quantizes"):
        encode(replace(tiny_update(), bits=32))


def test_a_large_model_takes_its_share_of_the_bytes():
    # Three convolutions and a classifier of ten classes: 1 186 496 weights.
    shapes = {
        "1.weight": (64, 3, 3, 3),
        "2.weight": (256, 256, 3, 3),
        "3.weight": (512, 128, 3, 3),
        "4.weight": (10, 512),
        "1.bias": (10,),
        "2.bias": (10,),
        "3.bias": (10,),
        "4.bias": (10,),
    }
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    spec = spec_of_state(state)
    full = len(encode(to_bits(state, 32)))
    assert full > 4 * 1_186_496
    assert full == payload_size(spec, 32)
    for bits in range(2, 17):
        assert abs(payload_size(spec, bits) / full / (bits / 32) - 1) < 0.05
    for bits in (2, 5, 13):
        sent = to_bits(state, bits)
        data = encode(sent)
        assert len(data) == payload_size(spec, bits)
        same_bits(decode(data, spec, bits).dequantize(), sent.dequantize())


def test_the_hash_of_a_specification_stays_in_its_process():
    """Hashes of texts differ between processes."""
    hash(SPEC)
    assert pickle.dumps(SPEC) == pickle.dumps(UpdateSpec(SPEC.shapes, SPEC.on_grid))
    assert pickle.loads(pickle.dumps(SPEC)) == SPEC

"""The packed file: what comes out is what went in, to the bit; anything else is refused."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from federation import assert_same_update
from measuring import peak_memory
from torch import nn
from xxhash import xxh3_64_intdigest

from quant import (
    ModelFileError,
    PackedModel,
    QuantConfig,
    calibrate_activations,
    load_model,
    prepare,
    quantized_layers,
)

ABOUT = {
    "name": "small",
    "channels": 1,
    "size": 6,
    "num_classes": 3,
    "pixel_scale": 4 / 255,
    "pixel_offset": -2.0,
}
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 1, 6, 6), dtype=np.uint8)
# Where the documented layouts put the fields: of the file, and of the update within it.
HEAD = 9
BITS, CODING, CHECKSUM, TABLE = 5, 7, 12, 20


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)
    )


def network_of(bits, activation_bits=None, grids=True):
    """A network as a client of a width has it, BatchNorm with statistics of its own."""
    model = small()
    model(torch.randn(8, 1, 6, 6))
    model.eval()
    if bits != 32:
        prepare(model, QuantConfig(bits, activation_bits or bits))
        if grids:
            calibrate_activations(model, lambda network: network(torch.randn(16, 1, 6, 6)))
    return model


def packed_of(bits, **kwargs):
    return PackedModel.of(network_of(bits, **kwargs), **ABOUT)


def parts(data):
    """Head and update of a file, by the documented layout."""
    (length,) = struct.unpack_from("<I", data, 5)
    return json.loads(data[HEAD : HEAD + length]), data[HEAD + length :]


def joined(head, update, version=2):
    """A file with the checksum that fits, as somebody malicious would write it."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    start = b"PRWM" + struct.pack("<BI", version, len(text)) + text
    covered = update[:CHECKSUM] + update[TABLE:]
    checksum = xxh3_64_intdigest(covered, xxh3_64_intdigest(start))
    return start + update[:CHECKSUM] + struct.pack("<Q", checksum) + update[TABLE:]


@torch.no_grad()
def logits(network, packed):
    return network(packed.to_input(PIXELS))


@pytest.mark.parametrize("bits", [*range(2, 17), 32])
def test_a_loaded_network_computes_the_same_to_the_bit(tmp_path, bits):
    network = network_of(bits)
    packed = PackedModel.of(network, **ABOUT)
    (tmp_path / "model").write_bytes(packed.to_bytes())
    loaded = load_model(tmp_path / "model")
    assert_same_update(loaded.update, packed.update)
    assert replace(loaded, update=packed.update) == packed
    assert loaded.bits == bits
    again = loaded.network(small(seed=1))
    x = torch.from_numpy(PIXELS).float() * (4 / 255) - 2
    with torch.no_grad():
        torch.testing.assert_close(logits(again, loaded), network(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(again, loaded), logits(network, packed))
    # Twice the same bytes.
    assert loaded.to_bytes() == packed.to_bytes()


@pytest.mark.parametrize(("activation_bits", "grids"), [(32, True), (6, True), (4, False)])
def test_activations_have_their_own_width(activation_bits, grids):
    network = network_of(4, activation_bits, grids)
    packed = PackedModel.of(network, **ABOUT)
    loaded = PackedModel.from_bytes(packed.to_bytes()).network(small(seed=1))
    assert torch.equal(logits(loaded, packed), logits(network, packed))
    for name, layer in quantized_layers(loaded):
        assert layer.config == QuantConfig(4, activation_bits)
        assert (layer.input_grid is None) == (activation_bits == 32 or not grids)
        assert layer.input_grid == packed.grids.get(name)


def test_latent_weights_are_packed_as_the_layer_rounds_them():
    network = network_of(3)
    packed = PackedModel.of(network, **ABOUT)
    for name, layer in quantized_layers(network):
        assert not torch.equal(layer.weight, layer.quantized_weight())
        weight = packed.update.quantized[f"{name}.weight"]
        assert torch.equal(weight.dequantize(), layer.quantized_weight())


def test_the_file_is_laid_out_as_documented():
    packed = packed_of(4)
    head, update = parts(packed.to_bytes())
    grids = {name: [g.scale, g.low, g.high] for name, g in packed.grids.items()}
    assert head == {**ABOUT, "activation_bits": 4, "grids": grids}
    assert (update[:4], update[BITS]) == (b"PRWD", 4)
    assert joined(head, update) == packed.to_bytes()


def test_the_given_model_stays_as_it_was():
    model = small(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed_of(4).network(model)
    assert not list(quantized_layers(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_of_another_shape_is_refused():
    with pytest.raises(ModelFileError, match=r"^0\.bias has shape \(5,\) in the model and \(4,\)"):
        packed_of(4).network(nn.Sequential(nn.Conv2d(1, 5, 3)))


# --- what is no packed model ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 32])
def test_every_altered_byte_is_noticed(bits):
    data = packed_of(bits).to_bytes()
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 1 << position % 8
        with pytest.raises(ModelFileError):
            PackedModel.from_bytes(bytes(altered))


def test_every_other_length_is_refused():
    data = packed_of(4).to_bytes()
    for length in range(len(data)):
        with pytest.raises(ModelFileError):
            PackedModel.from_bytes(data[:length])
    with pytest.raises(ModelFileError):
        PackedModel.from_bytes(data + b"\0")


def test_the_message_names_the_file_and_what_is_wrong(tmp_path):
    path = tmp_path / "model"
    data = packed_of(4).to_bytes()
    for content, message in (
        (b"", "0 bytes are no packed model"),
        (b"PK" + data[2:], "begins with b'PKWM', not b'PRWM'"),
        (joined(*parts(data), version=3), "has version 3; understood is 2"),
        (data[:100], "is cut short"),
        (data[:-1], "is damaged or no packed model: payload has"),
        (data[:-1] + b"\0", "checksum does not match"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelFileError) as raised:
            load_model(path)
        assert str(raised.value).startswith(f"{path}: ")
        assert message in str(raised.value)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, "name is 5, not a str"),
        ({"size": True}, "size is True, not a int"),
        ({"size": 10**9}, "size is 1000000000; allowed are 1 to 1024"),
        ({"channels": 0}, "channels is 0"),
        ({"num_classes": 10**9}, "num_classes is 1000000000"),
        ({"pixel_scale": float("nan")}, "finite"),
        ({"pixel_offset": -2}, "pixel_offset is -2, not a float"),
        ({"activation_bits": 17}, "bits is 17"),
        ({"activation_bits": 3}, "the grid of 0 is none of 3 bits"),
        ({"activation_bits": 32}, "the grid of 0 is none of 32 bits"),
        ({"grids": {"9": [0.5, 0, 15]}}, "there is no layer '9'"),
        ({"grids": {"0": [0.0, 0, 15]}}, "the scale of the grid of 0 is 0.0"),
        ({"grids": {"0": [float("inf"), 0, 15]}}, "the scale of the grid of 0 is inf"),
        ({"grids": {"0": [0.5, -8, 7]}}, "the grid of 0 is none of 4 bits"),
        ({"grids": {"0": [0.5, 0]}}, "head that cannot be used"),
        ({"grids": []}, "head that cannot be used"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"update": {}}, "multiple values"),
    ],
)
def test_a_head_that_makes_no_sense_is_refused(change, message):
    head, update = parts(packed_of(4).to_bytes())
    with pytest.raises(ModelFileError, match=message.replace("(", r"\(")):
        PackedModel.from_bytes(joined({**head, **change}, update))


@pytest.mark.parametrize("head", [b"", b"\xff", b"[]", b"{}", b"7", b"[" * 100_000])
def test_a_head_that_is_no_object_is_refused(head):
    _, update = parts(packed_of(4).to_bytes())
    with pytest.raises(ModelFileError, match="head that cannot be used"):
        PackedModel.from_bytes(joined(head, update))


def table(*shapes):
    entries = [
        struct.pack("<H1sBB", 1, chr(97 + i).encode(), 1, len(shape))
        + struct.pack(f"<{len(shape)}I", *shape)
        for i, shape in enumerate(shapes)
    ]
    return b"".join(entries)


def update_of(bits, coding, table, rest):
    return struct.pack("<4sBBBBIQ", b"PRWD", 8, bits, 0, coding, len(table), 0) + table + rest


BOMBS = {
    "a tensor of a terabyte": update_of(2, 0, table((2**20, 2**20)), b"\0" * 50),
    "a tensor of no values": update_of(32, 0, table((0, 2**32 - 1, 2**32 - 1)), b""),
    "hundreds of dimensions": update_of(32, 0, table((1,) * 255), b"\0\0\0\0"),
    "coded codes": update_of(2, 1, table((1, 2**10)), struct.pack("<f", 1) + b"\0" * 50),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_nothing_is_allocated_for_what_the_file_cannot_hold(bomb):
    head, _ = parts(packed_of(4).to_bytes())
    data = joined({**head, "grids": {}}, BOMBS[bomb])

    def refused():
        with pytest.raises(ModelFileError, match=r"hold no tensor|packed codes only"):
            PackedModel.from_bytes(data)

    assert peak_memory(refused) < 20 * len(data) + 20_000


def test_random_changes_behind_a_good_checksum_are_refused_or_sane():
    rng = np.random.default_rng(0)
    targets = [parts(packed_of(bits).to_bytes()) for bits in (2, 4, 9, 32)]
    accepted = 0
    for number in range(600):
        head, update = targets[number % len(targets)]
        text, update = bytearray(json.dumps(head).encode()), bytearray(update)
        part = text if rng.random() < 0.3 else update
        for at in rng.integers(len(part), size=rng.integers(1, 4)):
            part[at] = rng.integers(256)
        try:
            packed = PackedModel.from_bytes(joined(bytes(text), bytes(update)))
            network = packed.network(small())
        except ModelFileError:
            continue
        accepted += 1
        assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
    # Enough gets through the checksum for the checks behind it to have been tried.
    assert accepted > 30

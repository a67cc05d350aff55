"""How a node knows what it is."""

import pytest

from client_app.node import declare as declare_node

RUN = {"server-buffer": 64, "bit-mix": "4:0.5,32:0.5"}


def declare(node_config, run_config, simulated=True):
    return declare_node(node_config, run_config, simulated)


def config(partition=0, of=4, **more):
    return {"partition-id": partition, "num-partitions": of, **more}


@pytest.mark.parametrize(("partition", "bits"), [(0, 4), (1, 4), (2, 32), (3, 32)])
def test_without_bits_the_mix_says_which_partition_has_which_width(partition, bits):
    declaration = declare(config(partition), RUN)
    assert (declaration.bits, declaration.refused) == (bits, "")
    # 1,437 training digits less 64 for the server, partitioned among four.
    assert declaration.num_examples in (343, 344)


def test_a_networked_node_without_bits_is_refused_whatever_the_mix():
    declaration = declare(config(), RUN, simulated=False)
    assert declaration.bits == 0
    assert declaration.refused == (
        "node-config bits: None is not a bit-width; allowed: 2 to 16, or 32"
    )


@pytest.mark.parametrize("bits", [2, 7, 16, 32])
def test_a_nodes_own_bits_come_before_the_mix(bits):
    assert declare(config(bits=bits), RUN).bits == bits


@pytest.mark.parametrize("bits", [0, 1, 17, 31, 33, "8", 8.0, True])
def test_bits_that_do_not_exist_are_refused_with_the_reason(bits):
    declaration = declare(config(bits=bits), RUN)
    assert declaration.bits == 0
    assert declaration.refused == (
        f"node-config bits: {bits!r} is not a bit-width; allowed: 2 to 16, or 32"
    )


@pytest.mark.parametrize(
    ("node_config", "reason"),
    [
        ({"num-partitions": 2}, "node-config: partition-id is None; it must be a whole number"),
        ({"partition-id": 0}, "node-config: num-partitions is None; it must be a whole number"),
        (config(4, 4), "node-config: partition-id 4 of 4"),
        (config(-1, 4), "node-config: partition-id -1 of 4"),
        (config("0", 4), "node-config: partition-id is '0'; it must be a whole number"),
    ],
)
def test_a_node_that_does_not_know_its_partition_is_refused(node_config, reason):
    assert declare(node_config, RUN).refused == reason


def test_wrong_settings_of_the_run_are_the_reason_too():
    assert "batch-size: 0" in declare(config(), {**RUN, "batch-size": 0}).refused
    assert (
        "leaves width 4 without a client"
        in declare(config(0, 2), {"bit-mix": "4:0.1,32:0.9"}).refused
    )

import itertools

import numpy as np

from core.seeds import DataStream, data_generator, derive_seed


def test_seeds_are_63_bits_and_the_same_every_time():
    seeds = [derive_seed(0, 1, number) for number in range(200)]
    assert seeds == [derive_seed(0, 1, number) for number in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Of 200 fair 63-bit numbers one is below 2**60 and one above 2**62, but for 1 in 10**11.
    assert min(seeds) < 2**60
    assert max(seeds) > 2**62


def test_different_paths_give_different_seeds():
    # Also where paths differ by a zero at the end, or a seed is longer than 32 bits.
    paths = [path for length in range(4) for path in itertools.product(range(4), repeat=length)]
    runs = [0, 1, 2, 5, 2**32, 2**32 + 5, 3 * 2**32]
    seeds = [derive_seed(run, *path) for run in runs for path in paths]
    assert len(set(seeds)) == len(seeds)


def test_each_stream_of_the_data_draws_what_it_always_drew():
    """Another number would be another partition under the same seed."""
    numbers = {"PARTITION": 1, "LOCAL_TEST": 2, "LOCAL_ORDER": 3, "SERVER_SAMPLE": 4}
    assert {stream.name: stream.value for stream in DataStream} == numbers
    for stream in DataStream:
        by_hand = np.random.default_rng([5, stream.value]).permutation(20)
        assert data_generator(5, stream).permutation(20).tolist() == by_hand.tolist()

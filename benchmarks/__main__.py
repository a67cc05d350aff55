"""`python -m benchmarks [NAME ...]`: run all benchmarks, or the named ones."""

import sys

from benchmarks import aggregation, codec, peers, scale, secure, simulation, training, update_size

BENCHMARKS = {
    "codec": codec.main,
    "bytes": update_size.main,
    "aggregation": aggregation.main,
    "scale": scale.main,
    "secure": secure.main,
    "simulation": simulation.main,
    "peers": peers.main,
    "training": training.main,
}


def main(names: list[str]) -> None:
    """Run benchmarks in order; an unknown name ends with the list of known ones."""
    if unknown := [name for name in names if name not in BENCHMARKS]:
        sys.exit(f"no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    for name in names or BENCHMARKS:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])

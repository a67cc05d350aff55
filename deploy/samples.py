"""Give each site images of its own to try a federation with: scikit-learn's digits.

Each folder given gets ``<digit>/<number>.png``, other images than all others and none of those that
the server evaluates on by default. A folder that holds something is left as it is.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from core.settings import Settings
from task.data.dataset import load_dataset


def fill(folders: Sequence[Path]) -> None:
    """Write the images, and say of each folder what it has."""
    images = load_dataset(Settings(dataset="digits")).train
    for place, folder in enumerate(folders):
        if folder.exists() and any(folder.iterdir()):
            print(f"{folder.name}: has data, left as it is")
            continue
        own = range(place, len(images), len(folders))
        for number in own:
            path = folder / str(images.labels[number]) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.pixels[number, 0]).save(path)
        print(f"{folder.name}: {len(own)} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="one a site")
    fill(parser.parse_args().folders)

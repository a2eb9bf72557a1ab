"""How many crops are air, with and without drawing such crops again.

    python scripts/bench/views.py [--source FOLDER] [--slices 300] [--crops 20]

A crop counts as air when less than 10 % of its pixels are body (above -500 HU), counted over every pixel of the crop;
the drawing itself looks at every eighth row and column.
"""

import argparse
from pathlib import Path

import numpy as np
from common import add_source, print_table, slice_files, source_folder

from dinoct.config import AugConfig
from dinoct.data.dicom import read_hu
from dinoct.data.views import BODY_HU, ViewSpec, sample_view

SCALES = {"global 0.5-1.0": (0.5, 1.0), "global 0.32-1.0": (0.32, 1.0), "local 0.05-0.32": (0.05, 0.32)}
MIN_BODY = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--crops", type=int, default=20, help="per slice")
    args = parser.parse_args()
    with source_folder(args.source) as source:
        files = slice_files(source)
        files = files[:: max(1, len(files) // args.slices)][: args.slices]
        rows = [[name, *rates(files, scale, args.crops)] for name, scale in SCALES.items()]
    print_table(["crop, share of the area", "air crops, drawn once", "air crops, drawn again", "crops"], rows)


def rates(files: list[Path], scale: tuple[float, float], crops: int) -> list[str]:
    """Return the rate of air crops without and with `min_body`, and the number of crops, over the slices."""
    aug = AugConfig()
    air = np.zeros(2, dtype=int)
    for i, path in enumerate(files):
        hu = read_hu(str(path))
        body = hu > BODY_HU
        for kind, least in enumerate((0.0, MIN_BODY)):
            spec = ViewSpec(224, scale, tuple(aug.ratio), aug.flip, aug.window, min_body=least)
            rng = np.random.default_rng([0, i])
            for _ in range(crops):
                view = sample_view(rng, spec, hu)
                part = body[view.top : view.top + view.height, view.left : view.left + view.width]
                air[kind] += part.mean() < MIN_BODY
    total = len(files) * crops
    return [*(f"{100 * count / total:.2f} %" for count in air), f"{total:,}"]


if __name__ == "__main__":
    main()

"""Features of a folder of CT DICOM with an exported encoder: a starting point for your own script.

python scripts/embed_example.py encoder_00000384.safetensors /data/ct features.npz

It needs what `dinoct.load_encoder` and pydicom give, and nothing else of dinoct's. `dinoct-embed` does the same with
prepare's checks: localizers, oblique and cut slices, a missing rescale, duplicates, archives.
"""

import sys
from pathlib import Path

import numpy as np
import pydicom
import torch

import dinoct


def read_hu(path: Path) -> np.ndarray | None:
    """HU ``[H, W]`` of a CT slice; ``None`` for any other file."""
    try:
        slice_ = pydicom.dcmread(path)
    except pydicom.errors.InvalidDicomError:
        return None
    if slice_.get("Modality") != "CT" or "PixelData" not in slice_:
        return None
    stored = slice_.pixel_array.astype(np.float32)
    return stored * float(slice_.RescaleSlope) + float(slice_.RescaleIntercept)


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    encoder_file, folder, out = sys.argv[1:]
    encoder = dinoct.load_encoder(encoder_file).to("cuda" if torch.cuda.is_available() else "cpu")
    features, skipped = [], 0
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        hu = read_hu(path)
        if hu is None:
            skipped += 1
            continue
        with torch.inference_mode():
            features.append(encoder(hu).cls[0].cpu().numpy())  # any size: the encoder pads, resizes and windows
    if not features:
        sys.exit("no CT slice in that folder")
    np.savez(out, cls=np.stack(features), window_hu=encoder.window, weights=encoder.card.weights_sha256)
    print(f"{len(features)} slices, {encoder.dim} features each, {skipped} other files: {out}")


if __name__ == "__main__":
    main()

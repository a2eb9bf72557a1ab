"""How far untrained encoders of one shape differ in view retrieval, and how often one would pass against another.

    python scripts/bench/untrained.py data/processed [--slices 400] [--draws 20] [experiment=demo]

The rank's rule of `dinoct-eval` (probe.min_gain) rests on these figures. Patients of both sides of the split count,
since nothing is trained; those with fewer than seven slices are left out.
"""

import argparse
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_module

from dinoct.config import HardwareConfig, ProbeConfig, to_object
from dinoct.data.index import SliceIndex
from dinoct.data.store import SliceStore
from dinoct.data.views import probe_spec
from dinoct.evals.features import FixedViews, backbone_encoder, choose_slices, encode
from dinoct.evals.retrieval import patient_interval, score
from dinoct.hardware import resolve
from dinoct.models.load import random_backbone

GAINS = (0.0, 0.05, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a prepared data set")
    parser.add_argument("overrides", nargs="*", default=["experiment=demo"], help="of dinoct-train, for the shape")
    parser.add_argument("--slices", type=int, default=400)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with initialize_config_module("dinoct.conf", version_base="1.3"):
        model = to_object(compose("train", overrides=args.overrides)).model
    index, probe = SliceIndex.load(args.root / "_index" / "index.csv"), ProbeConfig()
    index = index.select(np.bincount(index.patient)[index.patient] >= 7)
    rows = choose_slices(index, args.slices, probe.seed)
    grid = model.img_size // model.patch
    store = SliceStore(args.root / "store")
    views = FixedViews(index, store, rows, probe, probe_spec(probe, model.img_size), grid=grid, whole=False)
    hardware = resolve(HardwareConfig(name="cpu", device="cpu", num_workers=0, threads=args.threads))
    encoders = {str(seed): backbone_encoder(random_backbone(model, seed=seed), hardware) for seed in range(args.draws)}
    features = encode(encoders, views, hardware=hardware, batch_size=probe.batch_size)
    ranks = {name: score(x[:, 0], x[:, 1]).percentile_ranks for name, x in features.items()}
    means, patients = np.array([rank.mean() for rank in ranks.values()]), index.select(rows).patient
    print(f"{len(rows)} slices of {len(np.unique(patients))} patients; {' '.join(args.overrides)}, {args.draws} draws")
    print(f"rank {means.min():.4f} to {means.max():.4f}, std {means.std(ddof=1) / means.mean():.1%} of the mean")
    ends = [(patient_interval(a - b, patients)[1], b.mean()) for a, b in permutations(ranks.values(), 2)]
    for gain in GAINS:
        passed = np.mean([end < -gain * rank for end, rank in ends])
        print(f"probe.min_gain={gain:g}: the rank's rule passes {passed:.3f} of {len(ends)} pairs")


if __name__ == "__main__":
    main()

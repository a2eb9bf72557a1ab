"""What view retrieval's matching costs beside the forward passes that make its features.

    python scripts/bench/eval.py [--pairs 4096] [--dim 1024] [--model vit-small] [--threads 1]
    python scripts/bench/eval.py --smoke             # small: does the script work?

Matching is timed whole, on random features. The forward pass is timed on 64 views of the model's own size, float32, and
scaled up to the two views of every pair; reading and rendering the slices are not in it. Medians of some rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import print_table
from hydra import compose, initialize_config_module

from dinoct.config import ModelConfig, to_object
from dinoct.evals.retrieval import dispersion, score
from dinoct.models.backbone import Backbone

VIEWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=1024, help="of the features")
    parser.add_argument("--model", default="vit-small", help="a choice of dinoct-train's model=")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="64 pairs and vit-tiny")
    args = parser.parse_args()
    if args.smoke:
        args.pairs, args.dim, args.model, args.rounds = 64, 64, "vit-tiny", 1
    torch.set_num_threads(args.threads)
    with initialize_config_module("dinoct.conf", version_base="1.3"):
        model = to_object(compose("train", overrides=[f"model={args.model}"])).model
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(args.pairs, args.dim, generator=draw) for _ in range(2))
    forward = seconds(forward_pass(model), args.rounds) * 2 * args.pairs / VIEWS
    matching = seconds(lambda: score(first, second), args.rounds)
    signs = seconds(lambda: dispersion(first), 1)
    views = f"{2 * args.pairs:,} views of {model.img_size} px"
    print_table(
        [f"{args.pairs:,} pairs, {args.threads} thread(s)", "s", "share of the forward passes"],
        [
            [f"{args.model} on {views}, scaled up from {VIEWS}", f"{forward:.4g}", "100 %"],
            [f"matching, {args.dim} wide", f"{matching:.3g}", f"{100 * matching / forward:.2f} %"],
            [f"signs of collapse, {args.dim} wide", f"{signs:.3g}", f"{100 * signs / forward:.2f} %"],
        ],
    )


def forward_pass(model: ModelConfig) -> Callable[[], object]:
    backbone, images = Backbone(model).eval(), torch.rand(VIEWS, 1, model.img_size, model.img_size)
    return torch.inference_mode()(lambda: backbone(images))


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median wall time, after a call that is not timed."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()

"""From an encoder to a verdict: view retrieval beside its baselines, signs of collapse, pass or fail."""

from collections.abc import Callable
from typing import Any

from torch import nn

from dinoct.config import ModelConfig, ProbeConfig
from dinoct.data.index import SliceIndex
from dinoct.data.store import SliceStore
from dinoct.data.views import probe_spec
from dinoct.evals.features import ProbePairs, class_token_encoder, extract, histogram_encoder, pixel_encoder
from dinoct.evals.retrieval import bootstrap_difference, dispersion, score
from dinoct.hardware import Hardware
from dinoct.models.load import random_backbone


def judge(
    backbone: nn.Module,
    model: ModelConfig,
    probe: ProbeConfig,
    *,
    index: SliceIndex,
    store: SliceStore,
    n: int,
    hardware: Hardware,
    baselines: bool = True,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Judge a backbone on at most n slices of `index`.

    Returns:
        What the JSON file holds: figures of the encoder, of each baseline, and the verdict with its reasons.
    """
    pairs = ProbePairs(index, store, probe_spec(probe, model.img_size), n=n, seed=probe.seed)
    encoders = {"trained": class_token_encoder(backbone, hardware)}
    if baselines:
        encoders["random_init"] = class_token_encoder(random_backbone(model, seed=probe.seed), hardware)
        encoders |= {"pixels": pixel_encoder, "histogram": histogram_encoder}
    features = extract(encoders, pairs, hardware=hardware, batch_size=probe.batch_size, advance=advance)
    scores = {name: score(pair) for name, pair in features.items()}
    trained = scores["trained"]
    spread = dispersion(features["trained"].first)
    report: dict[str, Any] = {"n": trained.n, "baseline": trained.baseline, **trained.summary(), **spread}
    if baselines:
        report["baselines"] = {name: s.summary() for name, s in scores.items() if name != "trained"}
        for name in ("random_init",):
            report["baselines"][name] |= dispersion(features[name].first)
        interval = bootstrap_difference(
            trained.percentile_ranks, scores["random_init"].percentile_ranks, draws=probe.bootstrap, seed=probe.seed
        )
        report["rank_minus_random_init_95"] = list(interval)
        report["checks"] = checks(report, probe)
        report["passed"] = all(check["passed"] for check in report["checks"].values())
    return report


def checks(report: dict[str, Any], probe: ProbeConfig) -> dict[str, dict[str, Any]]:
    """The three conditions of a pass, each with the sentence that the console prints.

    A ratio alone proves nothing: untrained and even collapsed encoders retrieve above chance on CT.
    """
    high = report["rank_minus_random_init_95"][1]
    random_rank = report["baselines"]["random_init"]["mean_percentile_rank"]
    std, cosine = report["feature_std"], report["mean_cosine"]
    return {
        "ratio": {
            "passed": report["ratio"] >= probe.min_ratio,
            "says": f"ratio {report['ratio']:.1f}, needs {probe.min_ratio:g} (probe.min_ratio)",
        },
        "rank": {
            "passed": high < 0,
            "says": f"mean percentile rank {report['mean_percentile_rank']:.3f} against {random_rank:.3f} untrained, "
            f"95 % interval of the difference up to {high:+.3f}, needs below 0",
        },
        "collapse": {
            "passed": std >= probe.min_feature_std and cosine <= probe.max_mean_cosine,
            "says": f"feature std {std:.3f}, needs {probe.min_feature_std:g} (raw {report['feature_std_raw']:.4f}); "
            f"mean cosine {cosine:.3f}, at most {probe.max_mean_cosine:g}",
        },
    }

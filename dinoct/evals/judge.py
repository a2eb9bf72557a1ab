"""From an encoder to a verdict: view retrieval beside its baselines, the other probes, signs of collapse.

The fitted probes are imported where they are asked for: judging while a run trains needs no scikit-learn, whose import
takes half as long as torch's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from dinoct.config import ModelConfig, ProbeConfig
from dinoct.data.index import SliceIndex
from dinoct.data.labels import Labels
from dinoct.data.masks import MaskError, MaskStore
from dinoct.data.store import SliceStore
from dinoct.data.views import probe_spec
from dinoct.errors import DinoctError
from dinoct.evals.correspondence import Correspondence
from dinoct.evals.features import (
    Encoder,
    FixedViews,
    WholeSlices,
    backbone_encoder,
    choose_slices,
    encode,
    histogram_encoder,
    neighbours,
    pixel_encoder,
)
from dinoct.evals.retrieval import (
    ONE_PATIENT,
    dispersion,
    one_per_series,
    patient_interval,
    patients_weighing,
    score,
    score_hard,
    spectrum,
)
from dinoct.evals.verdict import checks
from dinoct.hardware import Hardware
from dinoct.models.load import random_backbone

Begin = Callable[[str, int], Callable[[int], None]]  # (what, slices) -> told of each finished batch
MASK_GRID = 16  # patches per side at least: in fewer, hardly one is filled by a lung
FITTED = {"position", "scanner", "labels"}  # probes that are fitted on slices of the training side


@dataclass(frozen=True)
class ProbeData:
    """What there is to judge on. `train` is only ever used to fit probes on frozen features."""

    val: SliceIndex
    store: SliceStore
    train: SliceIndex | None = None
    labels: tuple[Labels, Labels] | None = None  # of train and val
    masks: MaskStore | None = None


def judge(
    backbone: nn.Module,
    model: ModelConfig,
    probe: ProbeConfig,
    data: ProbeData,
    *,
    n: int,
    hardware: Hardware,
    baselines: bool = True,
    begin: Begin = lambda what, total: lambda done: None,
) -> dict[str, Any]:
    """Judge a backbone on at most n slices of the validation side.

    Returns:
        What the JSON file holds: figures of the encoder and of each baseline, the probes, the verdict with its reasons.
    """
    encoders = {"trained": backbone_encoder(backbone, hardware)}
    if baselines:
        encoders["random_init"] = backbone_encoder(random_backbone(model, seed=probe.seed), hardware)
        encoders |= {"pixels": pixel_encoder(model.patch), "histogram": histogram_encoder}
    room = _Room(encoders, model, probe, data, hardware, begin)
    rows = choose_slices(data.val, n, probe.seed)
    patches = Correspondence()
    whole = bool({"position", "scanner", "labels", "purity"} & set(probe.probes))
    look = patches.look if "correspondence" in probe.probes else None
    views = room.encode("views", room.views(rows, whole=whole), look=look)  # by encoder [n, 2 or 3, D]
    if broken := int((~views["trained"].isfinite()).flatten(1).any(dim=1).sum()):
        raise DinoctError(f"the encoder gives NaN or infinity for {broken} of {len(rows)} slices: it is broken")
    val = data.val.select(rows)
    report = _retrieval(views, val)
    report["probes"] = room.probes(views, rows, patches)
    if baselines:
        report["checks"] = checks(report, probe)
        report["passed"] = all(check["passed"] for check in report["checks"].values())
    return report


def _retrieval(views: Mapping[str, Tensor], val: SliceIndex) -> dict[str, Any]:
    """View retrieval of all encoders, with intervals over patients."""
    scores = {name: score(x[:, 0], x[:, 1]) for name, x in views.items()}
    patients, trained = val.patient, scores["trained"]
    k, weighing = len(np.unique(patients)), patients_weighing(patients)
    report: dict[str, Any] = {"n": trained.n, "patients": k, "patients_weighing": weighing}
    report |= {"baseline": trained.baseline, **trained.summary()}
    report |= dispersion(views["trained"][:, 0])
    few = f" who weigh as {weighing:.1f}" if weighing < 0.9 * k else ""
    report["intervals"] = f"over {k} patients{few}, Student's t" if k > 1 else ONE_PATIENT
    report["mean_percentile_rank_95"] = _interval(trained.percentile_ranks, patients, low=0)
    report["singular_values"] = spectrum(views["trained"][:, 0])
    if "random_init" in scores:
        report["baselines"] = {name: s.summary() for name, s in scores.items() if name != "trained"}
        for name, row in report["baselines"].items():
            row["mean_percentile_rank_95"] = _interval(scores[name].percentile_ranks, patients, low=0)
        report["baselines"]["random_init"] |= dispersion(views["random_init"][:, 0])
        difference = trained.percentile_ranks - scores["random_init"].percentile_ranks
        report["rank_minus_random_init_95"] = _interval(difference, patients, low=-1)
    return report


def _interval(values: np.ndarray, patients: np.ndarray, *, low: float) -> list[float] | None:
    """`patient_interval`, cut where no mean can lie: below `low`, above 1."""
    found = patient_interval(values, patients)
    return found and [max(found[0], low), min(found[1], 1.0)]


@dataclass
class _Room:
    """The encoders and what they are judged on."""

    encoders: Mapping[str, Encoder]
    model: ModelConfig
    probe: ProbeConfig
    data: ProbeData
    hardware: Hardware
    begin: Begin

    def encode(self, what: str, slices: WholeSlices, **more: Any) -> dict[str, Tensor]:
        return encode(
            self.encoders,
            slices,
            hardware=self.hardware,
            batch_size=self.probe.batch_size,
            advance=self.begin(what, len(slices)),
            **more,
        )

    def views(self, rows: np.ndarray, *, whole: bool) -> FixedViews:
        size = self.model.img_size
        spec, grid = probe_spec(self.probe, size), size // self.model.patch
        return FixedViews(self.data.val, self.data.store, rows, self.probe, spec, grid=grid, whole=whole)

    def probes(self, views: Mapping[str, Tensor], rows: np.ndarray, patches: Correspondence) -> dict[str, Any]:
        """The figures of the probes asked for, by probe and encoder."""
        asked, val = set(self.probe.probes), self.data.val.select(rows)
        out: dict[str, Any] = {"one_per_series": self._one_per_series(views, val)}
        if "correspondence" in asked:
            out["correspondence"] = patches.summary()
        if "hard_negatives" in asked:
            out["hard_negatives"] = self._hard_negatives(views, rows)
        whole = {name: x[:, 2].numpy() for name, x in views.items() if x.shape[1] > 2}
        if "purity" in asked:
            from dinoct.evals.linear import series_purity

            out["purity"] = series_purity(whole, val.series)
        if asked & FITTED:
            out |= self._fitted(asked, whole, rows)
        if "masks" in asked:
            out["masks"] = self._masks()
        return out

    def _one_per_series(self, views: Mapping[str, Tensor], val: SliceIndex) -> dict[str, Any]:
        first = one_per_series(val.series)
        if len(first) < 2:
            return {"not_measured": "one series alone"}
        return {name: {**score(x[first, 0], x[first, 1]).summary(), "n": len(first)} for name, x in views.items()}

    def _hard_negatives(self, views: Mapping[str, Tensor], rows: np.ndarray) -> dict[str, Any]:
        offsets = self.probe.hard_offsets
        places, beside = neighbours(self.data.val, rows[: self.probe.hard_n], offsets)
        if not len(places):
            return {"not_measured": "no slice with neighbours in its series"}
        needed, where = np.unique(beside, return_inverse=True)
        keys = self.encode("neighbours", self.views(needed, whole=False))
        where = where.reshape(beside.shape)
        return {name: score_hard(x[places, 0], x[places, 1], keys[name][where, 1]) for name, x in views.items()}

    def _fitted(self, asked: set[str], whole: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, Any]:
        train, val = self.data.train, self.data.val.select(rows)
        if train is None:
            return {name: {"not_measured": "no training side to fit on"} for name in sorted(asked & FITTED)}
        fit_rows = choose_slices(train, self.probe.fit_n, self.probe.seed)
        if "labels" in asked and self.data.labels:  # labelled slices may be few: a draw of their own
            labelled = np.flatnonzero(self.data.labels[0].codes >= 0)
            labelled = labelled[choose_slices(train.select(labelled), self.probe.fit_n, self.probe.seed)]
            fit_rows = np.unique(np.concatenate([fit_rows, labelled]))
        slices = WholeSlices(train, self.data.store, fit_rows, self.probe, size=self.model.img_size)
        fit = {name: x[:, 0].numpy() for name, x in self.encode("probes", slices).items()}
        from dinoct.evals.linear import label_probes, position_probe, relative_position

        out: dict[str, Any] = {}
        if "position" in asked:
            target, fit_target = relative_position(self.data.val)[rows], relative_position(train)[fit_rows]
            out["position"] = position_probe(fit, fit_target, whole, target)
        if "scanner" in asked:
            out |= self._scanner(train.select(fit_rows), fit, val, whole)
        if "labels" in asked and self.data.labels:
            codes = self.data.labels[0].codes[fit_rows], self.data.labels[1].codes[rows]
            out["labels"] = label_probes(fit, codes[0], whole, codes[1])
        elif "labels" in asked:
            out["labels"] = {"not_measured": "no labels.csv (probe.labels)"}
        return out

    @staticmethod
    def _scanner(
        train: SliceIndex, fit: Mapping[str, np.ndarray], val: SliceIndex, judged: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        from dinoct.evals.linear import shortcut_probe

        both = {name: np.concatenate([fit[name], judged[name]]) for name in fit}
        patients = np.concatenate([train.patient, val.patient])  # one index, so the codes are the same
        out = {}
        for what in ("manufacturer", "kernel"):
            names = getattr(train, f"{what}_names")
            classes = [names[code] for side in (train, val) for code in getattr(side, what)]
            out[f"scanner_{what}"] = shortcut_probe(both, classes, patients)
        return out

    def _masks(self) -> dict[str, Any]:
        if self.data.masks is None or self.data.train is None:
            return {"not_measured": "no masks (probe.masks)"}
        from dinoct.evals.structure import mask_probe

        try:
            return mask_probe(
                {name: encoder for name, encoder in self.encoders.items() if name != "histogram"},
                (self.data.train, self.data.val),
                self.data.store,
                self.data.masks,
                self.probe,
                size=self.probe.masks_px or max(self.model.img_size, MASK_GRID * self.model.patch),
                patch=self.model.patch,
                hardware=self.hardware,
            )
        except MaskError as error:  # masks that are no good do not cost the other figures
            return {"not_measured": str(error)}

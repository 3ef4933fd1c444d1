"""AUROCs of scores, and what an evaluation writes: results.json, scores.csv, figures.

Scores here are larger for normal images, as published; AUROCs and ROC curves take their negative.
N images per set.
"""

import csv
import io
import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from common.checkpoint import save_text_atomic
from common.figures import roc_curves, score_histogram
from common.files import write_atomic
from common.metrics import Interval, binary_intervals, format_interval
from dia.settings import OodScore

HISTOGRAM_BINS = 40
NORMAL = "normal"
"""Name of the normal images among the scored sets; every other set is of anomalies."""
ANY_SCORE = f"(?:{'|'.join(get_args(OodScore))})"
FILE_OF_SCORE = re.compile(
    rf"scores_{ANY_SCORE}\.csv|(?:histogram|roc)_{ANY_SCORE}\.png|score_{ANY_SCORE}_.+\.npy"
)
"""Names of the files that write_scores writes."""


class SetScores(NamedTuple):
    """Scores of one set of images."""

    names: Sequence[str]
    scores: np.ndarray
    """(N,), larger = more normal."""


class Results(NamedTuple):
    """AUROCs of one score."""

    by_set: dict[str, Interval]
    one_class_mean: float
    """Mean of the sets' AUROCs."""
    pooled: Interval
    """AUROC against all sets' anomalies together."""


def compare(sets: Mapping[str, SetScores], *, n_resamples: int = 0, seed: int = 0) -> Results:
    """AUROC of the normals against every other set, their mean, and against all of them pooled.

    With bootstrap intervals from n_resamples draws.
    """

    def auroc(anomalous: np.ndarray) -> Interval:
        labels, scores = labelled(sets[NORMAL].scores, anomalous)
        return binary_intervals(labels, scores, n_resamples=n_resamples, seed=seed)["auroc"]

    others = {name: scored.scores for name, scored in sets.items() if name != NORMAL}
    by_set = {name: auroc(scores) for name, scores in others.items()}
    mean = float(np.mean([interval.value for interval in by_set.values()]))
    return Results(by_set, mean, auroc(np.concatenate(list(others.values()))))


def labelled(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels, 1 = anomalous, and scores of which larger = more anomalous, as metrics take them."""
    labels = np.repeat([0.0, 1.0], [len(normal), len(anomalous)])
    return labels, -np.concatenate([normal, anomalous])


def table(results: Mapping[str, Results], *, selected_by: str) -> str:
    """A printed table: one row per set, then mean and pooled, one column per score."""
    rows = {"AUROC (normal vs.)": list(results)}
    for name in next(iter(results.values())).by_set:
        rows[name] = [format_interval(result.by_set[name], 4) for result in results.values()]
    rows["one_class_mean"] = [f"{result.one_class_mean:.4f}" for result in results.values()]
    rows["pooled"] = [format_interval(result.pooled, 4) for result in results.values()]
    lines = [name.ljust(22) + "".join(f"{c:>28}" for c in cells) for name, cells in rows.items()]
    return "\n".join([*lines, f"Checkpoint chosen by: {selected_by}"])


def deciles(name: str, scores: np.ndarray) -> str:
    """Mean, deviation and deciles of scores (N,), as --print_score shows them."""
    quantiles = np.quantile(scores, np.arange(0, 1.1, 0.1))
    text = "    ".join(f"q{10 * i}: {value:.4f}" for i, value in enumerate(quantiles))
    return f"{name:18s} {scores.mean():.4f} +- {scores.std():.4f}    {text}"


def scores_csv(score: str, sets: Mapping[str, SetScores]) -> str:
    """Rows file, set, score, label; label 0 = normal, 1 = anomalous, larger score = more normal."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "set", score, "label"])
    for name, scored in sets.items():
        for file, value in zip(scored.names, scored.scores.tolist(), strict=True):
            writer.writerow([file, name, f"{value:.9g}", int(name != NORMAL)])
    return text.getvalue()


def write_scores(
    folder: Path, score: str, sets: Mapping[str, SetScores], *, arrays: bool
) -> set[str]:
    """Writes one score's CSV, histogram and ROC curves, and with arrays its .npy files.

    Returns the files' names.
    """
    from sklearn.metrics import roc_curve  # slow to import

    written = {f"scores_{score}.csv", f"histogram_{score}.png", f"roc_{score}.png"}
    save_text_atomic(scores_csv(score, sets), folder / f"scores_{score}.csv")
    every = np.concatenate([scored.scores for scored in sets.values()])
    edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-6), HISTOGRAM_BINS + 1)
    counts = {name: np.histogram(scored.scores, edges)[0] for name, scored in sets.items()}
    score_histogram(
        edges, counts, folder / f"histogram_{score}.png", score_name=f"{score}, larger = normal"
    )
    normal = sets[NORMAL].scores
    curves = {
        name: roc_curve(*labelled(normal, scored.scores))[:2]
        for name, scored in sets.items()
        if name != NORMAL
    }
    roc_curves(curves, folder / f"roc_{score}.png")
    if arrays:
        for name, scored in sets.items():
            path = folder / f"score_{score}_{name}.npy"
            write_atomic(path, partial(np.save, arr=scored.scores))
            written.add(path.name)
    return written


def remove_others(folder: Path, written: Collection[str]) -> None:
    """Removes what write_scores wrote here in an earlier evaluation; other files stay."""
    for path in sorted(folder.iterdir()):
        if FILE_OF_SCORE.fullmatch(path.name) and path.name not in written and path.is_file():
            path.unlink()


def write_results(
    folder: Path, results: Mapping[str, Results], facts: Mapping[str, object]
) -> None:
    """Writes results.json: facts of the evaluation and every score's AUROCs."""
    scores = {
        score: {
            "auroc": {name: interval._asdict() for name, interval in result.by_set.items()},
            "one_class_mean": result.one_class_mean,
            "one_class_pooled": result.pooled._asdict(),
        }
        for score, result in results.items()
    }
    plain = {**facts, "scores": scores}
    save_text_atomic(json.dumps(plain, indent=2) + "\n", folder / "results.json")

"""What a demo reports: one table of all methods, results.json and a contact sheet.

Heatmaps are by method, then training seed, then case; larger = more anomalous.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.checkpoint import save_text_atomic
from common.figures import SheetRow, contact_sheet
from common.metrics import Interval, mean_intervals, score_heatmap

Heatmaps = Mapping[str, Sequence[Sequence[NDArray[np.float32]]]]


class Case(NamedTuple):
    """A test image and what is known about it; arrays are (H, W)."""

    name: str
    """File name within the test folder."""
    image: Tensor
    """(1, H, W) float in [0, 1]."""
    truth: NDArray[np.bool_]
    """True on lesions; both values must occur among the pixels that count."""
    body: NDArray[np.bool_]
    """True on the pixels that count."""
    group: str = "all"
    """Rows of the table are per group, for instance a kind of lesion."""


class Row(NamedTuple):
    """One method on one group of images."""

    group: str
    method: str
    auroc: Interval
    """Pixel AUROC, mean over images and training seeds; 95 % bootstrap interval over images."""
    ap: Interval
    """The same for the average precision."""
    auroc_by_seed: tuple[float, ...]
    """Mean over images for each training seed."""
    ap_by_seed: tuple[float, ...]


def compare(
    cases: Sequence[Case], heatmaps: Heatmaps, *, n_resamples: int = 1000, bootstrap_seed: int = 0
) -> list[Row]:
    """Table rows: every method on every group of cases, all on the same pixels.

    heatmaps: method -> training seed -> case, (H, W) each. Groups come in the order of the cases,
    methods as given. Raises ValueError where the number of heatmaps is not that of the cases.
    """
    rows = []
    scores = {method: _scores(cases, by_seed, method) for method, by_seed in heatmaps.items()}
    for group in dict.fromkeys(case.group for case in cases):
        chosen = [number for number, case in enumerate(cases) if case.group == group]
        for method, values in scores.items():
            part = values[:, chosen]  # (seeds, images, 2)
            mean = part.mean(0)
            columns = {"auroc": mean[:, 0], "ap": mean[:, 1]}
            intervals = mean_intervals(columns, n_resamples=n_resamples, seed=bootstrap_seed)
            auroc, ap = part.mean(1).T.tolist()
            rows.append(
                Row(group, method, intervals["auroc"], intervals["ap"], tuple(auroc), tuple(ap))
            )
    return rows


def _scores(
    cases: Sequence[Case], by_seed: Sequence[Sequence[NDArray]], method: str
) -> NDArray[np.float64]:
    """AUROC and AP (seeds, images, 2)."""
    for maps in by_seed:
        if len(maps) != len(cases):
            raise ValueError(f"{method}: {len(maps)} heatmaps for {len(cases)} images")
    return np.array(
        [
            [
                score_heatmap(heat, case.truth, ~case.body)
                for heat, case in zip(maps, cases, strict=True)
            ]
            for maps in by_seed
        ]
    )


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; ± is the standard deviation over several training seeds."""
    n_seeds = max(len(row.auroc_by_seed) for row in rows)
    note = f" (± over {n_seeds} training seeds)" if n_seeds > 1 else ""
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        lines += ["", f"{group:<26}{'pixel AUROC':<32}average precision{note}"]
        for row in rows:
            if row.group == group:
                auroc, ap = _cell(row.auroc, row.auroc_by_seed), _cell(row.ap, row.ap_by_seed)
                lines.append(f"  {row.method:<24}{auroc:<32}{ap}")
    return "\n".join(lines)


def _cell(interval: Interval, by_seed: Sequence[float]) -> str:
    text = f"{interval.value:.3f}"
    if len(by_seed) > 1:
        text += f" ± {np.std(by_seed, ddof=1):.3f}"
    if interval.low is not None:
        text += f" [{interval.low:.3f}, {interval.high:.3f}]"
    return text


def save_results(
    rows: Sequence[Row],
    cases: Sequence[Case],
    heatmaps: Heatmaps,
    shown: Sequence[str],
    output: Path,
    record: Mapping[str, object],
) -> None:
    """Writes results.json (rows and `record`) and contact_sheet.png to output.

    The sheet shows image, truth and the heatmaps of the methods `shown`, of the first training
    seed, for the first cases of every group, about six in all.
    """
    table = [
        {**row._asdict(), "auroc": row.auroc._asdict(), "ap": row.ap._asdict()} for row in rows
    ]
    text = json.dumps({"rows": table, **record}, indent=2)
    save_text_atomic(text + "\n", output / "results.json")
    groups = list(dict.fromkeys(case.group for case in cases))
    per_group = max(1, 6 // len(groups))
    numbers = []
    for group in groups:
        numbers += [n for n, case in enumerate(cases) if case.group == group][:per_group]
    pictures = [
        SheetRow(
            cases[n].name,
            cases[n].image.numpy(),
            cases[n].truth,
            [heatmaps[m][0][n] for m in shown],
        )
        for n in numbers
    ]
    contact_sheet(pictures, output / "contact_sheet.png", columns=list(shown))

"""A folder of heatmaps with annotations, small enough to check by hand."""

import csv
from pathlib import Path

import numpy as np
import torch

from common.images import write_image
from inpainter.evaluation import EvaluationSettings

SIZE = (8, 10)
BOXES = "image,top,left,height,width\na.png,1,2,2,3\nsub/b.png,4,5,3,3\nsub/b.png,0,0,1,1\n"


def heatmap_of(image: str, metric: str) -> np.ndarray:
    """Rising from 0 to 79 over the image; `good` adds 100 within a.png's box and 40 in b.png's."""
    heatmap = np.arange(80.0, dtype=np.float32).reshape(SIZE)
    if metric == "good" and image == "a.png":
        heatmap[1:3, 2:5] += 100
    if metric == "good" and image == "sub/b.png":
        heatmap[4:7, 5:8] += 40
    return heatmap


def heatmap_folder(tmp_path: Path) -> EvaluationSettings:
    """Two images with a lesion and a normal one, two metrics each, with boxes."""
    folder = tmp_path / "heatmaps"
    (folder / "data").mkdir(parents=True)
    rows = [("image", "metric", "file")]
    for image in ("a.png", "sub/b.png", "c.png"):
        write_image(tmp_path / "images" / image, torch.full(SIZE, 0.5))
        for metric in ("good", "flat"):
            name = f"data/{image.removesuffix('.png').replace('/', '__')}_{metric}.pt"
            torch.save(torch.from_numpy(heatmap_of(image, metric)), folder / name)
            rows.append((image, metric, name))
    with (folder / "heatmaps.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "command.txt").write_text("python predict_heatmap.py --checkpoint_iter 7\n")
    (tmp_path / "boxes.csv").write_text(BOXES)
    return EvaluationSettings(folder, tmp_path / "boxes.csv", n_resamples=20)


def expected_auroc(image: str, metric: str, boxes: list[tuple[int, int, int, int]]) -> float:
    """Share of the pairs (lesion pixel, other pixel) that are in the right order, ties half."""
    lesion = np.zeros(SIZE, bool)
    for top, left, height, width in boxes:
        lesion[top : top + height, left : left + width] = True
    heatmap = heatmap_of(image, metric)
    pairs = heatmap[lesion][:, None] - heatmap[~lesion][None]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())

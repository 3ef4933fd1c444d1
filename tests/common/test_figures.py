"""Figures: files of the right size and content, and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.figures import (
    DPI,
    SheetRow,
    contact_sheet,
    heatmap_panel,
    precision_recall_curves,
    roc_curves,
    score_histogram,
)


def pixels(path: Path) -> np.ndarray:
    """(H, W, 3) int."""
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def colourful(picture: np.ndarray) -> int:
    """Number of pixels that are not grey."""
    return int((np.ptp(picture, axis=2) > 40).sum())


@pytest.mark.parametrize("shape", [(30, 40), (1, 30, 40), (3, 30, 40)])
def test_panel_of_grey_and_colour_images_and_of_tensors(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    heatmap = torch.linspace(0, 1, 1200).reshape(30, 40)
    heatmap_panel(torch.full(shape, 0.5), heatmap, tmp_path / "sub" / "a.png", "title")
    picture = pixels(tmp_path / "sub" / "a.png")
    assert picture.shape[1] == pytest.approx(10.2 * DPI, abs=2)
    assert colourful(picture) > 10_000
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a.png"]


def test_part_that_is_not_computed_yet_is_not_coloured(tmp_path: Path) -> None:
    heatmap = np.ones((30, 40)) * np.arange(40)
    heatmap_panel(np.full((30, 40), 0.5), heatmap, tmp_path / "all.png")
    heatmap[:, 20:] = np.nan
    heatmap_panel(np.full((30, 40), 0.5), heatmap, tmp_path / "half.png")
    heatmap[:] = np.nan
    heatmap_panel(np.full((30, 40), 0.5), heatmap, tmp_path / "none.png")
    amounts = [colourful(pixels(tmp_path / f"{name}.png")) for name in ("all", "half", "none")]
    assert amounts[0] > amounts[1] > amounts[2]


def test_boxes_are_drawn_on_both_pictures(tmp_path: Path) -> None:
    image, heatmap = np.full((30, 40), 0.5), np.zeros((30, 40))
    heatmap_panel(image, heatmap, tmp_path / "plain.png")
    heatmap_panel(image, heatmap, tmp_path / "boxes.png", boxes=[(5, 5, 10, 10, "mass")])
    changed = np.argwhere((pixels(tmp_path / "plain.png") != pixels(tmp_path / "boxes.png")).any(2))
    columns = np.unique(changed[:, 1])
    assert columns.min() < 5.1 * DPI < columns.max()


@pytest.mark.parametrize("title", [r"$\frac{1}{$.png", "a$$b.png", "日本.png", "m" * 400])
def test_any_name_is_a_title(tmp_path: Path, title: str) -> None:
    image, heatmap = np.full((8, 8), 0.5), np.arange(64.0).reshape(8, 8)
    heatmap_panel(image, heatmap, tmp_path / "a.png", title, score_name=title)
    row = SheetRow(title, image, np.eye(8), [heatmap])
    contact_sheet([row], tmp_path / "sheet.png", columns=[title], title=title)
    x = np.linspace(0, 1, 5)
    roc_curves({title: (x, x)}, tmp_path / "roc.png", title)
    score_histogram(np.arange(3.0), {title: np.ones(2, int)}, tmp_path / "h.png", title)
    assert all((tmp_path / f"{name}.png").is_file() for name in ("a", "sheet", "roc", "h"))


def test_constant_heatmap_is_drawn(tmp_path: Path) -> None:
    heatmap_panel(np.zeros((8, 8)), np.full((8, 8), 3.0), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_heatmap_of_another_size_than_the_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scan 7: image is \(8, 8\), map is \(8, 9\)"):
        heatmap_panel(np.zeros((8, 8)), np.zeros((8, 9)), tmp_path / "a.png", "scan 7")
    with pytest.raises(ValueError, match=r"expected \(H, W\), \(1, H, W\) or \(3, H, W\)"):
        heatmap_panel(np.zeros((8, 8, 3)), np.zeros((8, 8)), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_contact_sheet_has_a_row_per_image_and_a_column_per_heatmap(tmp_path: Path) -> None:
    truth = np.zeros((16, 16))
    truth[4:9, 4:9] = 1
    row = SheetRow("a", np.full((16, 16), 0.5), truth, [np.eye(16), None])
    contact_sheet([row], tmp_path / "one.png", columns=["x", "y"], title="t")
    contact_sheet([row] * 3, tmp_path / "three.png", columns=["x", "y"])
    one, three = pixels(tmp_path / "one.png"), pixels(tmp_path / "three.png")
    assert one.shape[1] == three.shape[1] == pytest.approx(8.3 * DPI, abs=2)
    assert three.shape[0] - one.shape[0] == pytest.approx(2 * 2.0 * DPI, abs=2)


def test_contact_sheet_refuses_rows_that_do_not_fit(tmp_path: Path) -> None:
    row = SheetRow("scan", np.zeros((8, 8)), np.zeros((8, 8)), [np.zeros((8, 8))])
    with pytest.raises(ValueError, match="scan: 1 heatmaps, 2 columns"):
        contact_sheet([row], tmp_path / "a.png", columns=["x", "y"])
    with pytest.raises(ValueError, match=r"scan, truth: image is \(8, 8\), map is \(4, 4\)"):
        contact_sheet([row._replace(truth=np.zeros((4, 4)))], tmp_path / "a.png", columns=["x"])
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([], tmp_path / "a.png", columns=["x"])


def test_curves_and_histogram_are_saved(tmp_path: Path) -> None:
    x = np.linspace(0, 1, 20)
    lines = {f"metric {i}": (x, x ** (1 / (i + 1))) for i in range(9)}
    roc_curves(lines, tmp_path / "roc.png", "ROC")
    precision_recall_curves(lines, tmp_path / "pr.png", prevalence=0.1)
    counts = {"normal": np.arange(10), "lesion": np.zeros(10, int)}
    score_histogram(np.linspace(0, 1, 11), counts, tmp_path / "scores.png")
    for name in ("roc", "pr", "scores"):
        assert colourful(pixels(tmp_path / f"{name}.png")) > 500

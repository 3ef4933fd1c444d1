"""Heatmaps against annotations: numbers, what is left out, refusals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from common.config import ConfigError
from common.image_names import AnnotationError
from common.images import write_image
from inpainter.evaluation import EvaluationSettings, evaluate_heatmaps
from inpainter.evaluation_report import per_image_csv, result_table
from inpainter.heatmap_tables import EvaluationError
from tests.inpainter.evaluation_case import BOXES, SIZE, heatmap_folder


@pytest.fixture
def settings(tmp_path: Path) -> EvaluationSettings:
    return heatmap_folder(tmp_path)


def test_pooled_values_and_image_level_ones_come_with_intervals(
    settings: EvaluationSettings,
) -> None:
    good, flat = evaluate_heatmaps(settings).results
    assert good.pooled["auroc"].value > flat.pooled["auroc"].value
    assert good.pooled["auroc"].low <= good.pooled["auroc"].value <= good.pooled["auroc"].high
    assert flat.image_level["auroc"].value == 0.5  # all three maxima are 79
    assert set(good.pooled) == {"auroc", "ap", "pro"}


def test_only_lesion_images_have_no_image_level_score(settings: EvaluationSettings) -> None:
    settings.annotations.write_text(BOXES + "c.png,0,0,2,2\n")
    result = evaluate_heatmaps(settings).results[0]
    assert result.image_level is None
    assert "images, by their largest score" not in result_table([result])


def test_masks_give_the_same_numbers_as_boxes(settings: EvaluationSettings, tmp_path: Path) -> None:
    boxes = {"a.png": [(1, 2, 2, 3)], "sub/b.png": [(4, 5, 3, 3), (0, 0, 1, 1)]}
    for image, rectangles in boxes.items():
        mask = torch.zeros(SIZE)
        for top, left, height, width in rectangles:
            mask[top : top + height, left : left + width] = 1
        write_image(tmp_path / "masks" / image, mask)
    from_boxes = evaluate_heatmaps(settings).results[0]
    from_masks = evaluate_heatmaps(replace(settings, annotations=tmp_path / "masks")).results[0]
    assert from_masks.rows == from_boxes.rows
    assert from_masks.pooled == from_boxes.pooled


def test_ignored_and_empty_pixels_do_not_count(
    settings: EvaluationSettings, tmp_path: Path
) -> None:
    ignore = torch.zeros(SIZE)
    ignore[3:] = 1  # leaves 30 pixels of a.png
    write_image(tmp_path / "ignore" / "a.png", ignore)
    image = torch.full(SIZE, 0.5)
    image[:, 5:] = 0  # leaves 40 pixels of c.png
    write_image(tmp_path / "images" / "c.png", image)
    narrowed = replace(
        settings,
        ignore_masks=tmp_path / "ignore",
        image_dir=tmp_path / "images",
        inside_tissue=0.1,
    )
    rows = evaluate_heatmaps(narrowed).results[0].rows
    assert [row.pixels for row in rows] == [30, 80, 40]
    assert rows[2].max_score == 74  # row 7, column 4


def test_order_of_images_changes_nothing(settings: EvaluationSettings) -> None:
    path = settings.heatmap_dir / "heatmaps.csv"
    before = evaluate_heatmaps(replace(settings, n_resamples=0)).results
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(rows)]) + "\n")
    after = evaluate_heatmaps(replace(settings, n_resamples=0)).results
    for one, other in zip(before, after[::-1], strict=True):
        assert one.metric == other.metric
        for level in ("per_image", "pooled", "image_level"):
            for name, interval in getattr(one, level).items():
                assert interval.value == pytest.approx(getattr(other, level)[name].value, abs=1e-12)


def break_heatmap(settings: EvaluationSettings, how: str) -> None:
    path = settings.heatmap_dir / "data" / "a_good.pt"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "missing":
        path.unlink()
    elif how == "nan":
        torch.save(torch.full(SIZE, float("nan")), path)
    elif how == "size":
        torch.save(torch.zeros(3, *SIZE), path)
    else:
        settings.annotations.write_text(BOXES + "a.png,90,0,1,1\n")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"a_good\.pt .* is truncated"),
        ("missing", r"No a_good\.pt in"),
        ("nan", "80 of 80 scores are NaN or infinite"),
        ("size", r"expected a tensor \(H, W\) of floats, found a tensor \(3, 8, 10\)"),
        ("outside", r"lies outside the image of \(8, 10\)"),
    ],
)
def test_image_that_cannot_be_evaluated_is_left_out_and_named_or_stops_the_run(
    settings: EvaluationSettings, how: str, message: str
) -> None:
    break_heatmap(settings, how)
    result = evaluate_heatmaps(settings).results[0]
    assert list(result.excluded) == ["a.png"]
    assert [row.image for row in result.rows] == ["sub/b.png", "c.png"]
    assert "Left out: 1 images (a.png)" in result_table([result])
    assert per_image_csv([result]).splitlines()[-1].startswith("a.png,good,,")
    with pytest.raises(EvaluationError, match=rf"(?s)a\.png, good: .*{message}"):
        evaluate_heatmaps(replace(settings, on_bad_image="error"))


def test_image_whose_lesion_is_all_ignored_is_not_taken_for_a_normal_one(
    settings: EvaluationSettings, tmp_path: Path
) -> None:
    ignore = torch.zeros(SIZE)
    ignore[1:3] = 1
    write_image(tmp_path / "ignore" / "a.png", ignore)
    result = evaluate_heatmaps(replace(settings, ignore_masks=tmp_path / "ignore")).results[0]
    assert "all its lesion pixels are ignored" in result.excluded["a.png"]


def test_constant_heatmap_counts_as_chance_and_is_named(settings: EvaluationSettings) -> None:
    torch.save(torch.ones(SIZE), settings.heatmap_dir / "data" / "a_good.pt")
    result = evaluate_heatmaps(settings).results[0]
    assert result.rows[0].auroc == 0.5
    assert "Constant heatmaps (AUROC 0.5 by definition): a.png" in result_table([result])


def test_annotation_without_heatmap_is_refused_or_skipped(settings: EvaluationSettings) -> None:
    settings.annotations.write_text(BOXES + "d.png,0,0,1,1\n")
    with pytest.raises(AnnotationError, match=r"line 5: no image is called 'd\.png'"):
        evaluate_heatmaps(settings)
    skipped = evaluate_heatmaps(replace(settings, on_unknown_image="skip"))
    assert skipped.sources.annotations.skipped == ("d.png",)


def test_nothing_to_find_is_refused(settings: EvaluationSettings) -> None:
    settings.annotations.write_text("image,top,left,height,width\n")
    with pytest.raises(EvaluationError, match="good: none of 3 images has a lesion"):
        evaluate_heatmaps(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,metric\n", r"columns \['file'\] are missing"),
        ("image,metric,file\n", "lists no heatmap"),
        ("image,metric,file\na.png,good\n", "line 2: a value is missing"),
        ("image,metric,file\na.png,m,x\na.png,m,y\n", r"line 3: \('a\.png', 'm'\) is there twice"),
    ],
)
def test_malformed_list_of_heatmaps_is_refused(
    settings: EvaluationSettings, text: str, message: str
) -> None:
    (settings.heatmap_dir / "heatmaps.csv").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        evaluate_heatmaps(settings)


def test_paths_may_be_given_as_text(settings: EvaluationSettings) -> None:
    paths = (str(settings.heatmap_dir), str(settings.annotations))
    assert EvaluationSettings(*paths, n_resamples=settings.n_resamples) == settings


def test_settings_that_make_no_sense_are_refused(settings: EvaluationSettings) -> None:
    with pytest.raises(ConfigError, match="inside_tissue needs the images"):
        replace(settings, inside_tissue=0.1)
    with pytest.raises(ConfigError, match=r"grey value in \[0, 1\), got 2"):
        replace(settings, inside_tissue=2, image_dir=Path("images"))
    with pytest.raises(EvaluationError, match="No folder of images"):
        evaluate_heatmaps(replace(settings, image_dir=Path("nowhere")))


def test_volumes_of_masks_are_compared_with_the_images_that_were_scored(tmp_path: Path) -> None:
    """Mask volume of 4 slices; of the image's 3 one was scored."""
    settings = heatmap_folder(tmp_path)
    images, masks = tmp_path / "volumes", tmp_path / "masks"
    for folder, n in ((images, 3), (masks, 4)):
        folder.mkdir()
        tifffile.imwrite(folder / "a.tif", np.ones((n, *SIZE), np.uint8), photometric="minisblack")
    rows = "image,metric,file\na.tif#001,flat,data/a_flat.pt\n"
    (settings.heatmap_dir / "heatmaps.csv").write_text(rows)
    (settings.heatmap_dir / "run.txt").write_text(f"images: {images}\n")
    settings = replace(settings, annotations=masks)
    with pytest.raises(AnnotationError, match=r"has 4 slices, .* its image a.tif is #002"):
        evaluate_heatmaps(settings)
    (settings.heatmap_dir / "run.txt").unlink()
    with pytest.raises(AnnotationError, match=r"has 4 slices, .* its image a.tif is #002"):
        evaluate_heatmaps(replace(settings, image_dir=images))

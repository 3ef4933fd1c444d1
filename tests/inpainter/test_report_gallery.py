"""The gallery shows what was completed at the peaks, by the very weights behind the heatmaps."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inpainter.calibrate import calibrate
from inpainter.evaluation import Evaluation, EvaluationSettings, evaluate_heatmaps
from inpainter.report_gallery import gallery, tiled
from tests.tiny_runs import (
    heatmaps_in,
    predicted,
    tiny_config,
    write_checkpoint,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CENTRED = ("test.heatmap_alignment=centred", "test.patch_stride=8", "netG.dropout_which=ALL")


@pytest.fixture
def evaluation(folder: Path) -> Evaluation:
    """Three images scored at two metrics; 0.png has a box in its corner, where no peak is."""
    metrics = "test.heatmap_metrics=[MCD_image, MeanCD_image]"
    result = predicted(folder, tiny_config(folder, metrics, *CENTRED))
    peaks = heatmaps_in(result.folder)["0.png"] == heatmaps_in(result.folder)["0.png"].max()
    top = 0 if not peaks[:4, :4].any() else 44
    (folder / "boxes.csv").write_text(f"image,top,left,height,width\n0.png,{top},0,4,4\n")
    settings = EvaluationSettings(
        result.folder, folder / "boxes.csv", image_dir=folder / "test", n_resamples=0
    )
    return evaluate_heatmaps(settings)


def test_each_image_has_a_strip_at_its_peak_and_one_in_lesions_beside_it(evaluation) -> None:
    entries = {entry.name: entry for entry in gallery(evaluation, 3).entries}
    wide = {name: [p for p in entry.pictures if p.wide] for name, entry in entries.items()}
    assert [len(wide[name]) for name in ("0.png", "1.png", "2.png")] == [2, 1, 1]
    peak = heatmaps_in(evaluation.settings.heatmap_dir)["1.png"].numpy()
    y, x = np.unravel_index(peak.argmax(), peak.shape)
    (strip,) = wide["1.png"]
    assert strip.caption.startswith(
        f"at the peak (column {x}, row {y}): 2 completions, the closest"
    )
    assert wide["0.png"][1].caption.startswith("in the lesion (column ")
    picture = Image.open(io.BytesIO(strip.data))
    assert picture.size == strip.size
    assert picture.height == 128
    assert picture.width > 5 * 128


def test_completions_of_every_scale_are_shown(folder) -> None:
    more = ("test.calibration=knn", "test.scales=[1, 0.5]", "test.calibration_windows=60")
    config = tiny_config(folder, "test.heatmap_metrics=[MCD_image]", *CENTRED, *more)
    write_images(folder / "train", n=4, size=(64, 64))
    calibrate(config, folder / "model", "latest")
    result = predicted(folder, config)
    (folder / "boxes.csv").write_text("image,top,left,height,width\n0.png,0,0,4,4\n")
    settings = EvaluationSettings(
        result.folder, folder / "boxes.csv", image_dir=folder / "test", n_resamples=0
    )
    (entry,) = gallery(evaluate_heatmaps(settings), 1).entries
    captions = [picture.caption for picture in entry.pictures if picture.wide]
    places = [caption.split(" (")[0] for caption in captions]
    assert places[:2] == ["at the peak", "at the peak, at scale 0.5"]


def test_weights_that_changed_since_are_not_shown_for_those_that_scored(evaluation, folder) -> None:
    other = write_checkpoint(folder / "other", tiny_config(folder), step=2)
    (other / "gen_00000002.pt").replace(folder / "model" / "gen_00000001.pt")
    shown = gallery(evaluation, 3)
    assert "model has other weights by now" in shown.note
    assert not any(picture.wide for entry in shown.entries for picture in entry.pictures)


def test_checkpoint_that_is_gone_costs_the_strips_alone(evaluation, folder) -> None:
    (folder / "model" / "gen_00000001.pt").unlink()
    shown = gallery(evaluation, 3)
    assert "No completions are shown: " in shown.note
    assert len(shown.entries) == 3


def test_completions_stand_in_rows() -> None:
    pictures = [np.full((16, 16), value / 10) for value in range(5)]
    whole = tiled(pictures)  # two rows of three, the last cell white; a pixel of white between
    assert whole.shape == (34, 51)
    assert [whole[0, 0], whole[0, 17], whole[0, 34], whole[17, 0], whole[17, 17]] == [
        0, 0.1, 0.2, 0.3, 0.4,
    ]  # fmt: skip
    assert whole[17:, 34:].min() == 1
    assert tiled(pictures[:1]).shape == (17, 17)

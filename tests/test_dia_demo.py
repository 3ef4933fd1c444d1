"""The DIA demo: local changes, baselines, table, and the commands at their smallest."""

import numpy as np
import pytest

from common.config import REPOSITORY
from common.local_changes import CHANGES
from common.metrics import Interval
from common.pixel_baselines import nearest_neighbour, pca_reconstruction
from dia.demo import (
    Counts,
    Job,
    Row,
    baseline_scores,
    findings,
    format_table,
    run_jobs,
    write_images,
)

ARCHIVE = REPOSITORY / "benchmarks" / "data" / "fashion_mnist.npz"
BAG = 8


def bag() -> np.ndarray:
    """A grey box with a thin arc-like strap, (32, 32)."""
    image = np.zeros((32, 32), np.float32)
    image[14:28, 6:26] = 0.7
    image[6:14, 9:11] = image[6:14, 21:23] = image[6:8, 9:23] = 0.4
    return image


@pytest.mark.parametrize("name", CHANGES)
def test_change_stays_inside_the_object_and_its_mask_shows_it(name: str) -> None:
    before = bag()
    image, mask = CHANGES[name](before, np.random.default_rng(1))
    assert 12 <= mask.sum() < 100
    assert np.array_equal(np.abs(image - before) > 0.05, mask)
    assert not mask[before == 0].any()
    if name == "missing_strap":
        assert image[:14].max() == 0
        assert np.array_equal(image[14:], before[14:])


def test_image_without_place_for_a_change_gives_none() -> None:
    empty, random = np.zeros((32, 32), np.float32), np.random.default_rng(0)
    clutch = np.where(np.arange(32)[:, None] > 20, np.float32(0.5), 0) * np.ones((1, 32))
    assert CHANGES["hole"](empty, random) is None
    assert CHANGES["stain"](empty, random) is None
    assert CHANGES["missing_strap"](clutch, random) is None


def test_pixel_baselines_by_hand() -> None:
    train = np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    test = np.array([[2.0, 0.0], [3.0, 1.0]])
    assert nearest_neighbour(train, test) == pytest.approx([0, 2**0.5])
    assert pca_reconstruction(train, test, components=1) == pytest.approx([0, 1], abs=1e-9)


def test_images_of_the_archive_are_written_with_changes_and_scored(tmp_path) -> None:
    written = write_images(ARCHIVE, tmp_path, BAG, Counts(train=6, test=4, per_other_class=1))
    assert written["bag"] == 4
    assert {"hole", "stain", "ankle_boot"} <= set(written)
    assert len(list((tmp_path / "train" / "bag").iterdir())) == 6
    masks = sorted(path.name for path in (tmp_path / "masks" / "hole").iterdir())
    assert masks == sorted(path.name for path in (tmp_path / "test" / "hole").iterdir())
    scores = baseline_scores(tmp_path, "bag")["1-NN on pixels"]
    assert len(scores["other_classes"]) == 9
    assert scores["other_classes"].mean() > scores["bag"].mean()


def test_table_and_findings_say_what_won() -> None:
    rows = [
        Row("hole", "DIA", Interval(0.8, 0.7, 0.9), 0),
        Row("hole", "DIA", Interval(0.6, 0.5, 0.7), 1),
        Row("hole", "CSI", Interval(0.75, 0.7, 0.8), 0),
    ]
    assert "0.700 ± 0.141" in format_table(rows)
    assert "0.750 [0.700, 0.800]" in format_table(rows)
    assert findings(rows, "DIA", ["CSI"]) == ["hole: DIA is 0.050 below CSI"]


def test_failed_command_is_named_with_its_log(tmp_path) -> None:
    said = []
    with pytest.raises(RuntimeError, match=r"no_such_script\.py.*status 2.*broken\.log"):
        run_jobs([Job("broken", [["no_such_script.py"]])], tmp_path, said.append)
    assert said == ["$ python no_such_script.py"]
    assert "No such file" in (tmp_path / "broken.log").read_text()

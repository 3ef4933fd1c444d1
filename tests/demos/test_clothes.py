"""The DIA demo: local changes, baselines, table, and the commands at their smallest."""

import numpy as np
import pytest

from common.config import REPOSITORY
from common.metrics import Interval
from demos.baselines import nearest_neighbour, pca_reconstruction
from demos.data.clothes import (
    CHANGES,
    TISSUE_CHANGES,
    Counts,
    clothes,
    draw_tissue,
    tissue,
    write_images,
)
from demos.dia_report import Job, Row, baseline_scores, findings, format_table, run_jobs

ARCHIVE = REPOSITORY / "demos" / "data" / "fashion_mnist.npz"


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


@pytest.mark.parametrize("name", TISSUE_CHANGES)
def test_changed_tissue_differs_where_its_mask_says(name: str) -> None:
    random = np.random.default_rng(3)
    before = draw_tissue(random, 32)
    image, mask = TISSUE_CHANGES[name](before, random)
    assert np.array_equal(np.abs(image - before) > 0.05, mask)
    rows, columns = np.nonzero(mask)
    if name.endswith("_texture"):
        assert mask.mean() > 0.3
    else:
        assert np.hypot(rows - rows.mean(), columns - columns.mean()).max() < 12


def test_tissue_looks_the_same_from_every_side() -> None:
    images = np.stack(tissue(Counts(train=150, test=0)).train)
    along_rows, along_columns = (np.abs(np.diff(images, axis=axis)).mean() for axis in (1, 2))
    assert along_rows == pytest.approx(along_columns, rel=0.02)
    assert images.mean(axis=0).std() < 0.03


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
    counts = Counts(train=6, test=4, per_other_class=1)
    written = write_images(clothes(ARCHIVE, "bag", counts), tmp_path)
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
    one_seed = [row for row in rows if row.seed != 1]
    assert findings(one_seed, [("DIA", "CSI")]) == ["hole: DIA is 0.050 above CSI"]
    rows.append(Row("hole", "CSI", Interval(0.7, 0.6, 0.8), 1))
    found = "hole: DIA is 0.025 below CSI (sd 0.106, higher with 1 of 2 seeds)"
    assert findings(rows, [("DIA", "CSI")]) == [found]
    rows.append(Row("hole", "1-NN", Interval(0.65, 0.6, 0.8)))
    found = "hole: DIA is 0.050 above 1-NN (sd 0.141, higher with 1 of 2 seeds)"
    assert findings(rows, [("DIA", "1-NN")]) == [found]


def test_failed_command_is_named_with_its_log(tmp_path) -> None:
    said = []
    with pytest.raises(RuntimeError, match=r"no_such_script\.py.*status 2.*broken\.log"):
        run_jobs([Job("broken", [["no_such_script.py"]])], tmp_path, said.append)
    assert said == ["$ python no_such_script.py"]
    assert "No such file" in (tmp_path / "broken.log").read_text()


def test_job_waits_for_the_one_that_it_needs(tmp_path) -> None:
    write = "import pathlib, time; time.sleep(0.2); pathlib.Path({!r}).touch()"
    need = "import pathlib, sys; sys.exit(not pathlib.Path({!r}).exists())"
    path = str(tmp_path / "model")
    jobs = [
        Job("model", [["-c", write.format(path)]]),
        Job("user", [["-c", need.format(path)]], after="model"),
    ]
    assert list(run_jobs(jobs, tmp_path, lambda text: None)) == ["model", "user"]

"""The lung CTs' fetching, reading and slicing, on small made volumes and without a network."""

import json
import tarfile
from pathlib import Path

import nrrd
import numpy as np
import pytest

from common.images import read_image
from demos.data.lung_ct import (
    FILES,
    LungCTError,
    Volume,
    body_mask,
    check_hashes,
    fetch_volumes,
    prepare,
    read_volume,
    split,
    write_slices,
)


def made_volume(tumour_slices: tuple[int, ...] = (3, 4), count: int = 8) -> Volume:
    """Slices of 64 x 64: a round body of 40 HU with a lung of -800 HU, a table below it."""
    rows, columns = np.mgrid[:64, :64]
    hu = np.full((count, 64, 64), -1000, np.int16)
    hu[:, (rows - 28) ** 2 + (columns - 32) ** 2 < 22**2] = 40
    hu[:, (rows - 28) ** 2 + (columns - 32) ** 2 < 12**2] = -800
    hu[:, 60:62, 4:60] = 200
    tumour = np.zeros(hu.shape, bool)
    for number in tumour_slices:
        tumour[number, 24:32, 28:36] = True
    hu[tumour] = 30
    return Volume(hu, tumour, 2.0)


def made_archive(folder: Path, leave_out: str = "", zoom: int = 1) -> Path:
    """A .tar.gz laid out like the source distribution; zoom: repeats pixels."""
    data = folder / "pyradiomics-3.0.1" / "data"
    data.mkdir(parents=True)
    for name in ("lung1", "lung2"):
        volume = made_volume()
        spacing = {"space directions": np.diag([2.0, 2.0, 5.0])}
        for kind, array in (("image", volume.hu), ("label", volume.tumour.astype("i2"))):
            zoomed = array.repeat(zoom, 1).repeat(zoom, 2)
            nrrd.write(str(data / f"{name}_{kind}.nrrd"), zoomed.transpose(2, 1, 0), spacing)
    archive = folder / "pyradiomics-3.0.1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(data.iterdir()):
            if path.name != leave_out:
                tar.add(path, f"pyradiomics-3.0.1/data/{path.name}")
    return archive


def test_volumes_come_out_of_the_archive_as_they_went_in(tmp_path):
    folder = fetch_volumes(tmp_path / "volumes", made_archive(tmp_path))
    volume = read_volume(folder, "lung2")
    np.testing.assert_array_equal(volume.hu, made_volume().hu)
    np.testing.assert_array_equal(volume.tumour, made_volume().tumour)
    assert volume.pixel_mm == 2.0


def test_volumes_that_are_there_are_not_fetched_again(tmp_path):
    folder = fetch_volumes(tmp_path / "volumes", made_archive(tmp_path))
    assert fetch_volumes(folder, tmp_path / "no such archive.tar.gz") == folder


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "incomplete"])
def test_unusable_archive_is_named_and_nothing_half_written_stays(tmp_path, damage):
    archive = made_archive(tmp_path / "in", leave_out=FILES[3] if damage == "incomplete" else "")
    match damage:
        case "missing":
            archive.unlink()
        case "cut":
            archive.write_bytes(archive.read_bytes()[:700])
        case "other":
            archive.write_bytes(b"not an archive")
    with pytest.raises(LungCTError, match=r"pyradiomics-3\.0\.1\.tar\.gz"):
        fetch_volumes(tmp_path / "out" / "volumes", archive)
    assert list((tmp_path / "out").iterdir()) == []


def test_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(LungCTError, match="pass --archive"):
        fetch_volumes(tmp_path / "out" / "volumes")
    assert list((tmp_path / "out").iterdir()) == []


def test_fetched_file_of_other_content_is_refused(tmp_path):
    for name in FILES:
        (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(LungCTError, match=r"lung1_image\.nrrd .* expected 379fa48b"):
        check_hashes(tmp_path)


def test_image_and_label_of_different_size_are_refused(tmp_path):
    nrrd.write(str(tmp_path / "lung1_image.nrrd"), np.zeros((4, 4, 3), "i2"))
    nrrd.write(str(tmp_path / "lung1_label.nrrd"), np.zeros((4, 4, 2), "i2"))
    with pytest.raises(LungCTError, match=r"\(4, 4, 3\) and its label \(4, 4, 2\)"):
        read_volume(tmp_path, "lung1")


def test_volume_without_pixel_size_is_refused(tmp_path):
    for kind in ("image", "label"):
        nrrd.write(str(tmp_path / f"lung1_{kind}.nrrd"), np.zeros((4, 4, 3), "i2"))
    with pytest.raises(LungCTError, match="space directions"):
        read_volume(tmp_path, "lung1")


def test_broken_volume_is_named(tmp_path):
    (tmp_path / "lung1_image.nrrd").write_bytes(b"NRRD0004\ntype: short\n")
    with pytest.raises(LungCTError, match=r"lung1_image\.nrrd cannot be read"):
        read_volume(tmp_path, "lung1")


def test_body_holds_the_lung_and_not_the_table():
    inside = body_mask(made_volume().hu)[0]
    assert inside[28, 32]  # lung
    assert inside[10, 32]  # chest wall
    assert not inside[60:62].any()  # table
    assert not inside[:4].any()  # air


def test_slices_are_windowed_to_zero_and_one_and_resampled():
    volume = made_volume()
    volume.hu[0, :8, :16] = np.repeat([-2000, 3000], 8)
    slices = prepare(volume, 4.0)
    assert slices.images.shape == slices.tumour.shape == slices.body.shape == (8, 32, 32)
    assert slices.images[0, 1, 1] == 0
    assert slices.images[0, 1, 6] == 1
    assert slices.images[0, 5, 16] == pytest.approx(1040 / 1400, abs=1e-6)
    assert slices.tumour[3].sum() == 16
    assert prepare(volume, 3.0).images.shape == (8, 43, 43)


def test_pixels_finer_than_scanned_are_refused():
    with pytest.raises(LungCTError, match=r"1\.5 mm are finer than the scan's 2\.0 mm"):
        prepare(made_volume(), 1.5)


def test_training_slices_keep_their_distance_from_every_tumour():
    normal, with_tumour = split(made_volume((3, 4)).tumour)
    assert with_tumour == [3, 4]
    assert normal == [0, 1, 6, 7]


def test_written_slices_and_masks_read_back(tmp_path):
    slices = prepare(made_volume(), 4.0)
    (path,) = write_slices(slices, [3], tmp_path, masks=True)
    np.testing.assert_allclose(read_image(path)[0], slices.images[3], atol=1 / 65535)
    tumour = read_image(tmp_path / "tumour" / path.name)[0].numpy() > 0
    outside = read_image(tmp_path / "outside" / path.name)[0].numpy() > 0
    np.testing.assert_array_equal(tumour, slices.tumour[3])
    np.testing.assert_array_equal(outside, ~slices.body[3])


@pytest.mark.slow
def test_demo_trains_both_directions_and_ends_in_tables(tmp_path, run_demo):
    """The whole of demos/ct.py, with a few steps on made volumes."""
    where = ("--output", tmp_path / "out", "--archive", made_archive(tmp_path, zoom=2))
    tables = run_demo("demos/ct.py", "--tiny", *where)
    for direction in ("lung1_to_lung2", "lung2_to_lung1"):
        results = json.loads((tmp_path / "out" / direction / "results.json").read_text())
        auroc = {row["method"]: row["auroc"]["value"] for row in results["rows"]}
        assert {"MCD_image", "MCD_feature", "no_dropout", "knn_16x16"} <= set(auroc)
        assert all(0 <= value <= 1 for value in auroc.values())
        assert (tmp_path / "out" / direction / "contact_sheet.png").is_file()
        assert direction.replace("_to_", " -> ") in tables

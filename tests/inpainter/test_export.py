"""Exported heatmaps, images named one by one, and what DICOM objects say of their source."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from common.config import ConfigError
from common.figures import overlay
from common.images import ImageError
from inpainter.dicom_export import references_in
from inpainter.normal_scores import set_operating_point
from inpainter.prediction import PredictionResult
from tests.tiny_runs import (
    PREDICT,
    heatmaps_in,
    predicted,
    read_table,
    run_script,
    texture,
    tiny_config,
    tiny_file,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ONE = "test.heatmap_metrics=[MCD_image]"
STEM = "MCD_image_2_0.5_16_32_16"
CT, MAMMOGRAM = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.1.2"
ENHANCED_CT, ULTRASOUND = "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.3.1"


def write_dicom(path: Path, kind: str, seed: int = 0) -> Dataset:
    """A scan of 40 x 44 pixels with all that identifies it; a CT has a place in space."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = kind, generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.PatientSex = "Doe^Jane", "P7", "F"
    for keyword in ("PatientBirthDate", "AccessionNumber", "ReferringPhysicianName", "StudyID"):
        setattr(dataset, keyword, "")
    dataset.StudyDate, dataset.StudyTime = "20200102", "1200"
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "OT", 1, 1
    dataset.Manufacturer, dataset.PatientOrientation = "maker", ["A", "F"]
    if kind == CT:
        dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = generate_uid(), ""
        dataset.ImagePositionPatient = [1, 2, 3]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing, dataset.SliceThickness = [0.5, 0.5], 2
    levels = (texture(40, 44, seed=seed)[0].numpy() * 4095).astype(np.uint16)
    dataset.Rows, dataset.Columns = levels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation, dataset.PixelData = 0, levels.tobytes()
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    path.parent.mkdir(exist_ok=True, parents=True)
    dataset.save_as(path, enforce_file_format=True)
    return dataset


def write_frames(path: Path, kind: str) -> Dataset:
    """The same of three frames; those of a CT have places in space."""
    dataset = write_dicom(path, CT if kind == ENHANCED_CT else MAMMOGRAM)
    dataset.SOPClassUID = kind
    dataset.NumberOfFrames, dataset.PixelData = 3, dataset.PixelData * 3
    if kind == ENHANCED_CT:
        shared, frames = Dataset(), []
        shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [Dataset()], [Dataset()]
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        measures = shared.PixelMeasuresSequence[0]
        measures.PixelSpacing, measures.SliceThickness = [0.5, 0.5], 2
        for number in range(3):
            frame = Dataset()
            frame.PlanePositionSequence = [Dataset()]
            frame.PlanePositionSequence[0].ImagePositionPatient = [1, 2, 2 * number]
            frames.append(frame)
        dataset.SharedFunctionalGroupsSequence = [shared]
        dataset.PerFrameFunctionalGroupsSequence = frames
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            delattr(dataset, keyword)
    dataset.save_as(path, enforce_file_format=True)
    return dataset


def exported(folder: Path, *kinds: str, **options: object) -> PredictionResult:
    return predicted(folder, tiny_config(folder, ONE), export=kinds, **options)


def with_findings_everywhere(folder: Path) -> None:
    """An operating point below every score of a finished image."""
    root = write_images(folder / "normal", n=4, size=(48, 64))
    arguments = (folder / "model", "latest", sorted(root.iterdir()), root)
    path, point = set_operating_point(tiny_config(folder, ONE), *arguments, specificity=0.5)
    metric = point.metrics["MCD_image"]
    object.__setattr__(metric, "image_threshold", metric.image_threshold / 10)
    object.__setattr__(metric, "pixel_threshold", metric.image_threshold)
    point.save(path)


def test_arrays_and_16_bit_pictures_hold_the_scores_by_the_recorded_scale(folder) -> None:
    result = exported(folder, "npy", "png16")
    heat = heatmaps_in(result.folder)["1.png"].numpy()
    assert np.array_equal(np.load(result.folder / f"export/npy/1_{STEM}.npy"), heat)
    rows = read_table(result.folder / "export/scales.csv")
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png"]
    (row,) = [row for row in rows if row["image"] == "1.png"]
    assert (row["kind"], row["file"]) == ("png16", f"export/png16/1_{STEM}.png")
    picture = Image.open(result.folder / row["file"])
    stored = np.array(picture).astype(float)
    assert stored.max() == 65535
    low, high = float(row["low"]), float(row["high"])
    assert np.abs(low + stored / 65535 * (high - low) - heat).max() <= (high - low) / 65535
    assert float(picture.text["score_at_0"]) == heat.min()
    assert float(picture.text["score_at_65535"]) == heat.max()


def test_overlay_is_as_large_as_the_image_with_findings_outlined(folder) -> None:
    with_findings_everywhere(folder)
    result = exported(folder, "overlay")
    picture = np.array(Image.open(result.folder / f"export/overlay/0_{STEM}.png"))
    assert picture.shape == (48, 64, 3)
    mask = np.array(Image.open(result.folder / f"masks/0_{STEM}.png")) > 0
    assert mask.any()
    outline = (picture == (53, 224, 255)).all(axis=2)
    assert outline.any()
    assert mask[outline].all()
    rows = read_table(result.folder / "export/scales.csv")
    assert len({(row["low"], row["high"]) for row in rows}) == 1  # one scale for all images


def test_without_an_operating_point_each_overlay_has_its_own_scale(folder) -> None:
    rows = read_table(exported(folder, "overlay").folder / "export/scales.csv")
    maps = heatmaps_in(next((folder / "heatmaps").glob("*/*/*")))
    for row in rows:
        assert np.float32(row["low"]) == maps[row["image"]].min().numpy()
        assert np.float32(row["high"]) == maps[row["image"]].max().numpy()


def test_overlay_outlines_regions_by_their_border() -> None:
    mask = np.zeros((6, 6), dtype=bool)
    mask[1:5, 1:5] = True
    drawn = overlay(np.zeros((6, 6)), np.zeros((6, 6)), (0, 1), outlined=mask)
    outline = (drawn == (53, 224, 255)).all(axis=2)
    assert outline.sum() == 12
    assert not outline[2:4, 2:4].any()


@pytest.mark.parametrize("kind", [CT, MAMMOGRAM], ids=["in space", "without a place"])
def test_dicom_objects_refer_to_their_source_and_hold_scores_and_findings(folder, kind) -> None:
    with_findings_everywhere(folder)
    source = write_dicom(folder / "scans" / "scan.dcm", kind)
    result = exported(folder, "dicom", images=[folder / "scans" / "scan.dcm"])
    made = {
        what: pydicom.dcmread(result.folder / f"export/dicom/scan_{STEM}_{what}.dcm")
        for what in ("overlay", "map", "findings")
    }
    assert [made[what].SOPClassUID.name for what in made] == [
        "Secondary Capture Image Storage",
        "Parametric Map Storage",
        "Segmentation Storage",
    ]
    for each in made.values():
        for keyword in ("PatientName", "PatientID", "PatientSex", "StudyInstanceUID", "StudyDate"):
            assert each[keyword].value == source[keyword].value
        assert each.SeriesInstanceUID != source.SeriesInstanceUID
        referred = [item for _, item in references_in(each)]
        assert {item.ReferencedSOPInstanceUID for item in referred} == {source.SOPInstanceUID}
        assert {item.ReferencedSOPClassUID for item in referred} == {kind}
        assert (each.Rows, each.Columns) == (40, 44)
    heat = heatmaps_in(result.folder)["scan.dcm"].numpy()
    assert np.array_equal(np.squeeze(made["map"].pixel_array), heat)
    mask = np.array(Image.open(result.folder / f"masks/scan_{STEM}.png")) > 0
    assert np.array_equal(np.squeeze(made["findings"].pixel_array) > 0, mask)
    assert made["overlay"].pixel_array.shape == (40, 44, 3)
    assert made["map"].get("FrameOfReferenceUID") == source.get("FrameOfReferenceUID")
    assert list(made["overlay"].PatientOrientation) == ["A", "F"]


@pytest.mark.parametrize("kind", [ENHANCED_CT, ULTRASOUND], ids=["in space", "without a place"])
def test_dicom_objects_of_a_frame_name_the_frame(folder, kind) -> None:
    with_findings_everywhere(folder)
    source = write_frames(folder / "scans" / "scan.dcm", kind)
    result = exported(folder, "dicom", images=[folder / "scans"])
    assert result.finished == [f"scan.dcm#{number:03d}" for number in range(3)]
    assert not any("not exported" in note for note in result.notes)
    for number in range(3):
        stem = result.folder / f"export/dicom/scan.dcm#{number:03d}_{STEM}"
        for what in ("overlay", "map", "findings"):
            made = pydicom.dcmread(f"{stem}_{what}.dcm")
            items = [item for _, item in references_in(made)]
            assert {item.ReferencedSOPInstanceUID for item in items} == {source.SOPInstanceUID}
            assert {item.ReferencedSOPClassUID for item in items} == {kind}
            assert {
                item.ReferencedFrameNumber for item in items if "ReferencedFrameNumber" in item
            } == {number + 1}
            assert made.InstanceNumber == number + 1
            if kind == ENHANCED_CT and what != "overlay":
                (frame,) = made.PerFrameFunctionalGroupsSequence
                place = frame.PlanePositionSequence[0].ImagePositionPatient
                assert list(place) == [1, 2, 2 * number]


def test_scans_of_a_series_make_a_series_and_other_files_are_counted(folder) -> None:
    first, second = (write_dicom(folder / "test" / f"{n}.dcm", CT, n) for n in (7, 8))
    second.SeriesInstanceUID = first.SeriesInstanceUID
    second.save_as(folder / "test" / "8.dcm", enforce_file_format=True)
    result = exported(folder, "dicom")
    maps = [pydicom.dcmread(p) for p in sorted((result.folder / "export/dicom").glob("*_map.dcm"))]
    assert len({each.SeriesInstanceUID for each in maps}) == 1
    assert [each.InstanceNumber for each in maps] == [1, 2]
    assert not list((result.folder / "export/dicom").glob("*findings*"))
    assert "3 without DICOM output: they are no DICOM files: 0.png, 1.png, 2.png" in result.notes


def test_source_that_lacks_what_dicom_demands_is_named_and_the_run_goes_on(folder, caplog) -> None:
    source = write_dicom(folder / "scans" / "scan.dcm", CT)
    del source.SeriesInstanceUID
    source.save_as(folder / "scans" / "scan.dcm", enforce_file_format=True)
    result = exported(folder, "npy", "dicom", images=[folder / "scans"])
    assert result.finished == ["scan.dcm"]
    assert any("1 not exported as DICOM" in note for note in result.notes)
    assert "scan.dcm: no DICOM overlay can be derived of it" in caplog.text
    assert not list(result.folder.rglob("*.dcm*"))
    assert list(result.folder.rglob("*.npy"))


def test_files_and_folders_are_named_below_the_folder_that_holds_them_all(folder) -> None:
    write_images(folder / "other" / "deep", n=2, size=(48, 64))
    images = [folder / "test" / "1.png", folder / "other" / "deep"]
    result = exported(folder, images=images)
    assert result.finished == ["test/1.png", "other/deep/0.png", "other/deep/1.png"]
    again = exported(folder, images=images)
    assert (again.folder, again.finished) == (result.folder, [])
    one = exported(folder, images=[folder / "test" / "1.png"])
    assert (one.folder != result.folder, one.finished) == (True, ["1.png"])
    two = exported(folder, images=[folder / "test" / "2.png"])
    assert two.folder != one.folder  # or the first would be lost from the tables
    whole = exported(folder, images=[folder / "test"])
    assert whole.finished == ["0.png", "1.png", "2.png"]
    assert exported(folder).folder == whole.folder  # as by --image_dir
    maps = heatmaps_in(one.folder)["1.png"], heatmaps_in(whole.folder)["1.png"]
    assert torch.equal(*maps)


def test_images_that_are_not_there_or_named_twice_over_are_refused(folder) -> None:
    with pytest.raises(ImageError, match=r"There is no file or folder .*9\.png"):
        exported(folder, images=[folder / "test" / "9.png"])
    with pytest.raises(ConfigError, match="Name images, or give --image_dir, not both"):
        exported(folder, images=[folder / "test"], image_dir=folder / "test")
    config = tiny_config(folder, ONE, "test.save_heatmap_data=false")
    with pytest.raises(ConfigError, match=r"--export needs .*save_heatmap_data: true"):
        predicted(folder, config, export=["npy"])


def test_command_line_scores_named_files_by_the_checkpoints_settings(folder) -> None:
    tiny_file(folder, ONE).rename(folder / "model" / "config.yaml")
    write_dicom(folder / "scan.dcm", CT)
    command = [PREDICT, folder / "test" / "0.png", folder / "scan.dcm"]
    command += ["--checkpoint_dir", folder / "model", "--output_dir", folder / "out"]
    done = run_script(*command, "--export", "overlay,png16,npy,dicom")
    assert done.returncode == 0, done.stderr
    assert "2 images scored" in done.stdout
    assert "1 without DICOM output: they are no DICOM files: test/0.png" in done.stdout
    assert {path.name for path in (folder / "out" / "export").iterdir()} == {
        *("overlay", "png16", "npy", "dicom", "scales.csv"),
    }
    refused = run_script(*command, "--export", "overlay,gif")
    assert refused.returncode == 2
    assert "'gif' is unknown; expected some of overlay,png16,npy,dicom" in refused.stderr

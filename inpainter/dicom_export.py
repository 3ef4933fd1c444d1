"""DICOM objects derived from a DICOM image: overlay, heatmap and findings, which refer to it.

Secondary Capture (the overlay in colour), Parametric Map (the scores, float32) and Segmentation
(the findings). Patient and study are those of the source, copied by highdicom: what identifies the
patient there does so here. Of a file of several frames each frame has objects of its own, which
name the frame.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import open_regular, write_atomic
from common.image_files import DICOM_SUFFIXES, file_format
from common.volumes import split_slice
from inpainter.settings import Metric

MAKER = "PICARD"
MODEL = "picard-dia"
SERIES = {"overlay": 9001, "map": 9002, "findings": 9003}
"""Series numbers, behind those that scanners give."""
MEANINGS = {
    "MCD": "Minimum completion distance",
    "MeanCD": "Mean completion distance",
    "MedCD": "Median completion distance",
    "no_dropout": "Completion distance without dropout",
}
OUR_CODES = "99PICARD"
"""Coding scheme of quantities that no standard names."""
REFUSALS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What highdicom raises for a source that lacks what the derived object needs."""

logging.getLogger("highdicom").setLevel(logging.WARNING)  # else a line per module that it copies


class DicomError(UserError):
    """A derived DICOM object cannot be made of this source."""


def is_dicom(path: Path) -> bool:
    """Whether an image is a DICOM file. Raises ImageError."""
    file, _ = split_slice(path)
    kind = file_format(file)
    return kind == "dicom" or (kind is None and file.suffix.lower() in DICOM_SUFFIXES)


@dataclass
class DicomWriter:
    """Writes derived objects; those of one kind and metric from one series make one series."""

    made_by: str
    """The checkpoint, in words."""
    series: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """Series UID by kind, metric and the source's series."""
    instances: dict[str, int] = field(default_factory=dict)
    """Objects so far, by series UID."""

    def write_overlay(self, path: Path, source: Path, metric: Metric, colours: np.ndarray) -> None:
        """A secondary capture of (H, W, 3) uint8. Raises DicomError, as the others do."""
        from highdicom.sc import SCImage

        def make(header: Any, frame: int | None) -> Any:
            orientation = header.get("PatientOrientation")
            capture = SCImage.from_ref_dataset(
                ref_dataset=header,
                pixel_array=colours,
                photometric_interpretation="RGB",
                bits_allocated=8,
                coordinate_system="PATIENT",
                patient_orientation=("L", "F"),  # replaced below by what the source says
                transfer_syntax_uid="1.2.840.10008.1.2.1",
                manufacturer=MAKER,
                **self.identity("overlay", metric, header),
            )
            capture.PatientOrientation = orientation or None
            capture.SourceImageSequence = [reference_to(header, frame)]
            if "BurnedInAnnotation" in header:  # its pixels are below the colours
                capture.BurnedInAnnotation = header.BurnedInAnnotation
            capture.DerivationDescription = f"{metric} over the image; {self.made_by}"[:1024]
            return capture

        self.write(path, source, "overlay", make)

    def write_map(self, path: Path, source: Path, metric: Metric, heatmap: np.ndarray) -> None:
        """A parametric map of scores (H, W) float32."""
        from highdicom import VOILUTTransformation
        from highdicom.pm import RealWorldValueMapping
        from highdicom.sr.coding import CodedConcept

        low, high = float(heatmap.min()), float(heatmap.max())
        mapping = RealWorldValueMapping(
            lut_label=metric[:16],
            lut_explanation="anomaly score, larger is more anomalous",
            unit=CodedConcept("1", "UCUM", "no units"),
            value_range=(low, high),
            slope=1.0,
            intercept=0.0,
            quantity_definition=CodedConcept(metric[:16], OUR_CODES, meaning_of(metric)),
        )

        def make(header: Any, frame: int | None) -> Any:
            return map_class()(
                source_images=[header],
                pixel_array=heatmap[None],
                contains_recognizable_visual_features=False,
                real_world_value_mappings=[mapping],
                voi_lut_transformations=[
                    VOILUTTransformation((low + high) / 2, max(high - low, 1e-6))
                ],
                content_label="ANOMALY",
                content_description=f"{metric}, larger is more anomalous"[:64],
                plane_positions=position_of(header, frame),
                **self.identity("map", metric, header),
                **equipment(),
            )

        self.write(path, source, "map", make)

    def write_findings(self, path: Path, source: Path, metric: Metric, mask: np.ndarray) -> None:
        """A binary segmentation of a mask (H, W) bool that is not empty."""
        from highdicom import AlgorithmIdentificationSequence
        from highdicom.seg import Segmentation, SegmentDescription
        from pydicom.sr.codedict import codes

        algorithm = AlgorithmIdentificationSequence(
            name=MAKER, family=codes.DCM.ArtificialIntelligence, version=our_version()
        )
        segment = SegmentDescription(
            segment_number=1,
            segment_label=f"Finding by {metric}",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Lesion,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )

        def make(header: Any, frame: int | None) -> Any:
            return Segmentation(
                source_images=[header],
                pixel_array=mask[None].astype(np.uint8),
                segmentation_type="BINARY",
                segment_descriptions=[segment],
                content_label="FINDINGS",
                content_description=f"Above the operating point of {metric}"[:64],
                plane_positions=position_of(header, frame),
                **self.identity("findings", metric, header),
                **equipment(),
            )

        self.write(path, source, "findings", make)

    def identity(self, kind: str, metric: Metric, header: Any) -> dict[str, Any]:
        """Series and instance of an object that is about to be made."""
        from highdicom import UID

        key = (kind, metric, str(header.SeriesInstanceUID))
        series = self.series.setdefault(key, UID())
        self.instances[series] = self.instances.get(series, 0) + 1
        return {
            "series_instance_uid": series,
            "series_number": SERIES[kind],
            "sop_instance_uid": UID(),
            "instance_number": self.instances[series],
            "series_description": f"{MAKER} {metric} {kind}"[:64],
        }

    def write(
        self, path: Path, source: Path, kind: str, make: Callable[[Any, int | None], Any]
    ) -> None:
        """Makes the object of a source's header and frame (None: it has but one), and writes it."""
        from highdicom.spatial import get_image_coordinate_system
        from pydicom.uid import SecondaryCaptureImageStorage

        header, frame = source_header(source)
        kind_of_source = header.SOPClassUID
        if "NumberOfFrames" in header and get_image_coordinate_system(header) is None:
            # highdicom takes frames without a place in space only one by one, and of images alone
            # whose class knows no frames
            header.NumberOfFrames, header.SOPClassUID = 1, SecondaryCaptureImageStorage
        try:
            made = make(header, frame)
        except REFUSALS as error:
            reason = str(error) or type(error).__name__
            raise DicomError(
                f"{source}: no DICOM {kind} can be derived of it: {reason}. Export overlay, png16 "
                "or npy instead."
            ) from error
        for keyword, item in references_in(made):
            item.ReferencedSOPClassUID = kind_of_source
            if frame is not None and keyword == "SourceImageSequence":
                item.ReferencedFrameNumber = frame
        write_atomic(path, made.save_as)


def source_header(source: Path) -> tuple[Any, int | None]:
    """The attributes of a source without its pixels, and the frame that is meant, from 1.

    None for the only one of its file.
    """
    import pydicom

    file, number = split_slice(source)
    with open_regular(file) as opened:
        header = pydicom.dcmread(opened, stop_before_pixels=True, force=True)
    return header, None if number is None else number + 1


def position_of(header: Any, frame: int | None) -> list[Any] | None:
    """Where in space a frame of several lies; None where the image has but one, or no place."""
    from highdicom.utils import get_plane_positions_of_image

    if frame is None or int(header.NumberOfFrames) == 1:
        return None
    return [get_plane_positions_of_image(header)[frame - 1]]


def references_in(dataset: Any) -> Iterator[tuple[str, Any]]:
    """Every item of a derived object that names its source image, and the sequence it is in."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                if "ReferencedSOPInstanceUID" in item:
                    yield element.keyword, item
                yield from references_in(item)


def reference_to(header: Any, frame: int | None) -> Any:
    """An item of SourceImageSequence."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID = header.SOPClassUID
    item.ReferencedSOPInstanceUID = header.SOPInstanceUID
    if frame is not None:
        item.ReferencedFrameNumber = frame
    return item


@cache
def map_class() -> type:
    """highdicom's ParametricMap, which of an image without a place in space can be made, too.

    highdicom 0.28 leaves out the index of its one frame, and then refuses its own object.
    """
    from highdicom.pm import ParametricMap

    class PlacelessMap(ParametricMap):
        def _build_luts(self) -> None:
            for frame in self.PerFrameFunctionalGroupsSequence:
                content = frame.FrameContentSequence[0]
                if not content.get("DimensionIndexValues"):
                    content.FrameLabel = "1"  # what the only dimension counts
                    content.DimensionIndexValues = 1
            super()._build_luts()

    return PlacelessMap


def equipment() -> dict[str, Any]:
    """What made the object."""
    return {
        "manufacturer": MAKER,
        "manufacturer_model_name": MODEL,
        "software_versions": our_version(),
        "device_serial_number": "none",
    }


def our_version() -> str:
    """This package's version; "unknown" where it runs uninstalled."""
    try:
        return version(MODEL)
    except PackageNotFoundError:
        return "unknown"


def meaning_of(metric: Metric) -> str:
    """A metric in words, for those who do not know its name."""
    reduction, _, space = metric.partition("_")
    if metric in MEANINGS:
        return MEANINGS[metric]
    return f"{MEANINGS[reduction]} in {'pixels' if space == 'image' else 'features'}"

"""From an archive as downloaded to a tree that the programs read: links, annotations, a manifest.

No image is copied. `prepare` decides first where every picture belongs and writes then, so that a
refusal leaves nothing behind; what it did not take is in the manifest with the reason.
"""

import csv
import hashlib
import io
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.checkpoint import save_text_atomic
from common.datasets import RECORD, DatasetError
from common.datasets.pictures import Part, Picture
from common.files import open_regular, read_regular
from common.image_folders import shown_names
from common.image_names import without_suffix
from common.images import read_mask, write_image

LOG = logging.getLogger(__name__)
TEST_SHARE = 0.2
"""Of the normal patients (images, where no patient is named) whose part the archive leaves open."""
MANIFEST, BOXES, MASKS, METADATA = "manifest.csv", "annotations.csv", "masks", "metadata.csv"


@dataclass(frozen=True)
class Prepared:
    """What became of an archive."""

    folder: Path
    pictures: list[Picture]
    new: int
    """Files and links that were written; 0 where everything was there."""
    notes: list[str]
    """What the user should know, a sentence each."""


def prepare(
    name: str,
    pictures: Sequence[Picture],
    source: Path,
    folder: Path,
    *,
    normal: str,
    seed: int = 0,
    official: bool = False,
) -> Prepared:
    """Links an archive's pictures into train/<class>/ and test/<class>/ of a folder.

    Beside them: annotations.csv and masks/ (of test images, by their names below test/), where the
    archive has lesions; metadata.csv (image, label, patient); manifest.csv, which has every picture
    with its part, and why. normal: the class that is trained on. seed: draws the parts that the
    archive leaves open. official: keep the archive's own parts, though a patient may be in both.
    The same call again changes nothing. Raises DatasetError where the folder holds something else,
    or cannot hold links.
    """
    if folder.resolve().is_relative_to(source.resolve()):
        raise DatasetError(
            f"{folder} lies in the archive's folder {source}, in which it would be looked for "
            "images the next time. Pass a folder elsewhere."
        )
    record = {"archive": name, "source": os.path.abspath(source), "seed": seed}  # noqa: PTH100
    if official:
        record["official"] = True
    _check_folder(folder, record)
    drawn = _drawn(pictures, normal, seed)
    apart, notes = (drawn, []) if official else _patients_apart(drawn)
    resolved, more = _identical_apart(apart)
    _check_links(resolved)
    manifest = _manifest(resolved, source)
    if _places(_text_of(folder / MANIFEST) or manifest) != _places(manifest):
        raise DatasetError(
            f"{folder} was prepared from other files: its {MANIFEST} says otherwise than {source} "
            "does now. Pass a new folder."
        )
    new = _write(resolved, record, manifest, folder)
    return Prepared(folder, resolved, new, [*notes, *more])


def _check_folder(folder: Path, record: dict[str, object]) -> None:
    """Raises DatasetError unless the folder is missing, empty or prepared with the same record."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        found = json.loads(read_regular(folder / RECORD))
    except (OSError, ValueError):
        raise DatasetError(
            f"{folder} is not empty, and not a folder that `prepare` made. Pass a new one."
        ) from None
    differ = [key for key in {**found, **record} if found.get(key) != record.get(key)]
    if differ:
        was = ", ".join(f"{key} {found.get(key)}" for key in differ)
        now = ", ".join(f"{key} {record.get(key)}" for key in differ)
        raise DatasetError(f"{folder} was prepared with {was}, not {now}. Pass a new folder.")


def _drawn(pictures: Sequence[Picture], normal: str, seed: int) -> list[Picture]:
    """The pictures, those whose part is open put into train or test.

    Abnormal ones, and the normal ones of a patient who has an abnormal one, go to test; of the
    other patients TEST_SHARE do.
    """
    ill = {p.patient for p in pictures if p.label != normal and p.patient}
    open_ones = [p for p in pictures if p.part is None]
    groups = sorted({_group(p) for p in open_ones if p.label == normal and p.patient not in ill})
    order = np.random.default_rng(seed).permutation(len(groups))
    chosen = {groups[i] for i in order[: round(TEST_SHARE * len(groups))]}

    def placed(picture: Picture) -> Picture:
        if picture.part is not None:
            return picture
        part: Part = "test"
        if picture.label != normal:
            why = "abnormal: nothing is trained on it"
        elif picture.patient in ill:
            why = f"normal, but {picture.patient} has an abnormal image"
        elif _group(picture) in chosen:
            why = f"normal, drawn for the test (seed {seed})"
        else:
            part, why = "train", f"normal, drawn for the training (seed {seed})"
        return replace(picture, part=part, why="; ".join(filter(None, (picture.why, why))))

    return [placed(picture) for picture in pictures]


def _group(picture: Picture) -> str:
    """What is drawn together: a patient's images, or else the image alone."""
    return picture.patient or str(picture.file)


def _patients_apart(pictures: Sequence[Picture]) -> tuple[list[Picture], list[str]]:
    """Leaves training images out whose patient is in the test part; with a note on them."""
    tested = {p.patient for p in pictures if p.part == "test" and p.patient}
    both = {p.patient for p in pictures if p.part == "train"} & tested
    if not both:
        return list(pictures), []
    kept = [
        replace(p, part="left out", why=f"{p.patient} is in the test part")
        if p.part == "train" and p.patient in both
        else p
        for p in pictures
    ]
    n = sum(p.part == "train" and p.patient in both for p in pictures)
    note = (
        f"training images left out: {n}, for their patients ({shown_names(sorted(both))}) are in "
        "the archive's test part as well. --official keeps them, as published tables do."
    )
    return kept, [note]


def _identical_apart(pictures: Sequence[Picture]) -> tuple[list[Picture], list[str]]:
    """Leaves training images out that the test part has too; with notes on identical images."""
    groups = _identical(pictures)
    result, notes = list(pictures), []
    across = within = unlike = 0
    for numbers in groups:
        tested = [i for i in numbers if pictures[i].part == "test"]
        trained = [i for i in numbers if pictures[i].part == "train"]
        unlike += len({pictures[i].label for i in numbers}) > 1
        within += not (tested and trained)
        across += bool(tested and trained)
        for i in trained if tested else ():
            twin, picture = pictures[tested[0]], pictures[i]
            why = f"identical to {twin.member or twin.link.as_posix()}"
            why += f", of class {twin.label}" if twin.label != picture.label else ""
            if picture.member:
                why = f"{why}; stays in training, for its file is linked whole"
                result[i] = replace(picture, why=f"{picture.why}; {why}")
            else:
                result[i] = replace(picture, part="left out", why=why)
    if across:
        notes.append(
            f"in training and test alike: {across} images ({MANIFEST} names them). They are kept "
            "out of training, unless they lie in an npz file, which is linked whole."
        )
    if within:
        notes.append(f"several times within a part: {within} images, which stay.")
    if unlike:
        notes.append(f"several times with different classes: {unlike} images.")
    return result, notes


def _identical(pictures: Sequence[Picture]) -> list[list[int]]:
    """Numbers of the pictures that are the same, byte by byte; those left out do not count.

    Files are read only where another has the same size.
    """
    by_size: dict[object, list[int]] = defaultdict(list)
    for i, picture in enumerate(pictures):
        if picture.part != "left out":
            by_size[picture.digest or picture.file.stat().st_size].append(i)
    alike = [i for numbers in by_size.values() if len(numbers) > 1 for i in numbers]
    by_content: dict[str, list[int]] = defaultdict(list)
    for i in tqdm(alike, desc="comparing", leave=False, disable=None):
        by_content[pictures[i].digest or _file_digest(pictures[i].file)].append(i)
    return [numbers for numbers in by_content.values() if len(numbers) > 1]


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _check_links(pictures: Sequence[Picture]) -> None:
    """Raises DatasetError where two files would get one link, and where nothing is to be linked."""
    at: dict[Path, Path] = {}
    for picture in (p for p in pictures if p.part != "left out"):
        other = at.setdefault(picture.link, picture.file)
        if other != picture.file:
            raise DatasetError(
                f"{other} and {picture.file} would both become {picture.link}. Is the archive "
                "there twice? Pass the folder of one copy."
            )
    for part in ("train", "test"):
        if not any(p.part == part for p in pictures):
            raise DatasetError(
                f"no picture is left for {part}. Is the archive complete? Of {len(pictures)} "
                f"pictures: {shown_names(sorted({p.why for p in pictures}))}"
            )


def _manifest(pictures: Sequence[Picture], source: Path) -> str:
    rows = (
        (_below(p, source), "" if p.part == "left out" else p.part, p.label, p.patient, p.why)
        for p in pictures
    )
    return _csv_text(("file", "split", "label", "patient", "why"), rows)


def _below(picture: Picture, source: Path) -> str:
    """A picture's file as the manifest calls it: below the archive's folder where it lies there."""
    file = picture.file
    name = file.relative_to(source) if file.is_relative_to(source) else file
    return f"{name.as_posix()}:{picture.member}" if picture.member else name.as_posix()


def _places(manifest: str) -> list[list[str]]:
    """A manifest's rows without the reasons, whose words may change from version to version."""
    return [row[:-1] for row in csv.reader(io.StringIO(manifest))]


def _csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    return text.getvalue()


def _write(
    pictures: Sequence[Picture], record: dict[str, object], manifest: str, folder: Path
) -> int:
    """Writes what is missing, the manifest last; returns how many files and links that were."""
    new = _write_text(json.dumps(record, indent=1) + "\n", folder / RECORD)
    taken = [p for p in pictures if p.part != "left out"]
    links = {folder / p.link: p.file for p in taken}
    tested = [p for p in taken if p.part == "test" and not p.member]
    for picture in tqdm(tested, desc="masks", leave=False, disable=None):
        at = folder / MASKS / picture.label / without_suffix(picture.name or picture.file.name)
        if len(picture.masks) == 1:
            mask = picture.masks[0]
            links[at.with_name(at.name + mask.suffix.lower())] = mask
        elif picture.masks or picture.circles:
            new += _write_mask(picture, at.with_name(at.name + ".png"))
    new += sum(_link(link, file) for link, file in links.items())
    if boxes := [row for picture in tested for row in _box_rows(picture)]:
        columns = ["image", "top", "left", "height", "width", "label", "volume_slices", "patient"]
        new += _write_text(_csv_text(columns, boxes), folder / BOXES)
    if tested:
        rows = [(p.image, p.label, p.patient) for p in tested]
        new += _write_text(_csv_text(("image", "label", "patient"), rows), folder / METADATA)
    return new + _write_text(manifest, folder / MANIFEST)


def _box_rows(picture: Picture) -> list[tuple[object, ...]]:
    return [
        (
            picture.image if box.slice is None else f"{picture.image}#{box.slice:03d}",
            *(f"{number:g}" for number in box[:4]),
            box.label,
            "" if box.volume_slices is None else box.volume_slices,
            picture.patient,
        )
        for box in picture.boxes
    ]


def _write_text(text: str, path: Path) -> bool:
    """Writes a file unless it is there with this text; says whether it did."""
    if _text_of(path) == text:
        return False
    save_text_atomic(text, path)
    return True


def _text_of(path: Path) -> str | None:
    """A file's text, names that are no UTF-8 with their bytes as surrogates; None without one."""
    return read_regular(path).decode("utf-8", "surrogateescape") if path.is_file() else None


def _write_mask(picture: Picture, path: Path) -> bool:
    """Writes the union of a picture's masks, or its circles, unless it is there."""
    if path.is_file():
        return False
    if picture.masks:
        masks = [read_mask(mask) for mask in picture.masks]
        sizes = {mask.shape for mask in masks}
        if len(sizes) > 1:
            raise DatasetError(
                f"the masks of {picture.file} have different sizes, {sorted(sizes)}: "
                f"{shown_names([mask.name for mask in picture.masks])}. Correct or remove one."
            )
        marked = np.logical_or.reduce(masks)
    else:
        down, right = np.ogrid[: picture.size[0], : picture.size[1]]
        marked = np.zeros(picture.size, dtype=bool)
        for row, column, radius in picture.circles:
            marked |= (down - row) ** 2 + (right - column) ** 2 <= radius**2
    write_image(path, torch.from_numpy(marked).float())
    return True


def _link(link: Path, file: Path) -> bool:
    """Makes a symbolic link unless it is there; says whether it did. Raises DatasetError."""
    target = os.path.abspath(file)  # noqa: PTH100 - Path.absolute keeps "..", resolve follows links
    if link.is_symlink() and os.readlink(link) == target:  # noqa: PTH115
        return False
    if link.is_symlink() or link.exists():
        raise DatasetError(f"{link} is there and is no link to {target}. Pass a new folder.")
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(target)
    except (OSError, NotImplementedError) as error:
        raise DatasetError(
            f"{link.parent} takes no symbolic links ({error}). Pass a folder on a file system that "
            "does (exFAT does not; on Windows, developer mode must be on)."
        ) from error
    return True


def summary(prepared: Prepared) -> list[str]:
    """How many images of each class are in each part, and how many were left out, by reason."""
    counts = Counter((p.part, p.label) for p in prepared.pictures)
    lines = []
    for part in ("train", "test"):
        classes = [f"{label} {n}" for (of, label), n in sorted(counts.items()) if of == part]
        lines.append(f"{part}: {', '.join(classes)}")
    reasons = Counter(p.why for p in prepared.pictures if p.part == "left out")
    if reasons:
        usual = ", ".join(f"{n} × {why}" for why, n in reasons.most_common(5))
        rest = f", … ({MANIFEST} has all)" if len(reasons) > 5 else ""
        lines.append(f"left out: {sum(reasons.values())}: {usual}{rest}")
    return lines + prepared.notes

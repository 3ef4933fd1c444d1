"""Bad inputs of every program: what the program says, and with which status it ends.

Each is tried by itself, in a copy of the program's tiny data, through its real command line.
"""

import contextlib
import io
import itertools
import json
import logging
import os
import pickle
import runpy
import shutil
import signal
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image

from common.errors import ExitStatus
from tests.faults.programs import PROGRAMS, Done, Flags
from tests.test_bad_settings import BOMBS

TRAIN, PREDICT, EVAL = "inpainter/train.py", "predict_heatmap.py", "eval.py"
DDPM, DIA = "diffusion_models/train_eval_ddpm.py", "train_dia.py"
DONE, NOTHING, SETTINGS, SOME = (int(status) for status in list(ExitStatus)[:4])
GEN = "model/gen_00000001.pt"


@dataclass(frozen=True)
class BadInput:
    """One bad input."""

    program: str
    what: str
    status: int
    says: str
    """A part of what it prints."""
    make: Callable[[Path], Flags | None]
    """Puts it into the folder of the program's data; returns flags to add to the command."""


def flags(program: str, status: int, says: str, *added: object, what: str = "") -> BadInput:
    """Flags behind the command's."""
    text = what or " ".join(map(str, added))
    return BadInput(program, f"`{text[:70]}`", status, says, lambda _: list(added))


def content(
    program: str, what: str, name: str, data: bytes | str, status: int, says: str, *added: object
) -> BadInput:
    """A file of this content."""

    def make(folder: Path) -> Flags:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return [folder / flag[1:] if str(flag).startswith("@") else flag for flag in added]

    return BadInput(program, what, status, says, make)


def made(
    program: str, what: str, status: int, says: str, make: Callable[[Path], Flags | None]
) -> BadInput:
    """Whatever a function does."""
    return BadInput(program, what, status, says, make)


# --- Contents of files ---


def png_of(height: int, width: int, pixels: bytes = b"\0" * 100) -> bytes:
    """A PNG that claims a size, whatever its pixels are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(write: Callable[[Any], object]) -> bytes:
    """The bytes that a function writes to a file."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


GREY = np.linspace(60, 250, 40 * 44).reshape(40, 44)
WHOLE_PNG = saved(lambda file: Image.fromarray(GREY.astype(np.uint8)).save(file, "PNG"))
IMAGES: dict[str, tuple[bytes, str]] = {
    "text": (b"hello\n", "no image format recognised"),
    "cut PNG": (WHOLE_PNG[: len(WHOLE_PNG) // 2], "bad.png"),
    "PNG of 65,535² pixels": (png_of(65535, 65535), "pixels) exceeds limit of 178956970"),
    "PNG that is a decompression bomb": (png_of(19000, 19000, b"\0" * 10**6), "bad.png"),
    "PNG without pixels": (png_of(0, 44), "bad.png"),
    "PGM of 10⁹ x 10⁹ pixels": (b"P5 1000000000 1000000000 255\n12", "bad.png"),
    "TIFF of 5 samples": (
        saved(lambda file: tifffile.imwrite(file, np.zeros((5, 40, 44), np.uint16))),
        "bad.png has 5 pages",
    ),
    "TIFF of NaN": (
        saved(lambda file: tifffile.imwrite(file, np.full((40, 44), np.nan, np.float32))),
        "bad.png",
    ),
    "complex TIFF": (
        saved(lambda file: tifffile.imwrite(file, np.ones((40, 44), np.complex64))),
        "bad.png",
    ),
    "animated GIF": (
        saved(
            lambda file: Image.new("L", (44, 40)).save(
                *(file, "GIF"), save_all=True, append_images=[Image.new("L", (44, 40), 9)]
            )
        ),
        "bad.png has 2 frames",
    ),
    "DICOM without pixels": (b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0\0\0\0\0", "bad.png"),
    "NIfTI cut short": (struct.pack("<i", 348) + b"\0" * 340 + b"n+1\0" + b"\0" * 20, "bad.png"),
    "NRRD of a text": (b"NRRD0004\ntype: text\n\n", "bad.png"),
    "one pixel": (saved(lambda file: Image.new("L", (1, 1)).save(file, "PNG")), "bad.png"),
}
"""By what they are: their bytes, and what is said of them."""
BOX = "image,top,left,height,width\n"
BOXES: dict[str, tuple[bytes | str, int, str]] = {
    "with a byte-order mark": (
        "\ufeff" + BOX + "a.png,1,2,2,3\n",
        DONE,
        "Numbers and plots are",
    ),
    "with CRLF": (
        (BOX + "a.png,1,2,2,3\n").replace("\n", "\r\n"),
        DONE,
        "Numbers and plots are",
    ),
    "with semicolons": (BOX.replace(",", ";") + "a.png;1;2;2;3\n", NOTHING, "semicolons"),
    "with tabs": (BOX.replace(",", "\t") + "a.png\t1\t2\t2\t3\n", NOTHING, "tabs"),
    "empty": (b"", NOTHING, "is empty"),
    "without a column": ("image,top,left,height\n", NOTHING, "width not found"),
    "with NaN": (BOX + "a.png,nan,2,2,3\n", NOTHING, "top must be a number of pixels"),
    "with 1e308": (BOX + "a.png,1e308,2,2,3\n", NOTHING, "up to 10000000"),
    "with a comma for a point": (BOX + 'a.png,"1,5",2,2,3\n', NOTHING, "got '1,5'"),
    "of no height": (BOX + "a.png,1,2,0,3\n", NOTHING, "height and width must be above 0"),
    "with an open quote": (BOX + 'a.png,1,2,2,"3\n', NOTHING, "never closed"),
    "in UTF-16": ((BOX + "a.png,1,2,2,3\n").encode("utf-16"), NOTHING, "UTF-16"),
    "in Latin-1": (BOX.encode() + b"M\xfcller.png,1,2,2,3\n", NOTHING, "is not UTF-8"),
    "that is a workbook": (b"PK\x03\x04rest", NOTHING, "zip file"),
    "with NUL": (BOX + "a\0.png,1,2,2,3\n", NOTHING, "NUL bytes"),
    "of an unknown image": (BOX + "z.png,1,2,2,3\n", NOTHING, "z.png"),
    "with too many values": (BOX + "a.png,1,2,2,3,x,y,z\n", NOTHING, "more values than columns"),
    "with a heading twice": ("image,top,left,height,width,top\n", NOTHING, "twice"),
    "without a lesion": (BOX, NOTHING, "lesion"),
}
COCO = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": []}
JSONS: dict[str, tuple[bytes | str, str]] = {
    "cut COCO": (json.dumps(COCO)[:-5], "damaged JSON"),
    "COCO of text boxes": (
        json.dumps(COCO | {"annotations": [{"image_id": 1, "bbox": "x", "id": 1}]}),
        "boxes.json",
    ),
    "COCO of an unknown image": (
        json.dumps(COCO | {"annotations": [{"image_id": 9, "bbox": [1, 1, 2, 2], "id": 1}]}),
        "boxes.json",
    ),
    "JSON 100,000 deep": ("{" + '"a":[' * 100_000, "boxes.json"),
    "JSON of another kind": ('{"a": 1}', "boxes.json"),
}


class Payload:
    """What would run code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/it-ran",))


def weights(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Replaces the generator of the prediction's checkpoint."""

    def make(folder: Path) -> None:
        torch.save(edit(torch.load(folder / GEN)), folder / GEN)

    return make


def cut(name: str) -> Callable[[Path], None]:
    """Half of a file."""

    def make(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return make


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / old).rename(folder / new)

    return make


def removed(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


def piped(name: str, *added: object) -> Callable[[Path], Flags]:
    """A named pipe, to which nobody writes."""

    def make(folder: Path) -> Flags:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        return [folder / flag[1:] if str(flag).startswith("@") else flag for flag in added]

    return make


# --- All of them ---


def of_settings() -> Iterator[BadInput]:
    """Settings on the command line and in files."""
    for program, pairs in {
        TRAIN: {
            "train.lr=0": "train.lr: must be in",
            "train.batch_size=0": "train.batch_size",
            "train.batchsize=3": "Did you mean 'batch_size'?",
            "seed=0042": "Write 42",
            "gpu_ids=[]": "gpu_ids",
            "netG.ngf=1000000": "netG.ngf",
            "train.image_shape=[32, 32]": "train.image_shape",
            "train.mask_shape=[64, 64]": "mask_shape",
            "expname=../../x": "names a folder",
            "train=3": "train is a section",
            "seed": "expected KEY=VALUE",
            "device=tpu": "device",
            "train.precision=fp8": "train.precision",
            "train_data_path=": "train_data_path",
        },
        PREDICT: {
            "test.heatmap_M_inpaint=1000000000": "test.heatmap_M_inpaint",
            "test.patch_stride=0": "test.patch_stride",
            "test.heatmap_metrics=[MCD]": "test.heatmap_metrics",
            "test.scales=[0]": "test.scales",
            "test.calibration=always": "test.calibration",
        },
        DIA: {
            "contrastive.width=0": "contrastive.width",
            "contrastive.kernel_size=6": "contrastive.kernel_size",
            "contrastive.suffix=../x": "names a folder",
            "data.dataset=kvasr": "choose from covid, kvasir",
        },
        DDPM: {
            "diffusion.dim_mults=[]": "diffusion.dim_mults",
            "diffusion.clip_norm=-1": "diffusion.clip_norm",
            "diffusion.timesteps=1000000000000": "diffusion.timesteps",
        },
    }.items():
        for text, says in pairs.items():
            yield flags(program, SETTINGS, says, "--set", text)
    for program, name in itertools.product((TRAIN, DDPM), BOMBS):
        yield content(
            program, f"settings file: {name}", "tiny.yaml", BOMBS[name], SETTINGS, "tiny.yaml"
        )
    texts: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "is empty"),
        "in UTF-16": ("seed: 1".encode("utf-16"), "UTF-16"),
        "of tabs": (b"train:\n\tlr: 1.0\n", "indent with blanks"),
        "with a tag that runs code": (b"seed: !!python/object/apply:os.getcwd []", "the tag"),
        "with an alias": (b"gpu_ids: &a [0]\ntest: *a\n", "the alias"),
        "a PNG": (WHOLE_PNG, "tiny.yaml"),
    }
    for what, (data, says) in texts.items():
        yield content(TRAIN, f"settings file: {what}", "tiny.yaml", data, SETTINGS, says)
    yield made(TRAIN, "settings file: missing", SETTINGS, "No settings file", removed("tiny.yaml"))
    yield made(TRAIN, "settings file: a pipe", SETTINGS, "but a pipe", piped("tiny.yaml"))
    yield flags(TRAIN, SETTINGS, "unrecognized arguments", "--no_such_flag")
    yield flags(EVAL, SETTINGS, "invalid choice", "--mode", "heatmaps")
    yield flags(EVAL, SETTINGS, "bootstrap", "--bootstrap", "-1")


def of_images() -> Iterator[BadInput]:
    """Images to train on and to score."""
    for what, (data, says) in IMAGES.items():
        yield content(PREDICT, f"image: {what}", "test/bad.png", data, SOME, says)
        yield content(
            PREDICT, f"the only image: {what}", "alone/bad.png", data, NOTHING, says,
            *("--image_dir", "@alone"),
        )  # fmt: skip
    for what in ("text", "cut PNG", "PNG of 65,535² pixels"):
        data, says = IMAGES[what]
        yield content(TRAIN, f"image: {what}", "train/bad.png", data, DONE, "bad.png")
        yield content(
            TRAIN, f"the only image: {what}", "alone/bad.png", data, NOTHING, "alone",
            *("--set", "train_data_path=@alone"),
        )  # fmt: skip
        for program in (DDPM, DIA):
            name = "data/train/normal/bad.png"
            yield content(program, f"image: {what}", name, data, DONE, "bad.png")
    yield content(PREDICT, "image: empty", "test/bad.png", b"", DONE, "1 empty (bad.png)")
    yield content(
        PREDICT, "the only image: empty", "alone/bad.png", b"", NOTHING, "1 empty (bad.png)",
        *("--image_dir", "@alone"),
    )  # fmt: skip
    yield made(PREDICT, "image: a pipe", DONE, "no regular file", piped("test/bad.png"))
    yield made(
        *(PREDICT, "an image named that is a pipe", NOTHING, "pipe.png"),
        piped("pipe.png", "@pipe.png"),
    )
    yield made(TRAIN, "no folder of images", NOTHING, "train", removed("train"))
    yield made(PREDICT, "no folder of images", NOTHING, "test", removed("test"))
    for program in (DDPM, DIA):
        yield made(program, "no folder of images", NOTHING, "data", removed("data"))


def of_checkpoints() -> Iterator[BadInput]:
    """Checkpoints."""
    edits: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
        "a list": (lambda state: [1, 2], "found list"),
        "a tensor": (lambda state: torch.zeros(3), "found a tensor"),
        "nothing": (lambda state: None, "found nothing"),
        "texts": (lambda state: {"a": "b"}, GEN),
        "without a weight": (lambda state: dict(list(state.items())[1:]), GEN),
        "NaN": (lambda state: {k: v * float("nan") for k, v in state.items()}, "not finite"),
        "whole numbers": (lambda state: {k: v.long() for k, v in state.items()}, GEN),
    }
    for what, (edit, says) in edits.items():
        yield made(PREDICT, f"generator: {what}", NOTHING, says, weights(edit))
    yield content(PREDICT, "generator: a text", GEN, "hello", NOTHING, "truncated or no checkpoint")
    yield content(PREDICT, "generator: empty", GEN, "", NOTHING, "(0 bytes) is truncated")
    yield content(
        PREDICT, "generator: a pickle that runs code", GEN, pickle.dumps(Payload()), NOTHING, GEN
    )
    yield made(
        *(PREDICT, "generator: a zip of torch that runs code", NOTHING, "loading that could run"),
        lambda folder: torch.save(Payload(), folder / GEN),
    )
    yield made(PREDICT, "generator: cut", NOTHING, "truncated", cut(GEN))
    yield made(PREDICT, "generator: a pipe", NOTHING, "but a pipe", piped(GEN))
    yield made(PREDICT, "no generator", NOTHING, "No checkpoint", removed(GEN))
    critic = "model/dis_00000001.pt"
    yield made(PREDICT, "no critic", NOTHING, "No checkpoint", removed(critic))
    for step in ("2", "²", "-1", "1" * 5000, "best"):
        yield flags(PREDICT, NOTHING, "checkpoint", "--checkpoint_iter", step)
    yield flags(PREDICT, NOTHING, "does not exist", "--checkpoint_dir", "nowhere")
    yield flags(PREDICT, NOTHING, "is a file", "--output_dir", "README.md")
    yield flags(TRAIN, NOTHING, "No checkpoint", "--resume", "7")


def of_annotations() -> Iterator[BadInput]:
    """Annotations, heatmaps and tables."""
    for what, (data, status, says) in BOXES.items():
        yield content(EVAL, f"boxes: {what}", "boxes.csv", data, status, says)
    for what, (data, says) in JSONS.items():
        yield content(
            EVAL, f"annotations: {what}", "boxes.json", data, NOTHING, says,
            *("--annotations", "@boxes.json"),
        )  # fmt: skip
    yield made(EVAL, "boxes: a pipe", NOTHING, "but a pipe", piped("boxes.csv"))
    yield flags(EVAL, NOTHING, "/dev/zero", "--annotations", "/dev/zero")
    yield flags(EVAL, NOTHING, "nowhere.csv", "--annotations", "nowhere.csv")
    yield flags(EVAL, NOTHING, "No folder", "--heatmap_dir", "nowhere")
    listed = "heatmaps/heatmaps.csv"
    tables = {
        "empty": "",
        "of other columns": "a,b\n1,2\n",
        "with a file elsewhere": "image,metric,file\na.png,good,../../x.pt\n",
        "with a metric that is a path": "image,metric,file\na.png,../x,data/a_good.pt\n",
        "of fewer images than are annotated": "image,metric,file\na.png,good,data/z.pt\n",
        "with a field of 200 kB": f"image,metric,file\n{'a' * 200_000},good,data/a_good.pt\n",
    }
    for what, text in tables.items():
        says = "'sub/b.png'" if "fewer" in what else "heatmaps.csv"
        yield content(EVAL, f"list of heatmaps: {what}", listed, text, NOTHING, says)
    yield made(EVAL, "list of heatmaps: missing", NOTHING, "has no heatmaps.csv", removed(listed))
    yield made(EVAL, "a heatmap that is cut", SOME, "truncated", cut("heatmaps/data/a_good.pt"))
    yield made(
        *(EVAL, "a heatmap that is a pipe", SOME, "but a pipe"),
        piped("heatmaps/data/a_good.pt"),
    )
    metadata = {
        "with an unknown image": ("image,age\nz.png,3\n", "none of its 1 rows"),
        "without images": ("name,age\na,3\n", "no column image"),
        "in Latin-1": (b"image,name\na.png,M\xfcller\n", "meta.csv"),
    }
    for what, (data, says) in metadata.items():
        yield content(
            EVAL, f"metadata: {what}", "meta.csv", data, NOTHING, says, "--metadata", "@meta.csv"
        )
    yield content(
        EVAL, "metadata: a folder", "meta.csv/x", b"", NOTHING, "meta.csv",
        *("--metadata", "@meta.csv"),
    )  # fmt: skip


BAD_INPUTS = [*of_settings(), *of_images(), *of_checkpoints(), *of_annotations()]


def prepared(root: Path) -> dict[str, Path]:
    """The tiny data of each program, by its name."""
    found = {}
    for number, (name, program) in enumerate(PROGRAMS.items()):
        found[name] = root / str(number)
        found[name].mkdir(parents=True)
        program.prepare(found[name])
    return found


def answer(bad: BadInput, data: Path, folder: Path) -> Done:
    """What the program does about it, in this process. folder: a new one, for a copy of `data`."""
    shutil.copytree(data, folder)
    for settings in folder.glob("tiny.yaml"):  # paths in it are those of `data`
        settings.write_text(settings.read_text().replace(str(data), str(folder)))
    program = PROGRAMS[bad.program]
    command = [program.script, *map(str, [*program.flags(folder), *(bad.make(folder) or ())])]
    if bad.program == PREDICT:
        command += ["--set", "test.save_heatmap_plots=false"]
    command = [word.replace("=@", f"={folder}/") for word in command]
    said, handlers = io.StringIO(), {n: signal.getsignal(n) for n in (2, 15)}
    before, path = sys.argv, [*sys.path]
    log = logging.StreamHandler(said)
    logging.getLogger().addHandler(log)
    try:
        sys.argv = command
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            contextlib.suppress(SystemExit),
        ):
            try:
                runpy.run_path(program.script, run_name="__main__")
            except SystemExit as ended:
                return Done(int(ended.code or 0), said.getvalue())
    finally:
        logging.getLogger().removeHandler(log)
        sys.argv, sys.path[:] = before, path
        for number, handler in handlers.items():
            signal.signal(number, handler)
        shutil.rmtree(folder)
    raise AssertionError("it did not end as programs do")

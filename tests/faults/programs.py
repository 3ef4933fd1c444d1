"""The programs on tiny data, run as from the command line, gone on with after a fault, compared.

program = PROGRAMS["predict_heatmap.py"]
program.prepare(folder)
done = run(program, folder)             # the same command goes on with what a fault left
assert same(program.results(folder), program.results(other_folder))
"""

import atexit
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from common.checkpoint import load_tensors
from common.config import REPOSITORY, config_to_yaml
from common.images import write_image
from dia.settings import DiaConfig, EvaluationConfig
from dia.training import train
from diffusion_models.settings import DataConfig, DdpmConfig
from inpainter.snapshots import run_folder
from tests.inpainter.evaluation_case import heatmap_folder
from tests.tiny_dia import SIDE, tiny_contrastive, tiny_diffusion, write_normals
from tests.tiny_runs import (
    PATIENCE,
    PREDICT,
    TRAIN,
    _as_program,
    forked,
    texture,
    tiny_config,
    tiny_file,
    write_checkpoint,
    write_images,
)

Flags = list[object]
EVALUATE = str(REPOSITORY / "eval.py")
SUFFIXES_OF_TENSORS = (".pt", ".model", ".optim", ".config")
STEPS = 8


@dataclass(frozen=True)
class Program:
    """A program with its inputs."""

    script: str
    prepare: Callable[[Path], object]
    """Writes what it reads."""
    flags: Callable[[Path], Flags]
    """Of the command that starts the work, or goes on with it."""
    results: Callable[[Path], Mapping[str, Any]]
    """What must not depend on faults, by name."""


# --- inpainter/train.py ---


TRAINING = (
    *(f"train.n_steps={STEPS}", "train.snapshot_save_iter=1", "train.keep_snapshots=3"),
    *("train.viz_iter=4", "train.n_critic=2"),
)


def picard_inputs(folder: Path) -> None:
    write_images(folder / "train")
    tiny_file(folder, *TRAINING)


def picard_flags(folder: Path) -> Flags:
    return ["--config", folder / "tiny.yaml", "--resume"]


def picard_results(folder: Path) -> dict[str, Any]:
    run = run_folder(tiny_config(folder, *TRAINING))
    found = {f"{r}": load_tensors(run / f"{r}_{STEPS:08d}.pt") for r in ("gen", "dis", "state")}
    del found["state"]["config"]
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    errors = {record["step"]: record["select_l1"] for record in records if "select_l1" in record}
    return found | {"selection errors": errors}


# --- predict_heatmap.py ---


def prediction_inputs(folder: Path) -> None:
    write_images(folder / "test", n=4)
    tiny_file(folder, "test.save_heatmap_plots=true")
    write_checkpoint(folder / "model", tiny_config(folder))


def prediction_flags(folder: Path) -> Flags:
    flags = ["--config", folder / "tiny.yaml", "--checkpoint_dir", folder / "model"]
    return [*flags, "--output_dir", folder / "out", "--export", "png16"]


def prediction_results(folder: Path) -> dict[str, Any]:
    out = folder / "out"
    names = ("scores.csv", "heatmaps.csv", "data/*.pt")
    return {path.name: path.read_bytes() for name in names for path in sorted(out.glob(name))}


# --- predict_heatmap.py --calibrate, eval.py --mode calibrate ---


def normal_inputs(folder: Path) -> None:
    prediction_inputs(folder)
    write_images(folder / "train", n=4)
    on = ("test.calibration=knn", "test.calibration_windows=40", "test.parallel_batchsize=2")
    tiny_file(folder, *on)


def calibration_flags(folder: Path) -> Flags:
    return [*prediction_flags(folder), "--calibrate"]


def calibration_results(folder: Path) -> dict[str, Any]:
    saved = load_tensors(folder / "model" / "calibration_00000001.pt")
    return prediction_results(folder) | {"calibration": saved["scales"]}


def operating_point_flags(folder: Path) -> Flags:
    flags = ["--mode", "calibrate", "--config", folder / "tiny.yaml", "--specificity", 0.5]
    off = ["--set", "test.calibration=off"]
    return [*flags, *off, "--checkpoint_dir", folder / "model", "--image_dir", folder / "train"]


def operating_point_results(folder: Path) -> dict[str, Any]:
    saved = json.loads((folder / "model" / "operating_point_00000001.json").read_text())
    return {"metrics": saved["metrics"]}


# --- diffusion_models/train_eval_ddpm.py ---


def diffusion_inputs(folder: Path) -> None:
    settings = tiny_diffusion(folder / "run", train_num_steps=STEPS)
    config = DdpmConfig(device="cpu", data=write_normals(folder / "data"), diffusion=settings)
    (folder / "tiny.yaml").write_text(config_to_yaml(config))


def diffusion_flags(folder: Path) -> Flags:
    begun = [*(folder / "run").glob("model-*.pt")]
    flags = ["--mode", "train", "--config", folder / "tiny.yaml"]
    return [*flags, "--resume", folder / "run"] if begun else flags


def diffusion_results(folder: Path) -> dict[str, Any]:
    saved = load_tensors(folder / "run" / f"model-{STEPS}.pt")
    return {name: saved[name] for name in ("step", "model", "ema", "opt")}


# --- train_dia.py ---


def encoder_inputs(folder: Path) -> None:
    settings = tiny_contrastive(folder / "run", epochs=4, save_step=1)
    config = DiaConfig(device="cpu", data=write_normals(folder / "data"), contrastive=settings)
    (folder / "tiny.yaml").write_text(config_to_yaml(config))


def encoder_flags(folder: Path) -> Flags:
    flags = ["--config", folder / "tiny.yaml"]
    begun = [*(folder / "run").glob("state*.pt")]
    return [*flags, "--resume_path", folder / "run"] if begun else flags


def encoder_results(folder: Path) -> dict[str, Any]:
    saved = load_tensors(folder / "run" / "state.pt")
    names = ("epoch", "model", "optim", "probe", "best", "selected")
    return {name: saved[name] for name in names} | {
        "last.model": load_tensors(folder / "run" / "last.model")
    }


# --- eval.py ---


def evaluation_inputs(folder: Path) -> None:
    heatmap_folder(folder)
    (folder / "metadata.csv").write_text("image,age\na.png,40-49\nsub/b.png,50-59\nc.png,50-59\n")


def evaluation_flags(folder: Path) -> Flags:
    flags = ["--mode", "heatmap", "--heatmap_dir", folder / "heatmaps", "--report"]
    flags += ["--metadata", folder / "metadata.csv", "--group", "age"]
    flags += ["--image_dir", folder / "images"]
    return [*flags, "--annotations", folder / "boxes.csv", "--bootstrap", 20]


def evaluation_results(folder: Path) -> dict[str, Any]:
    (results,) = folder.glob("heatmaps/**/results.json")
    found = json.loads(results.read_text())
    return {name: found[name] for name in found if name in ("metrics", "scores")} | {
        path.name: path.read_text() for path in sorted(results.parent.glob("*.csv"))
    }


# --- eval.py --mode ood_pre ---


@cache
def trained_encoder() -> Path:
    """A folder of images and a run on them, made once."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    data = write_normals(folder / "data")
    for kind in ("normal", "spot"):
        for number in range(2):
            image = texture(SIDE, SIDE, 3, seed=20 + number + len(kind))
            write_image(folder / "data" / "test" / kind / f"{number}.png", image)
    train(DiaConfig(device="cpu", data=data, contrastive=tiny_contrastive(folder / "run")))
    return folder


def scored_inputs(folder: Path) -> None:
    shutil.copytree(trained_encoder(), folder, dirs_exist_ok=True)
    (folder / "run" / "config.yaml").unlink()  # it names the other folder
    settings = tiny_contrastive(folder / "run", load_path=str(folder / "run" / "last.model"))
    data = DataConfig("folder", str(folder / "data"), one_class_idx=0, resize_to=SIDE)
    few = EvaluationConfig(ood_samples=1, results_dir=str(folder / "results"), report=True)
    config = DiaConfig(device="cpu", data=data, contrastive=settings, evaluation=few)
    (folder / "tiny.yaml").write_text(config_to_yaml(config))


def scored_flags(folder: Path) -> Flags:
    return ["--mode", "ood_pre", "--config", folder / "tiny.yaml"]


def scored_results(folder: Path) -> dict[str, Any]:
    results = folder / "results"
    scores = json.loads((results / "results.json").read_text())["scores"]
    return {"scores": scores, "table": (results / "scores_CSI.csv").read_text()}


PROGRAMS = {
    "inpainter/train.py": Program(TRAIN, picard_inputs, picard_flags, picard_results),
    "predict_heatmap.py": Program(PREDICT, prediction_inputs, prediction_flags, prediction_results),
    "predict_heatmap.py --calibrate": Program(
        PREDICT, normal_inputs, calibration_flags, calibration_results
    ),
    "diffusion_models/train_eval_ddpm.py": Program(
        str(REPOSITORY / "diffusion_models" / "train_eval_ddpm.py"),
        *(diffusion_inputs, diffusion_flags, diffusion_results),
    ),
    "train_dia.py": Program(
        str(REPOSITORY / "train_dia.py"), encoder_inputs, encoder_flags, encoder_results
    ),
    "eval.py": Program(EVALUATE, evaluation_inputs, evaluation_flags, evaluation_results),
    "eval.py --mode calibrate": Program(
        EVALUATE, normal_inputs, operating_point_flags, operating_point_results
    ),
    "eval.py --mode ood_pre": Program(EVALUATE, scored_inputs, scored_flags, scored_results),
}


@dataclass(frozen=True)
class Done:
    """How a program ended."""

    status: int
    """Its exit status; minus the signal's number."""
    said: str
    """What it printed, errors included."""


@dataclass(frozen=True)
class Opening:
    """The moment before a file, or one in a folder, is opened for the so many-th time."""

    path: str
    count: int


class Running:
    """A program at work in a child process; what it prints is kept, not on any disk."""

    def __init__(
        self,
        command: list[str],
        streams: Path,
        limit: int | None = None,
        stop_at: Opening | None = None,
        **environment: str,
    ) -> None:
        pipes = [streams / f"{name}.pipe" for name in ("out", "errors")]
        self._said: dict[Path, str] = {}
        for pipe in pipes:
            pipe.unlink(missing_ok=True)
            os.mkfifo(pipe)
        # Held open until the program has ended: one killed before it opens them leaves no reader.
        self._held = [os.open(pipe, os.O_RDWR) for pipe in pipes]
        self._readers = [threading.Thread(target=self._read, args=(pipe,)) for pipe in pipes]
        for reader in self._readers:
            reader.start()
        program = partial(_limited, command, pipes, limit, stop_at)
        self.child: BaseProcess = forked(program, **environment)

    def _read(self, pipe: Path) -> None:
        self._said[pipe] = pipe.read_text(errors="backslashreplace")

    def kill(self) -> None:
        """SIGKILL."""
        self.child.kill()

    def done(self) -> Done:
        """Waits for its end."""
        self.child.join(PATIENCE)
        hung = self.child.is_alive()
        if hung:
            self.child.kill()
            self.child.join()
        for held in self._held:
            os.close(held)
        for reader in self._readers:
            reader.join(PATIENCE)
        said = "".join(self._said.values())
        assert not hung, f"it hung: {said}"
        return Done(self.child.exitcode, said)


def _limited(
    command: list[str], streams: list[Path], limit: int | None, stop_at: Opening | None
) -> None:
    """Becomes the program, whose files may have so many bytes each."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for number, pipe in enumerate(streams, start=1):
        os.dup2(os.open(pipe, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))  # as of pipes
    if stop_at is not None:
        _stand_still_at(stop_at)
    _as_program(command, REPOSITORY, [])


def _stand_still_at(opening: Opening) -> None:
    """This process stops itself, once, until another one lets it go on."""
    count = itertools.count(1)

    def stop(event: str, arguments: tuple[object, ...]) -> None:
        opened = event == "open" and f"{arguments[0]}/".startswith(f"{opening.path}/")
        if opened and next(count) == opening.count:
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(stop)


def started(
    program: Program,
    folder: Path,
    limit: int | None = None,
    *,
    streams: Path | None = None,
    stop_at: Opening | None = None,
) -> Running:
    """Starts the program, or goes on with its work, in a folder.

    limit: bytes that a file may have, as a disk that is full from there on. streams: where the
    pipes lie through which it speaks. stop_at: when it stands still until it gets SIGCONT.
    """
    command = [program.script, *map(str, program.flags(folder))]
    return Running(command, streams or folder, limit, stop_at)


def run(program: Program, folder: Path, limit: int | None = None) -> Done:
    """The same to its end."""
    return started(program, folder, limit).done()


@contextmanager
def place(root: Path, name: str) -> Iterator[Path]:
    """A new folder of the trial, deleted when it went well."""
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


@cache
def undisturbed(name: str, root: Path) -> Mapping[str, Any]:
    """The results of a run without faults."""
    program = PROGRAMS[name]
    with place(root, f"undisturbed {name.replace('/', ' ')}") as folder:
        program.prepare(folder)
        done = run(program, folder)
        assert done.status == 0, done.said
        return program.results(folder)


def assert_whole(folder: Path, *, at_rest: bool) -> None:
    """Every file of tensors that is visible can be read; at rest, nothing half-written is left."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES_OF_TENSORS:
            load_tensors(path)
        assert not (at_rest and path.suffix == ".tmp"), path

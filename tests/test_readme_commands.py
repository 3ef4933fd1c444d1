"""Every command line of README.md and docs/ is one that its program takes: none can go stale."""

import argparse
import json
import re
import runpy
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from common.config import REPOSITORY
from common.images import write_image
from tests.tiny_runs import as_flags, run_script, settings, texture, write_images

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXT = "\n\n".join(path.read_text(encoding="utf-8") for path in PAGES)
STAND_INS = {"NAME": "kvasir", "FOLDER": "folder"}
"""What a reader would type instead of a placeholder."""
PROGRAM = re.compile(
    r"(cd (?P<folder>\w+) && )?(?P<launcher>python |torchrun \S+ )?"
    r"(?P<script>[\w/]+\.py)(?P<flags> .*)?"
)
MODULE = re.compile(r"python -m ([\w.]+)")
"""A package or module that is run."""
PROGRAMS = (
    "inpainter/train.py",
    "predict_heatmap.py",
    "eval.py --mode heatmap",
    "eval.py --mode calibrate",
    "diffusion_models/train_eval_ddpm.py --mode train",
    "train_dia.py",
    "eval.py --mode ood_pre",
    "common/datasets/__main__.py prepare",
    "common/selfcheck.py",
)
FLAGS_OF_OTHERS = {
    *("--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--logdir"),
    *("--require-hashes", "--no-deps", "--no-build-isolation"),
    *("--rm", "--init", "--gpus", "--build-arg"),
    *("--array", "--gres", "--nodes", "--ntasks-per-node", "--gpus-per-task"),
    "--no_such_flag",
}
"""torchrun's, TensorBoard's, pip's, Docker's and SLURM's, and one that a bad input has."""


class Command(NamedTuple):
    """One command line of ours."""

    folder: Path
    """Working directory."""
    script: str
    """Path from there."""
    flags: list[str]


def code_lines() -> Iterator[str]:
    """Every line of the blocks and every piece of code in a sentence, in one line each."""
    blocks = TEXT.split("```")[1::2]
    yield from (line.partition(" #")[0].strip() for block in blocks for line in block.splitlines())
    for text in TEXT.split("```")[::2]:
        yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text))
        yield from table_lines(text)


def table_lines(text: str) -> Iterator[str]:
    """The commands of tables whose heading has an … in place of each row's file."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        heading, *rows = table.splitlines()
        command = re.search(r"`([^`]+)…`", heading)
        files = [match[1] for row in rows if (match := re.match(r"\| `([^`]+)` \|", row))]
        yield from (command[1] + file for file in files if command)


def commands() -> list[Command]:
    """The programs of this repository that the README calls, without repetitions."""
    found = {}
    for line in code_lines():
        line = MODULE.sub(lambda found: f"python {script_of(found[1])}", line)
        match = PROGRAM.fullmatch(line)
        if match is None or "…" in line or not (match["launcher"] or match["flags"]):
            continue
        for placeholder, text in STAND_INS.items():
            line = re.sub(rf"\b{placeholder}\b", text, line)
        match = PROGRAM.fullmatch(line)
        folder = REPOSITORY / (match["folder"] or "")
        found[line] = Command(folder, match["script"], shlex.split(match["flags"] or ""))
    return list(found.values())


def script_of(module: str) -> str:
    """The file that `python -m module` runs, from the repository's root."""
    path = Path(*module.split("."))
    is_package = (REPOSITORY / path).is_dir()
    return str(path / "__main__.py" if is_package else path.with_suffix(".py"))


def shown(command: Command) -> str:
    return f"{command.script} {shlex.join(command.flags)}"


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Programs that handle SIGTERM do so in this process, too."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def call(script: Path, function: str) -> object:
    """What a function of a script returns, or the status with which it exits."""
    try:
        return runpy.run_path(str(script), run_name="a_command_of_the_readme")[function]()
    except SystemExit as ended:
        return ended.code


def test_readme_can_be_read_in_five_minutes() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").split()) <= 1500


def test_readme_calls_every_program_and_every_table_file() -> None:
    found = {(command.folder / command.script).relative_to(REPOSITORY) for command in commands()}
    assert {Path(name.split()[0]) for name in PROGRAMS} <= found
    lines = "\n".join(map(shown, commands()))
    tables = (REPOSITORY / "configs" / "tables").glob("*.yaml")
    assert [path.name for path in tables if path.name not in lines] == []


@pytest.mark.parametrize("command", commands(), ids=shown)
def test_program_takes_the_command(command: Command, monkeypatch, capsys) -> None:
    monkeypatch.chdir(command.folder)
    script = command.folder / command.script
    if {"benchmarks", "demos", "__main__.py", "selfcheck.py"} & {
        *script.parts
    }:  # these have no --dry_run
        monkeypatch.setattr("sys.argv", [command.script, *command.flags])
        assert isinstance(call(script, "parse_arguments"), argparse.Namespace)
        return
    flags = [*command.flags, "--dry_run"]
    if "--checkpoint_dir" in flags and "--config" not in flags:  # no checkpoint is there to say how
        flags += ["--config", str(REPOSITORY / "configs" / "default.yaml")]
    monkeypatch.setattr("sys.argv", [command.script, *flags])
    status = call(script, "main")
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert len(printed.out.splitlines()) > 20  # the settings, or the help


def test_every_flag_belongs_to_a_program(monkeypatch, capsys) -> None:
    known = set(FLAGS_OF_OTHERS)
    others = [
        path for name in ("benchmarks", "demos") for path in (REPOSITORY / name).rglob("*.py")
    ]
    others = [path for path in others if "def main" in path.read_text(encoding="utf-8")]
    for line in [*PROGRAMS, *(str(path.relative_to(REPOSITORY)) for path in others)]:
        name, *flags = line.split()
        monkeypatch.setattr("sys.argv", [name, *flags, "--help"])
        assert call(REPOSITORY / name, "main") == 0
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    used = {flag for line in code_lines() for flag in re.findall(r"(?<![\w-])--[\w-]+", line)}
    assert used - known == set()


def test_every_make_target_is_in_the_makefile() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    made = re.compile(r"(?:\w+=\w+ )?make ([\w-]+)")
    named = {match[1] for line in code_lines() if (match := made.fullmatch(line))}
    assert {"demo", "test"} <= named <= targets


def ran(folder: Path, script: str, *flags: str) -> None:
    done = run_script(str(REPOSITORY / script), *flags, cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def tiny_trainings(tmp_path: Path) -> Path:
    """A folder with tiny runs of the three trainings and an image, where the README has them."""
    write_images(tmp_path / "train")
    write_image(tmp_path / "data" / "test" / "scan.png", texture(40, 44))
    small = settings(tmp_path, "dataset_name=my_scans", "expname=PICARD-train", "train.n_steps=2")
    ran(tmp_path, "inpainter/train.py", *as_flags(small))
    for folder in ("train/normal", "test/normal", "test/spot"):
        for number in range(3):
            write_image(tmp_path / "tree" / folder / f"{number}.png", texture(20, 20, 3, number))
    data = "--dataset folder --one_class_idx 0 --resize_to 16 --device cpu --data_root tree"
    ddpm = "--mode train --dim 8 --dim_mults 1 2 --ddpm_batch_size 2 --train_num_steps 2"
    ddpm += " --num_samples 1 --sampling_timesteps 1"
    place = f"--image_size 16 --output_dir {tmp_path / 'runs/NAME'}"
    ran(tmp_path, "diffusion_models/train_eval_ddpm.py", *f"{data} {ddpm} {place}".split())
    dia = "--model resnet18 --width 4 --mode simclr_CSI --shift_trans_type cutperm --warmup 1"
    short = (
        f"--batch_size 2 --epochs 1 --select_ood_samples 1 --run_dir {tmp_path / 'runs/NAME_dia'}"
    )
    ran(tmp_path, "train_dia.py", *f"{data} {dia} {short}".split())
    return tmp_path


def test_the_python_of_the_readme_runs_and_the_manual_names_what_trainings_log(
    tiny_trainings: Path, monkeypatch
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tiny_trainings)
    images = torch.stack([texture(16, 16, 3, seed) for seed in range(3)])
    names = {"images": images, "train_images": images, "test_images": images}
    exec(block, names)
    assert names["heatmaps"]["MCD_image"].shape == (40, 44)
    assert names["dissolved"].shape == images.shape
    assert names["scores"].shape == (3,)
    manual = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    about = manual.partition("## What a run records")[2]
    assert recorded_fields(tiny_trainings) - set(re.findall(r"`([^`]+)`", about)) == set()


def recorded_fields(folder: Path) -> set[str]:
    """The names in the logs of all three trainings."""
    logs = [*folder.rglob("log.jsonl")]
    assert len(logs) == 3
    return {
        name for log in logs for line in log.read_text().splitlines() for name in json.loads(line)
    }

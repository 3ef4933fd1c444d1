"""One table of exit statuses for every program: what docs/operations.md says."""

import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import REPOSITORY
from common.errors import ExitStatus
from inpainter import evaluation_report
from inpainter.fast.scorer import FastScorer
from tests.inpainter.evaluation_case import heatmap_folder

pytestmark = pytest.mark.usefixtures("one_thread")
PICARD = "--config {configs}/default.yaml --device cpu --set test.calibration=off"
SET = "--dataset folder --data_root {empty} --device cpu --one_class_idx 0"
ENDS = {
    ExitStatus.DONE: (
        "inpainter/train.py --dry_run",
        "predict_heatmap.py --dry_run",
        "eval.py --mode heatmap --dry_run",
        "eval.py --mode calibrate --config {configs}/default.yaml --dry_run",
        "eval.py --mode ood_pre --dry_run",
        "diffusion_models/train_eval_ddpm.py --mode train --dry_run",
        "train_dia.py --dry_run",
        "common/datasets/__main__.py list",
        "demos/phantom.py --help",
        "common/selfcheck.py --device cpu --quick",
    ),
    ExitStatus.NOTHING_DONE: (
        f"inpainter/train.py {PICARD} --set train_data_path={{empty}}",
        f"predict_heatmap.py {PICARD} --checkpoint_dir {{empty}} --image_dir {{empty}}",
        "eval.py --mode heatmap --heatmap_dir {empty} --annotations boxes.csv",
        f"eval.py --mode calibrate {PICARD} --checkpoint_dir {{empty}} --image_dir {{empty}}",
        f"eval.py --mode ood_pre {SET} --load_path {{empty}}/last.model",
        f"diffusion_models/train_eval_ddpm.py --mode train {SET}",
        f"train_dia.py {SET} --shift_trans_type rotation",
        "common/datasets/__main__.py prepare aptos {empty} {empty}/sorted",
    ),
    ExitStatus.BAD_SETTINGS: (
        "inpainter/train.py --set train.lr=0",
        "predict_heatmap.py --set test.patch_stride=0",
        "predict_heatmap.py --explain scan.png 30 top",
        "eval.py --mode heatmap --set seed=x --heatmap_dir {empty} --annotations boxes.csv",
        "eval.py --mode heatmap --min_iou 2 --heatmap_dir {empty} --annotations boxes.csv",
        "eval.py --mode calibrate --checkpoint_dir {empty}",
        "eval.py --mode ood_pre --ood_score best",
        "diffusion_models/train_eval_ddpm.py --mode train --dim 0",
        "train_dia.py --epochs 0",
        "common/datasets/__main__.py prepare nowhere {empty} {empty}/sorted",
        "demos/phantom.py --no_such_flag",
        "common/selfcheck.py --slow",
    ),
}


@pytest.fixture
def end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable]:
    """Runs a command line in this process; returns its exit status and what it printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)

    def end(line: str) -> tuple[object, Any]:
        named = line.format(empty=tmp_path / "empty", configs=REPOSITORY / "configs")
        script, *flags = named.split()
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        return ended.value.code, capsys.readouterr()

    yield end
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("status", "line"), [(status, line) for status, lines in ENDS.items() for line in lines]
)
def test_every_program_ends_with_the_status_of_the_table(
    end, status: ExitStatus, line: str
) -> None:
    found, said = end(line)
    assert found == status, said.err
    assert "Traceback" not in said.err


def test_evaluation_without_one_of_its_images_says_so(
    end, tmp_path: Path, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(evaluation_report, "write_plots", lambda *_: None)  # they take seconds
    settings = heatmap_folder(tmp_path)
    (settings.heatmap_dir / "data" / "c_good.pt").write_bytes(b"no heatmap")
    flags = f"--heatmap_dir {settings.heatmap_dir} --annotations {settings.annotations}"
    found, said = end(f"eval.py --mode heatmap {flags} --bootstrap 0")
    assert found == ExitStatus.SOME_FAILED, said.err
    assert "left out: c.png" in caplog.text


def test_selfcheck_names_what_is_off_and_what_it_ran_on(end, monkeypatch) -> None:
    right = FastScorer.__call__

    def wrong(*arguments: object, **options: object) -> dict[str, torch.Tensor]:
        return {name: 1.01 * score for name, score in right(*arguments, **options).items()}

    monkeypatch.setattr(FastScorer, "__call__", wrong)
    found, said = end("common/selfcheck.py --device cpu --quick")
    assert found == ExitStatus.NOTHING_DONE
    lines = said.out.splitlines()
    checks = [line for line in lines if line.startswith(("ok ", "FAILS"))]
    assert len(checks) == 6
    assert [line for line in checks if line.startswith("FAILS")] == [
        "FAILS fast engine: off the plain one by 0.01 at most"
    ]
    facts = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert facts["torch"] == torch.__version__
    assert facts["device"] == "cpu"


def test_the_manual_has_the_statuses() -> None:
    text = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d+) \|", text, re.MULTILINE) == [str(s.value) for s in ExitStatus]

"""An evaluation given other weights, damaged records or damaged features: named, or taken anew."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import CheckpointError
from common.config import ConfigError
from common.images import write_image
from dia.evaluation import evaluate
from dia.settings import DiaConfig, EvaluationConfig
from dia.training import train
from tests.dia.test_training import scores_in
from tests.tiny_dia import SIDE, changed, tiny_contrastive, write_normals
from tests.tiny_runs import texture

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> DiaConfig:
    """A run of one epoch that was evaluated once, so that its features are kept."""
    root = tmp_path_factory.mktemp("finished")
    data = write_normals(root / "data")
    for kind in ("normal", "spot"):
        for number in range(2):
            image = texture(SIDE, SIDE, 3, seed=20 + number + len(kind))
            write_image(root / "data" / "test" / kind / f"{number}.png", image)
    few = EvaluationConfig(ood_samples=1, bootstrap_samples=10)
    config = DiaConfig(
        device="cpu", data=data, contrastive=tiny_contrastive(root / "run"), evaluation=few
    )
    train(config)
    evaluate(of_run(config, root / "run"), "ood_pre", [])
    return config


def of_run(config: DiaConfig, run: Path) -> DiaConfig:
    """The settings that evaluate a copy of the run's folder."""
    loaded = changed(config, "contrastive", load_path=str(run / "last.model"), run_dir=None)
    return changed(loaded, "evaluation", results_dir=str(run / "results"))


@pytest.fixture
def run(finished: DiaConfig, tmp_path: Path) -> Path:
    """A copy of its folder, to be damaged."""
    return shutil.copytree(finished.contrastive.run_dir, tmp_path / "run")


Edit = Callable[[dict[str, Any]], Any]
WEIGHTS: dict[str, tuple[Edit, str]] = {
    "list": (lambda v: [1, 2], "found list"),
    "None": (lambda v: None, "found nothing"),
    "tensor": (lambda v: torch.zeros(3), "found a tensor"),
    "empty": (lambda v: {}, "found an empty dict"),
    "text": (lambda v: {"a": "b"}, "found a = str 'b'"),
    "int keys": (lambda v: {1: torch.zeros(2)}, "found the name '1'"),
    "scalars": (
        lambda v: {k: torch.tensor(1.0) for k in v},
        r"has no linear\.weight",
    ),
    "NaN": (lambda v: {k: t * float("nan") for k, t in v.items()}, "not finite"),
    "integers": (
        lambda v: {k: t.long() for k, t in v.items()},
        "torch.int64 for torch.float32",
    ),
    "a state to go on with": (lambda v: {"model": v}, "a file to go on with"),
}


@pytest.mark.parametrize(("edit", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_file_that_holds_other_weights_is_refused_in_one_line(
    finished, run: Path, edit: Edit, message: str
) -> None:
    path = run / "last.model"
    torch.save(edit(torch.load(path)), path)
    with pytest.raises((CheckpointError, ConfigError), match=message) as refused:
        evaluate(of_run(finished, run), "ood_pre", [])
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


STATES: dict[str, Edit] = {
    "list": lambda v: [1],
    "None": lambda v: None,
    "without config": lambda v: {k: part for k, part in v.items() if k != "config"},
    "config of text": lambda v: v | {"config": {"contrastive": "x"}},
}


@pytest.mark.parametrize("edit", STATES.values(), ids=STATES)
def test_damaged_state_beside_the_weights_costs_no_scores(finished, run: Path, edit: Edit) -> None:
    torch.save(edit(torch.load(run / "state.pt")), run / "state.pt")
    (run / "config.yaml").write_text("a: &a [1]\nb: [*a, *a]\n")
    assert "Checkpoint chosen by" in evaluate(of_run(finished, run), "ood_pre", []).text


FEATURES: dict[str, Edit] = {
    "list": lambda v: [1],
    "None": lambda v: None,
    "no shift": lambda v: {k: part for k, part in v.items() if k != "shift"},
    "text": lambda v: v | {"simclr": "x"},
    "another shape": lambda v: v | {"simclr": torch.zeros(1, 1)},
    "other names": lambda v: v | {"names": ["x"] * len(v["names"])},
    "NaN": lambda v: v | {"simclr": v["simclr"] * float("nan")},
    "integers": lambda v: v | {"simclr": v["simclr"].long()},
}


@pytest.mark.parametrize("first", range(0, len(FEATURES), 3))
def test_damaged_features_are_taken_anew(finished, run: Path, first: int, caplog) -> None:
    before = scores_in(run / "results")
    edits = list(FEATURES.values())[first : first + 3]
    paths = sorted((run / "features").iterdir())[: len(edits)]  # train, normal, spot
    for path, edit in zip(paths, edits, strict=True):
        torch.save(edit(torch.load(path)), path)
    evaluate(of_run(finished, run), "ood_pre", [])
    assert caplog.text.count("The features are taken anew.") == len(edits)
    for path in paths:
        features = torch.load(path)
        whole = torch.load(Path(finished.contrastive.run_dir) / "features" / path.name)
        assert torch.equal(features["simclr"], whole["simclr"])
        assert torch.equal(features["shift"], whole["shift"])
    assert scores_in(run / "results") == before


def test_folder_of_a_run_is_evaluated_by_its_best_checkpoint(finished, run: Path) -> None:
    shutil.copy(run / "last.model", run / "best_CSI.model")
    settings = changed(of_run(finished, run), "contrastive", load_path=str(run))
    evaluate(settings, "ood_pre", [])
    facts = json.loads((run / "results" / "results.json").read_text())
    assert facts["checkpoint"] == "best_CSI.model"


def test_later_evaluation_replaces_the_scores_of_an_earlier_one(finished, run: Path) -> None:
    settings, results = of_run(finished, run), run / "results"
    both = changed(settings, "evaluation", ood_score=("CSI", "simclr"), save_score=True)
    evaluate(both, "ood_pre", [])
    assert (results / "scores_simclr.csv").is_file()
    (results / "scores_mine.csv").write_text("a reader's own")
    evaluate(settings, "ood_pre", [])
    left = {path.name for path in results.iterdir()}
    scores = {"scores_CSI.csv", "histogram_CSI.png", "roc_CSI.png", "scores_mine.csv"}
    assert {name for name in left if name.startswith(("score", "histogram", "roc"))} == scores


def test_printed_deciles_of_several_scores_are_titled_and_those_of_one_are_as_published(
    finished, run: Path
) -> None:
    settings = changed(of_run(finished, run), "evaluation", print_score=True)
    both = changed(settings, "evaluation", ood_score=("CSI", "simclr"))
    one, two = (evaluate(each, "ood_pre", []).text.splitlines() for each in (settings, both))
    assert [line.split()[0] for line in one[:3]] == ["folder", "one_class_1", "AUROC"]
    assert two[:3] == ["CSI:", *one[:2]]
    assert two[3] == "simclr:"

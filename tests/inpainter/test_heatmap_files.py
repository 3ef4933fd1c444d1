"""A folder of heatmaps that was damaged, or made by a stranger: refused by name, never followed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config import ConfigError
from common.images import write_image
from inpainter.evaluation import EvaluationSettings, evaluate_heatmaps
from inpainter.evaluation_report import made_by, per_image_csv, write_report
from inpainter.heatmap_tables import EvaluationError, left_out, list_heatmaps, read_heatmap
from tests.inpainter.evaluation_case import BOXES, heatmap_folder

HEADER = b"image,metric,file\n"


@pytest.fixture
def settings(tmp_path: Path) -> EvaluationSettings:
    return heatmap_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + b"a.png,../../../evil,data/a.pt\n", "line 2: a metric is named with"),
        (HEADER + b"a.png,/tmp/evil,data/a.pt\n", "line 2: a metric is named with"),
        (HEADER + b"a.png,MCD_image,../a.pt\n", "line 2: file must be a path below its folder"),
        (HEADER + b"a.png,MCD_image,/etc/a.pt\n", "line 2: file must be a path below its folder"),
        (HEADER + b"../a.png,MCD_image,a.pt\n", "line 2: image must be a path below its folder"),
        (HEADER + b"a.png,m," + b"x" * 200_000 + b"\n", r"no CSV \(field larger than"),
        (HEADER + b"\xff.png,m,x\n", r"no text in UTF-8 .* Run predict_heatmap\.py again"),
        (HEADER + b"a.png,m,x,more\n", "line 2: more values than columns"),
        (HEADER + b'a.png,m,"x\n', "no CSV"),
        (HEADER + b"a.png,m,x\x00y\n", "heatmaps.csv"),
    ],
)
def test_list_that_leads_astray_is_refused_with_file_and_line(
    settings: EvaluationSettings, content: bytes, message: str
) -> None:
    path = settings.heatmap_dir / "heatmaps.csv"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=f"(?s){path}.*{message}|{message}"):
        list_heatmaps(settings.heatmap_dir)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(40_000, 40_000),
        torch.eye(8).to_sparse(),
        torch.zeros(8, 8, device="meta"),
        torch.zeros(8, 8, dtype=torch.int32),
    ],
    ids=["expanded", "sparse", "meta", "integers"],
)
def test_tensor_that_is_no_plain_heatmap_is_refused_by_name(tmp_path: Path, tensor) -> None:
    torch.save(tensor, tmp_path / "a.pt")
    with pytest.raises(EvaluationError, match=r"a\.pt: "):
        read_heatmap(tmp_path / "a.pt")


def test_tensor_that_requires_grad_is_read(tmp_path: Path) -> None:
    torch.save(torch.ones(2, 3, requires_grad=True), tmp_path / "a.pt")
    assert read_heatmap(tmp_path / "a.pt").tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "netG: [1, {"),
        ("config.yaml", "a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
        ("config.yaml", "a: !!timestamp foo\n"),
        ("config.yaml", "a: !!bool maybe\n"),
        ("config.yaml", "a: !!set {x}\n"),
        ("config.yaml", "#" * 300_000),
        ("config.yaml", "[" * 5000),
        ("env.json", "{broken"),
        ("run.txt", b"\xff"),
    ],
)
def test_damaged_record_is_said_to_be_unreadable_and_costs_no_numbers(
    settings: EvaluationSettings, tmp_path: Path, name: str, content: str | bytes
) -> None:
    path = settings.heatmap_dir / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert made_by(settings.heatmap_dir)[name]["unreadable"]
    write_report(evaluate_heatmaps(settings), tmp_path / "out", record={})
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "unreadable" in written["heatmaps_made_by"][name]
    assert written["metrics"]["good"]["images"] == 3


def test_what_json_has_no_word_for_is_written_as_text(
    settings: EvaluationSettings, tmp_path: Path
) -> None:
    (settings.heatmap_dir / "config.yaml").write_text(
        "day: 2024-01-02\n1: .nan\n2024-01-02: [1, .inf]\n"
    )
    (settings.heatmap_dir / "env.json").write_text('{\n\t"gpus": []\n}')
    write_report(evaluate_heatmaps(settings), tmp_path / "out", record={})
    written = json.loads((tmp_path / "out" / "results.json").read_text())["heatmaps_made_by"]
    assert written["config.yaml"] == {
        "day": "2024-01-02",
        "1": "nan",
        "2024-01-02": [1, "inf"],
    }
    assert written["env.json"] == {"gpus": []}


def test_heatmap_of_another_size_than_its_image_is_left_out(
    settings: EvaluationSettings, tmp_path: Path
) -> None:
    write_image(tmp_path / "images" / "a.png", torch.zeros(16, 20))
    result = evaluate_heatmaps(replace(settings, image_dir=tmp_path / "images")).results[0]
    assert list(result.excluded) == ["a.png"]
    assert "is (16, 20) pixels (height, width), its heatmap (8, 10)" in result.excluded["a.png"]


def test_annotated_images_that_prediction_left_out_are_an_error_or_counted(
    settings: EvaluationSettings, tmp_path: Path
) -> None:
    (settings.heatmap_dir / "left_out.csv").write_text(
        "image,reason\nbroken.png,truncated\nother.png,truncated\n"
    )
    settings.annotations.write_text(BOXES + "broken.png,0,0,1,1\n")
    assert len(left_out(settings.heatmap_dir)) == 2
    with pytest.raises(EvaluationError, match=r"1 annotated images have no heatmap.*: broken\.png"):
        evaluate_heatmaps(settings)
    evaluation = evaluate_heatmaps(replace(settings, on_unknown_image="skip"))
    assert evaluation.unscored == {"broken.png": "truncated"}
    write_report(evaluation, tmp_path / "out", record={})
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["annotated_images_without_heatmap"] == {"broken.png": "truncated"}


def test_nothing_to_find_is_refused_with_what_to_look_at(settings: EvaluationSettings) -> None:
    settings.annotations.write_text("image,top,left,height,width\n")
    with pytest.raises(EvaluationError, match=r"lesion .* Does .*boxes\.csv mark the lesions"):
        evaluate_heatmaps(settings)


def test_image_of_lesion_alone_is_refused_in_one_line(settings: EvaluationSettings) -> None:
    settings.annotations.write_text(
        "image,top,left,height,width\n"
        + "".join(f"{image},0,0,8,10\n" for image in ("a.png", "sub/b.png", "c.png"))
    )
    with pytest.raises(EvaluationError, match="none of 3 images has a lesion that can be"):
        evaluate_heatmaps(settings)


@pytest.mark.parametrize("draws", [-1, 10**12])
def test_numbers_of_bootstrap_draws_without_sense_are_refused(
    settings: EvaluationSettings, draws: int
) -> None:
    with pytest.raises(ConfigError, match=f"must be 0 to 100000.*got {draws}"):
        replace(settings, n_resamples=draws)


def test_names_that_are_no_utf8_are_written_in_tables_and_json(
    settings: EvaluationSettings, tmp_path: Path
) -> None:
    table = settings.heatmap_dir / "heatmaps.csv"
    table.write_text(table.read_text().replace("c.png,", "\\xfc.png,"))
    evaluation = evaluate_heatmaps(settings)
    name = os.fsdecode(b"\xfc.png")
    assert evaluation.results[0].rows[2].image == name
    assert "\\xfc.png,good," in per_image_csv(evaluation.results)
    evaluation.results[0].excluded[name] = f"No {name}"
    write_report(evaluation, tmp_path / "out", record={"command": [name]})
    written = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert written["metrics"]["good"]["images_excluded"] == {name: f"No {name}"}

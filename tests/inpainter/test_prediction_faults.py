"""What a prediction does about replaced files, odd names, bad annotations, damaged tables."""

import csv
import os
from pathlib import Path

import pytest
import torch

from common.checkpoint import CheckpointError, checkpoint_path, load_tensors, save_atomic
from common.config import ConfigError
from common.errors import ExitStatus, UserError
from common.images import write_image
from inpainter import prediction, predictor
from inpainter.heatmap_tables import list_heatmaps
from inpainter.run_identity import influential_settings
from inpainter.settings import PicardConfig
from inpainter.windows import WindowError
from tests.inpainter.test_training_faults import DAMAGES, change
from tests.test_bad_settings import BOMBS
from tests.tiny_runs import (
    PREDICT,
    RGB,
    heatmaps_in,
    predicted,
    read_table,
    run_script,
    texture,
    tiny_config,
    tiny_file,
    with_test,
    write_checkpoint,
    write_every_format,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_METRIC = "test.heatmap_metrics=[MCD_image]"
PLOTS = "test.save_heatmap_plots=true"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images and a checkpoint."""
    write_images(tmp_path / "test")
    write_checkpoint(tmp_path / "model", tiny_config(tmp_path))
    return tmp_path


def replace_checkpoint(folder: Path, config: PicardConfig) -> None:
    """Other weights of the same step."""
    write_checkpoint(folder / "other", config, step=2)
    for role in ("gen", "dis"):
        source, target = folder / "other", folder / "model"
        checkpoint_path(source, role, 2).replace(checkpoint_path(target, role, 1))


@pytest.mark.parametrize("colours", [(), RGB])
def test_grey_and_colour_images_of_8_and_16_bits_are_drawn(tmp_path, colours) -> None:
    (tmp_path / "test").mkdir()
    names = write_every_format(tmp_path / "test", channels=3 if colours else 1)
    config = tiny_config(tmp_path, *colours, ONE_METRIC, PLOTS)
    write_checkpoint(tmp_path / "model", config)
    result = predicted(tmp_path, config)
    assert (result.finished, result.notes) == (names, [])
    assert len(list((result.folder / "plots").iterdir())) == len(names)


def test_heatmaps_of_replaced_weights_are_not_taken_for_the_new_ones(folder) -> None:
    config = tiny_config(folder, ONE_METRIC)
    first = predicted(folder, config)
    given = predicted(folder, config, output_dir=folder / "mine")
    replace_checkpoint(folder, config)
    second = predicted(folder, config)
    assert second.folder != first.folder
    assert second.finished == ["0.png", "1.png", "2.png"]
    assert not torch.equal(heatmaps_in(second.folder)["0.png"], heatmaps_in(first.folder)["0.png"])
    with pytest.raises(
        CheckpointError, match=r"another checkpoint: gen [0-9a-f]{12}\.\.\.[0-9a-f]{12} there"
    ):
        predicted(folder, config, output_dir=given.folder)


def test_only_the_critic_that_is_used_counts(folder) -> None:
    image, feature = (tiny_config(folder, f"test.heatmap_metrics=[MCD_{kind}]")
                      for kind in ("image", "feature"))  # fmt: skip
    for config in (image, feature):
        predicted(folder, config)
    weights = load_tensors(checkpoint_path(folder / "model", "dis", 1))
    weights["localD"]["linear.weight"] *= 2
    save_atomic(weights, checkpoint_path(folder / "model", "dis", 1))
    assert predicted(folder, image).finished == []
    assert len(predicted(folder, feature).finished) == 3


def test_replaced_images_are_scored_again_and_a_mere_new_date_is_none(folder) -> None:
    config = tiny_config(folder, ONE_METRIC)
    first = predicted(folder, config)
    before = heatmaps_in(first.folder)
    write_image(folder / "test" / "1.png", texture(40, 44, seed=9))
    os.utime(folder / "test" / "2.png", ns=(1, 1))
    second = predicted(folder, config)
    assert (second.folder, second.finished) == (first.folder, ["1.png"])
    assert second.notes == ["1 scored again: the file has changed since: 1.png"]
    after = heatmaps_in(second.folder)
    same = {name: torch.equal(before[name], after[name]) for name in before}
    assert same == {"0.png": True, "1.png": False, "2.png": True}
    assert len(read_table(first.folder / "scores.csv")) == 3


def test_images_that_are_gone_are_no_longer_listed_and_that_is_said(folder) -> None:
    config = tiny_config(folder)
    first = predicted(folder, config)
    (folder / "test" / "1.png").unlink()
    second = predicted(folder, config)
    assert second.notes == ["1 no longer among the images, so no longer in the tables: 1.png"]
    for table in ("images.csv", "scores.csv", "heatmaps.csv"):
        rows = read_table(first.folder / table)
        assert {row["image"] for row in rows} == {"0.png", "2.png"}


def test_heatmaps_without_a_record_of_contents_are_made_anew(folder) -> None:
    config = tiny_config(folder, ONE_METRIC)
    result = predicted(folder, config, output_dir=folder / "old")
    (result.folder / "images.csv").unlink()
    (result.folder / "run.txt").write_text(
        f"checkpoint {folder / 'model'} step 1\nimages {folder / 'test'}\nsettings 01234567\n"
    )
    again = predicted(folder, config, output_dir=result.folder)
    assert len(again.finished) == 3
    assert "3 scored again: this folder does not record from which content" in again.notes[0]
    (result.folder / "run.txt").write_text("checkpoint elsewhere step 1\nimages x\nsettings 0\n")
    with pytest.raises(CheckpointError, match="another checkpoint"):
        predicted(folder, config, output_dir=result.folder)


def test_every_setting_counts_but_those_that_change_no_heatmap(folder) -> None:
    counted = influential_settings(tiny_config(folder))
    for key in ("seed", "netG.ngf", "netG.dropout_which", "netD.ndf", "test.patch_stride"):
        assert key in counted
    for key in ("train.lr", "expname", "device", "test.engine", "test.parallel_batchsize"):
        assert key not in counted


def test_step_that_a_training_deletes_is_looked_up_again(folder, monkeypatch) -> None:
    config = tiny_config(folder, ONE_METRIC)
    write_checkpoint(folder / "model", config, step=2)

    def load_and_lose(*arguments: object, **options: object) -> object:
        if checkpoint_path(folder / "model", "gen", 2).is_file():
            checkpoint_path(folder / "model", "gen", 2).unlink()
            raise CheckpointError("No gen_00000002.pt")
        return build(*arguments, **options)

    build = predictor.build_scorer
    monkeypatch.setattr(predictor, "build_scorer", load_and_lose)
    result = predicted(folder, config)
    assert "step 1\n" in (result.folder / "run.txt").read_text()


ODD_NAMES = [
    os.fsdecode(b"M\xfcller.png"),
    "two\nlines.png",
    "a$$b.png",
    r"$\frac{1}{$.png",
    "m" * 246 + ".png",
    "日本語.png",
    "x.png.png",
    "x.png",
    "x.bmp.png",
]


def test_images_of_any_name_are_scored_drawn_and_found_again(tmp_path) -> None:
    (tmp_path / "test").mkdir()
    for seed, name in enumerate(ODD_NAMES):
        write_image(tmp_path / "test" / "plain.png", texture(32, 32, seed=seed))
        (tmp_path / "test" / "plain.png").rename(tmp_path / "test" / name)
    config = tiny_config(tmp_path, ONE_METRIC, PLOTS)
    write_checkpoint(tmp_path / "model", config)
    result = predicted(tmp_path, config)
    assert sorted(result.finished) == sorted(ODD_NAMES)
    assert result.notes == []
    assert len(list((result.folder / "plots").iterdir())) == len(ODD_NAMES)
    (entries,) = list_heatmaps(result.folder).values()
    assert {entry.image for entry in entries} == set(ODD_NAMES)
    assert len({entry.file for entry in entries}) == len(ODD_NAMES)
    assert all(entry.file.is_file() for entry in entries)
    assert predicted(tmp_path, config).finished == []


def test_command_prints_a_name_that_is_no_utf8(tmp_path) -> None:
    write_images(tmp_path / "test", n=1)
    odd = tmp_path / "test" / os.fsdecode(b"M\xfcller.png")
    odd.write_bytes(b"no image")
    write_checkpoint(tmp_path / "model", tiny_config(tmp_path))
    done = run_script(
        PREDICT, "--config", tiny_file(tmp_path), "--checkpoint_dir", tmp_path / "model"
    )
    assert done.returncode == ExitStatus.SOME_FAILED, done.stderr
    assert r"M\xfcller.png" in done.stdout
    assert "Traceback" not in done.stderr


def test_images_that_share_a_stem_have_heatmaps_of_their_own(tmp_path) -> None:
    for seed, name in enumerate(("a/b.png", "a__b.png", "s.png", "s.png.png")):
        write_image(tmp_path / "test" / name, texture(32, 32, seed=seed))
    config = tiny_config(tmp_path, "data_with_subfolder=true", ONE_METRIC)
    write_checkpoint(tmp_path / "model", config)
    maps = heatmaps_in(predicted(tmp_path, config).folder)
    assert len({heat.flatten()[0].item() for heat in maps.values()}) == len(maps) == 4


def test_annotations_that_do_not_fit_cost_no_heatmap(folder) -> None:
    write_image(folder / "masks" / "0.png", torch.ones(10, 10))
    write_image(folder / "masks" / "1.png", torch.ones(40, 44))
    write_image(folder / "masks" / "elsewhere.png", torch.ones(40, 44))
    config = tiny_config(folder, ONE_METRIC, PLOTS)
    result = predicted(folder, config, annotations=folder / "masks")
    assert len(result.finished) == 3
    assert "1 with an annotation that is not drawn: 0.png" in result.notes
    assert any(note.startswith("1 annotated, but not among the images") for note in result.notes)
    boxes = folder / "boxes.csv"
    boxes.write_text("image,top,left,height,width\n2.png,100,0,5,5\n")
    again = predicted(folder, config, annotations=boxes, overwrite=True)
    assert again.notes == ["1 with an annotation that is not drawn: 2.png"]


def test_weights_that_are_not_finite_leave_no_nan_in_the_tables(folder) -> None:
    path = checkpoint_path(folder / "model", "gen", 1)
    weights = load_tensors(path)
    weights["coarse_generator.conv17.conv.bias"][:] = float("nan")
    save_atomic(weights, path)
    config = tiny_config(folder, ONE_METRIC)
    with pytest.raises(CheckpointError, match=r"step 1: .*(NaN|finite)"):
        predicted(folder, config, output_dir=folder / "out")
    assert read_table(folder / "out" / "scores.csv") == []
    write_checkpoint(folder / "model", config)  # whole weights may go into the empty folder
    assert predicted(folder, config, output_dir=folder / "out").finished != []


USED = {
    name: damage
    for name, damage in DAMAGES.items()
    if damage[0] == "gen" or (damage[0] == "dis" and "globalD" not in damage[2])
}
"""Damages of what a prediction reads: the generator and the local critic."""


@pytest.mark.parametrize(("role", "edit"), [d[:2] for d in USED.values()], ids=USED)
def test_checkpoint_that_holds_something_else_is_refused_in_one_line(folder, role, edit) -> None:
    change(checkpoint_path(folder / "model", role, 1), edit)
    with pytest.raises(CheckpointError, match=r"model") as refused:
        predicted(folder, tiny_config(folder, "test.heatmap_metrics=[MCD_feature]"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("wanted", ["²", "-1", "1" * 5000, "1 ", "", "newest"])
def test_word_that_is_no_step_is_refused_with_the_flag_of_this_program(folder, wanted) -> None:
    with pytest.raises(CheckpointError, match=r"is no step.*there: 1\. .*--checkpoint_iter\."):
        predicted(folder, tiny_config(folder), checkpoint_iter=wanted)


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"step": 1, "select_l1": ' + "9" * 400 + "}",
        '{"step": ' + "9" * 5000 + ', "select_l1": 1}',
        '{"step": 1, "select_l1": NaN}',
        '{"step": true, "select_l1": 1}',
        '{"step": 1, "select_l1": "0.1"}',
    ],
    ids=["deep", "huge error", "huge step", "NaN", "step true", "text"],
)
def test_record_that_says_no_error_makes_no_step_the_best(folder, line: str) -> None:
    config = tiny_config(folder, ONE_METRIC)
    write_checkpoint(folder / "model", config, step=2)
    (folder / "model" / "log.jsonl").write_text(line + "\n")
    with pytest.raises(CheckpointError, match=r"log\.jsonl records no .*Steps there: 1, 2"):
        predicted(folder, config, checkpoint_iter="best")
    with (folder / "model" / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "select_l1": 0.5}\n')
    result = predicted(folder, config, checkpoint_iter="best")
    assert "step 2\n" in (result.folder / "run.txt").read_text()


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bomb_beside_the_checkpoint_is_refused_in_a_short_line(folder, name: str) -> None:
    (folder / "model" / "config.yaml").write_text(BOMBS[name])
    with pytest.raises(ConfigError, match=r"config\.yaml") as refused:
        predicted(folder, tiny_config(folder))
    assert len(str(refused.value)) < len(str(folder)) + 500


def test_image_that_became_a_pipe_or_vanished_is_left_out(folder, monkeypatch) -> None:
    listed = prediction.list_images

    def list_then_replace(*arguments: object, **options: object) -> list[Path]:
        found = listed(*arguments, **options)
        (folder / "test" / "0.png").unlink()
        (folder / "test" / "1.png").unlink()
        os.mkfifo(folder / "test" / "1.png")
        return found

    monkeypatch.setattr(prediction, "list_images", list_then_replace)
    result = predicted(folder, tiny_config(folder, ONE_METRIC))
    assert result.finished == ["2.png"]
    assert all("no longer" in result.bad[name] for name in ("0.png", "1.png"))
    rows = read_table(result.folder / "left_out.csv")
    assert [row["image"] for row in rows] == ["0.png", "1.png"]


def test_image_without_any_tissue_is_named(folder) -> None:
    write_image(folder / "test" / "1.png", torch.zeros(40, 44))
    config = tiny_config(folder, ONE_METRIC, "test.only_check_nonblack_pixels=true")
    result = predicted(folder, config)
    assert result.notes == ["1 without tissue: no window of it was scored, its heatmap is 0: 1.png"]
    rows = {row["image"]: row for row in read_table(result.folder / "images.csv")}
    assert rows["1.png"]["completed_windows"] == "0"
    assert rows["0.png"]["completed_windows"] == rows["0.png"]["windows"] == "1"


def test_stride_that_leaves_gaps_is_refused_before_anything_is_written(folder) -> None:
    config = with_test(tiny_config(folder), heatmap_type="averaged_hole", patch_stride=17)
    with pytest.raises(WindowError, match="Use a stride of 16 or less"):
        predicted(folder, config)
    assert not (folder / "heatmaps").exists()


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("scores.csv", b"\xff\xfe\n", r"scores\.csv is no text in UTF-8"),
        (
            "scores.csv",
            b"name,score\na,1\n",
            r"scores\.csv: columns \['image', 'max', 'mean', 'metric', 'p99'\] are missing",
        ),
        (
            "heatmaps.csv",
            b"image,metric,file\n0.png,MCD_image\n",
            r"heatmaps\.csv, line 2: a value is missing",
        ),
        ("heatmaps.csv", b'image,metric,file\n"0.png,MCD_image,x\n', r"heatmaps\.csv, .*no CSV"),
        ("images.csv", b"image,sha256\n", r"images\.csv: columns .* are missing"),
        ("run.txt", b"\xff", r"run\.txt is no UTF-8 text"),
    ],
)
def test_damaged_tables_are_named_with_the_remedy_and_overwrite_mends_them(
    folder, table: str, content: bytes, message: str
) -> None:
    config = tiny_config(folder, ONE_METRIC)
    predicted(folder, config, output_dir=folder / "mine")
    (folder / "mine" / table).write_bytes(content)
    with pytest.raises(UserError, match=rf"{message}.*--overwrite"):
        predicted(folder, config, output_dir=folder / "mine")
    assert len(predicted(folder, config, output_dir=folder / "mine", overwrite=True).finished) == 3


def test_line_that_a_kill_cut_short_is_dropped(folder) -> None:
    config = tiny_config(folder, ONE_METRIC)
    result = predicted(folder, config)
    path = result.folder / "scores.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert predicted(folder, config).finished == ["2.png"]
    assert path.read_bytes() == whole


def test_output_path_that_is_a_file_is_refused_with_the_remedy(folder) -> None:
    (folder / "mine").write_text("text")
    with pytest.raises(CheckpointError, match=r"mine is a file\. Pass a folder"):
        predicted(folder, tiny_config(folder), output_dir=folder / "mine")


def test_finished_images_are_told_without_reading_tables_or_images_again(folder) -> None:
    """3000 images are sorted out from the tables as they were read once."""
    config = tiny_config(folder, ONE_METRIC, "test.save_heatmap_data=false")
    result = predicted(folder, config)
    (source,) = [row for row in read_table(result.folder / "images.csv") if row["image"] == "0.png"]
    (scores,) = [row for row in read_table(result.folder / "scores.csv") if row["image"] == "0.png"]
    names = [f"copy{number}.png" for number in range(3000)]
    for name in names:
        os.link(folder / "test" / "0.png", folder / "test" / name)
    for table, row in (("images.csv", source), ("scores.csv", scores)):
        with (result.folder / table).open("a", newline="") as file:
            csv.DictWriter(file, row, lineterminator="\n").writerows(
                [row | {"image": name} for name in names]
            )
    again = predicted(folder, config)
    assert (len(again.already_there), again.finished) == (3003, [])

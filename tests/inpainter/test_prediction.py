"""The prediction run as a function: which images, which folder, what is redone."""

import dataclasses
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.checkpoint import CheckpointError
from common.images import ImageError, write_image
from inpainter.folder_run import TooManyFailuresError, failure_kind, prefetched
from inpainter.heatmap import ScoreError
from inpainter.settings import PicardConfig
from inpainter.windows import WindowError
from tests.tiny_runs import (
    PATIENCE,
    corrupt,
    ended,
    forked,
    heatmaps_in,
    predicted,
    read_table,
    texture,
    tiny_config,
    wait_until,
    with_test,
    write_checkpoint,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_files_are_named_as_published(folder) -> None:
    (folder / "test" / "patient").mkdir()
    (folder / "test" / "0.png").rename(folder / "test" / "patient" / "0.png")
    result = predicted(
        folder, tiny_config(folder, "data_with_subfolder=true", "test.save_heatmap_plots=true")
    )
    stem = "patient__0_MCD_feature_2_0.5_16_32_16"
    assert (result.folder / "data" / f"{stem}.pt").is_file()
    picture = Image.open(result.folder / "plots" / f"{stem}.png")
    assert min(picture.size) > 100
    assert result.finished == ["1.png", "2.png", "patient/0.png"]


def test_images_that_differ_in_the_suffix_alone_have_files_of_their_own(tmp_path) -> None:
    write_images(tmp_path / "test", n=1)
    write_image(tmp_path / "test" / "zero.png", texture(40, 44, seed=3))
    Image.open(tmp_path / "test" / "zero.png").save(tmp_path / "test" / "0.bmp")
    write_checkpoint(tmp_path / "model", tiny_config(tmp_path))
    result = predicted(tmp_path, tiny_config(tmp_path))
    maps = heatmaps_in(result.folder)
    assert set(maps) == {"0.bmp", "0.png", "zero.png"}
    assert not torch.equal(maps["0.bmp"], maps["0.png"])
    files = {path.name for path in (result.folder / "data").iterdir()}
    assert "zero_MCD_image_2_0.5_16_32_16.pt" in files
    assert "0.bmp_MCD_image_2_0.5_16_32_16.pt" in files


def test_running_again_leaves_finished_images_alone_and_overwrite_redoes_them(folder) -> None:
    config = tiny_config(folder, "test.heatmap_metrics=[MCD_image]", "test.save_heatmap_plots=true")
    first = predicted(folder, config)
    files = [*(first.folder / "data").iterdir(), *(first.folder / "plots").iterdir()]
    assert len(files) == 6
    times = {path: path.stat().st_mtime_ns for path in files}
    again = predicted(folder, with_test(config, parallel_batchsize=1))
    assert (again.folder, again.finished) == (first.folder, [])
    assert again.already_there == ["0.png", "1.png", "2.png"]
    assert {path: path.stat().st_mtime_ns for path in files} == times
    redone = predicted(folder, config, overwrite=True)
    assert (redone.folder, len(redone.finished)) == (first.folder, 3)
    assert all(path.stat().st_mtime_ns > times[path] for path in files)
    assert len(read_table(first.folder / "scores.csv")) == 3
    (first.folder / "data" / files[0].name).unlink()
    assert len(predicted(folder, config).finished) == 1


def test_other_settings_or_checkpoints_get_another_folder(folder) -> None:
    config = tiny_config(folder)
    first = predicted(folder, config, output_dir=folder / "mine")
    with pytest.raises(
        CheckpointError,
        match=r"other settings or another checkpoint: test\.droprate 0\.5 there, 0\.1 now\. Pass",
    ):
        predicted(folder, with_test(config, droprate=0.1), output_dir=folder / "mine")
    write_checkpoint(folder / "model", config, step=2)
    with pytest.raises(CheckpointError, match="other settings or another checkpoint"):
        predicted(folder, config, output_dir=folder / "mine")
    assert predicted(folder, config, output_dir=first.folder, checkpoint_iter=1).finished == []
    by_default = [
        predicted(folder, config),
        predicted(folder, config, checkpoint_iter=1),
        predicted(folder, config),
    ]
    assert by_default[0].folder != by_default[1].folder
    assert by_default[0].folder == by_default[2].folder


def test_overwriting_with_other_settings_forgets_the_old_rows_at_once(folder) -> None:
    config = tiny_config(folder)
    first = predicted(folder, config, output_dir=folder / "mine")
    write_checkpoint(folder / "model", config, step=2)
    corrupt(folder / "test" / "0.png")
    strict = with_test(config, on_bad_image="error")
    with pytest.raises(ImageError):
        predicted(folder, strict, output_dir=first.folder, overwrite=True)
    (folder / "test" / "0.png").unlink()
    assert predicted(folder, strict, output_dir=first.folder).finished == ["1.png", "2.png"]


def test_a_killed_run_goes_on_and_leaves_nothing_half_written(folder) -> None:
    write_images(folder / "test", n=12, size=(48, 64))
    config = tiny_config(folder, "test.patch_stride=4")
    options = {"output_dir": folder / "mine"}
    child = forked(partial(predicted, folder, config, **options))
    table = folder / "mine" / "heatmaps.csv"  # the last to be written
    wait_until(lambda: (table.is_file() and read_table(table)) or not child.is_alive())
    os.kill(child.pid, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    done = len({row["image"] for row in read_table(table)})
    assert 0 < done < 12
    for half in ("data/9_MCD_image.pt.tmp", "plots/9.png.tmp", "progress/9.png", "scores.csv.tmp"):
        (folder / "mine" / half).parent.mkdir(exist_ok=True)
        (folder / "mine" / half).write_bytes(b"half")
    result = predicted(folder, config, **options)
    assert (len(result.already_there), len(result.finished)) == (done, 12 - done)
    assert not list(result.folder.rglob("*.tmp"))
    assert not (result.folder / "progress").exists()
    whole = predicted(folder, config, output_dir=folder / "whole")
    for name, heat in heatmaps_in(whole.folder).items():
        assert torch.equal(heat, heatmaps_in(result.folder)[name])


def test_bad_images_are_left_out_with_their_reason_or_stop_the_run(folder) -> None:
    broken = corrupt(folder / "test" / "1.png")
    write_image(folder / "test" / "small.png", texture(20, 64))
    result = predicted(folder, tiny_config(folder))
    assert result.finished == ["0.png", "2.png"]
    assert set(result.bad) == {"1.png", "small.png"}
    assert str(broken) in result.bad["1.png"]
    small = result.bad["small.png"]
    assert "small.png: an image of 20 x 64 pixels is smaller than the window, 32 x 32" in small
    assert "set test.heatmap_alignment: centred, which pads it" in small
    rows = read_table(result.folder / "failures.csv")
    assert [(row["image"], row["kind"]) for row in rows] == [
        ("1.png", "image"),
        ("small.png", "window"),
    ]
    assert {row["image"]: row["message"] for row in rows} == result.bad
    with pytest.raises(ImageError, match=str(broken)):
        predicted(folder, tiny_config(folder, "test.on_bad_image=error"))


def test_failures_are_of_a_kind() -> None:
    kinds = [WindowError(), ScoreError(), ImageError(), MemoryError()]
    assert [failure_kind(each) for each in kinds] == ["window", "scores", "image", "memory"]


def test_more_failures_than_allowed_stop_the_run_and_mended_ones_leave_the_table(folder) -> None:
    config = tiny_config(folder)
    whole = (folder / "test" / "1.png").read_bytes()
    corrupt(folder / "test" / "1.png")
    corrupt(folder / "test" / "2.png")
    for number in (3, 4):
        write_image(folder / "test" / f"{number}.png", texture(40, 44, seed=number))
    with pytest.raises(TooManyFailuresError, match=r"^1 could not be .*: 1\.png.*--max_failures 0"):
        predicted(folder, config, max_failures=0, output_dir=folder / "out")
    assert [row["image"] for row in read_table(folder / "out" / "failures.csv")] == ["1.png"]
    (folder / "test" / "1.png").write_bytes(whole)
    allowed = predicted(folder, config, max_failures=1, output_dir=folder / "out")
    assert (allowed.already_there, allowed.finished) == (["0.png"], ["1.png", "3.png", "4.png"])
    assert [row["image"] for row in read_table(folder / "out" / "failures.csv")] == ["2.png"]
    (folder / "test" / "2.png").write_bytes(whole)
    predicted(folder, config, output_dir=folder / "out")
    assert not (folder / "out" / "failures.csv").exists()


def test_empty_and_missing_folders_are_named_and_nothing_is_written(folder) -> None:
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(ImageError, match=rf"No image in {empty}\. Expected files that end in"):
        predicted(folder, tiny_config(folder), image_dir=empty)
    with pytest.raises(ImageError, match=r"folder .*absent does not exist"):
        predicted(folder, tiny_config(folder), image_dir=folder / "absent")
    assert not (folder / "heatmaps").exists()


def test_checkpoints_that_cannot_be_used_are_named(folder) -> None:
    config = tiny_config(folder)
    with pytest.raises(CheckpointError, match=r"No gen_00000007.*Steps there: 1\. Pass one with"):
        predicted(folder, config, checkpoint_iter=7)
    with pytest.raises(CheckpointError, match=r"records no selection error"):
        predicted(folder, config, checkpoint_iter="best")
    (folder / "model" / "log.jsonl").write_text('{"step": 1, "select_l1": 0.5}\n')
    assert len(predicted(folder, config, checkpoint_iter="best").finished) == 3
    with pytest.raises(CheckpointError, match=r"netG\.ngf: checkpoint 4, settings 6"):
        predicted(folder, tiny_config(folder, "netG.ngf=6"))
    broken = corrupt(folder / "model" / "gen_00000001.pt")
    with pytest.raises(CheckpointError, match=rf"{broken} .* is truncated"):
        predicted(folder, config)
    broken.unlink()
    with pytest.raises(
        CheckpointError, match=r"No checkpoint \(gen_<step>\.pt \+ dis_<step>\.pt\)"
    ):
        predicted(folder, config)


def test_image_metrics_need_no_critic(folder) -> None:
    (folder / "model" / "dis_00000001.pt").unlink()
    result = predicted(folder, tiny_config(folder, "test.heatmap_metrics=[MeanCD_image]"))
    assert len(heatmaps_in(result.folder, "MeanCD_image")) == 3


def run_noting_new_files(folder: Path, config: PicardConfig) -> None:
    """A run into folder / "mine"; the files that appear by renaming are listed in `new_files`."""

    def note(event: str, arguments: tuple) -> None:
        if event == "os.rename":
            names.write(f"{arguments[1]}\n")

    with (folder / "new_files").open("w") as names:
        sys.addaudithook(note)
        predicted(folder, config, output_dir=folder / "mine")
        names.flush()
        os._exit(0)  # the hook stays for the life of the process


def test_progress_is_shown_while_a_heatmap_is_computed_and_removed_afterwards(folder) -> None:
    config = tiny_config(folder, "test.save_progressive_heatmap=true")
    assert ended(forked(partial(run_noting_new_files, folder, config))) == 0
    progress = folder / "mine" / "progress" / "0_MCD_image_2_0.5_16_32_16.png"
    assert str(progress) in (folder / "new_files").read_text().splitlines()
    assert sorted(path.name for path in (folder / "mine").iterdir() if path.is_dir()) == ["data"]


def test_boxes_are_drawn_into_the_plots(folder) -> None:
    boxes = folder / "boxes.csv"
    boxes.write_text("image,top,left,height,width\n0.png,10,10,20,20\nelsewhere.png,0,0,5,5\n")
    config = tiny_config(folder, "test.heatmap_metrics=[MCD_image]", "test.save_heatmap_plots=true")
    plain = predicted(folder, config, output_dir=folder / "plain")
    boxed = predicted(folder, config, output_dir=folder / "boxed", annotations=boxes)
    same = [
        (boxed.folder / "plots" / path.name).read_bytes() == path.read_bytes()
        for path in sorted((plain.folder / "plots").iterdir())
    ]
    assert same == [False, True, True]
    assert torch.equal(heatmaps_in(plain.folder)["0.png"], heatmaps_in(boxed.folder)["0.png"])


def test_folder_of_the_run_says_how_it_was_made(folder) -> None:
    config = dataclasses.replace(tiny_config(folder), seed=5)
    result = predicted(folder, config, command=("predict_heatmap.py", "--seed", "5"))
    assert "seed: 5" in (result.folder / "config.yaml").read_text()
    assert (result.folder / "command.txt").read_text() == "predict_heatmap.py --seed 5\n"
    assert (result.folder / "env.json").is_file()
    assert result.folder.parent == folder / "heatmaps" / "tiny" / "dropout"


def test_the_next_item_is_loaded_while_the_present_one_is_used() -> None:
    loaded = {number: threading.Event() for number in range(3)}

    def load(number: int) -> int:
        loaded[number].set()
        return number * 10

    seen = []
    for number, get in prefetched(range(3), load):
        if number < 2:
            assert loaded[number + 1].wait(timeout=PATIENCE)
        seen.append((number, get()))
    assert seen == [(0, 0), (1, 10), (2, 20)]


def test_what_goes_wrong_in_loading_is_raised_where_the_item_is_used() -> None:
    def load(number: int) -> int:
        if number == 1:
            raise OSError("unreadable")
        return number

    gets = dict(prefetched(range(2), load))
    assert gets[0]() == 0
    with pytest.raises(OSError, match="unreadable"):
        gets[1]()

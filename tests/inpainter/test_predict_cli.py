"""The command `python predict_heatmap.py`, as a user types it."""

import pytest
import torch

from common.errors import ExitStatus
from common.images import write_image, write_image16
from tests.tiny_runs import (
    BOTH_STAGES,
    PREDICT,
    corrupt,
    ended,
    forked_script,
    heatmaps_in,
    read_table,
    run_script,
    texture,
    tiny_config,
    tiny_file,
    wait_until,
    write_checkpoint,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_scores_512_pixels_at_stride_32_and_names_what_it_leaves_out(tmp_path) -> None:
    write_image(tmp_path / "test" / "large.png", texture(512, 512))
    write_image16(tmp_path / "test" / "sixteen.png", texture(256, 256))
    write_image(tmp_path / "test" / "small.png", texture(200, 512))
    write_image(tmp_path / "test" / "broken.png", texture(512, 512))
    corrupt(tmp_path / "test" / "broken.png")
    (tmp_path / "boxes.csv").write_text("image,top,left,height,width\nlarge.png,9,9,50,50\n")
    options = (
        "test.patch_shape=[256, 256, 1]", "test.mask_shape=[128, 128]", "test.patch_stride=32",
        "train.mask_shape=[128, 128]", "train.image_shape=[256, 256, 1]",
        "test.heatmap_M_inpaint=1", "test.save_heatmap_plots=true",
    )  # fmt: skip
    config = tiny_config(tmp_path, *options)
    write_checkpoint(tmp_path / "model", config, step=20)
    done = run_script(
        PREDICT, "--config", tiny_file(tmp_path, *options), "--checkpoint_dir", tmp_path / "model",
        "--checkpoint_iter", "20", "--output_dir", tmp_path / "out",
        "--annotations", tmp_path / "boxes.csv",
    )  # fmt: skip
    assert done.returncode == ExitStatus.SOME_FAILED, done.stderr
    expected = f"2 images scored, 0 were finished before, 2 left out. Heatmaps: {tmp_path / 'out'}"
    assert expected in done.stdout
    assert f"left out: {tmp_path / 'test' / 'small.png'}: an image of 200 x 512" in done.stdout
    assert "broken.png" in done.stdout
    assert "large.png: 81 of 81 windows" in done.stderr
    for metric in ("MCD_image", "MCD_feature"):
        maps = heatmaps_in(tmp_path / "out", metric)
        assert {name: tuple(heat.shape) for name, heat in maps.items()} == {
            "large.png": (512, 512),
            "sixteen.png": (256, 256),
        }
        assert (tmp_path / "out" / "plots" / f"large_{metric}_1_0.5_128_256_32.png").is_file()
    assert len(read_table(tmp_path / "out" / "scores.csv")) == 4


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(tmp_path) -> None:
    write_images(tmp_path / "test", n=40, size=(64, 64))
    path = tiny_file(tmp_path, *BOTH_STAGES, "test.patch_stride=4")
    write_checkpoint(tmp_path / "model", tiny_config(tmp_path, *BOTH_STAGES))
    command = ("--config", path, "--checkpoint_dir", tmp_path / "model")
    child = forked_script(tmp_path, PREDICT, *command)
    tables = "heatmaps/*/*/*/scores.csv"
    wait_until(lambda: not child.is_alive() or any(map(read_table, tmp_path.glob(tables))))
    child.terminate()
    status, errors = ended(child), (tmp_path / "stderr").read_text()
    assert status == 143, errors
    assert "Traceback" not in errors
    (folder,) = tmp_path.glob("heatmaps/tiny/dropout/*")
    done = {row["image"] for row in read_table(folder / "scores.csv")}
    assert 0 < len(done) < 40
    assert not list(folder.rglob("*.tmp"))
    left = sorted({f"{number}.png" for number in range(40)} - done)
    for name in left[2:]:
        (tmp_path / "test" / name).unlink()
    again = run_script(PREDICT, *command)
    assert again.returncode == 0, again.stderr
    assert str(folder) in again.stdout
    assert done | set(left[:2]) <= set(heatmaps_in(folder))


def test_expected_errors_are_one_message_without_traceback(tmp_path) -> None:
    config = tiny_config(tmp_path)
    write_checkpoint(tmp_path / "model", config)
    broken = corrupt(tmp_path / "model" / "gen_00000001.pt")
    torch.save({}, tmp_path / "model" / "gen_00000002.pt")
    done = run_script(
        PREDICT, "--config", tiny_file(tmp_path), "--checkpoint_dir", tmp_path / "model",
        "--checkpoint_iter", "1",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"predict_heatmap.py: {broken} (")
    assert "bytes) is truncated or no checkpoint" in message
    assert "Other steps there: 2. Ask for one of these." in message
    assert "Traceback" not in done.stderr

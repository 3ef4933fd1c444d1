"""Every program, by its command line, with every shipped settings file as it is shipped.

Only sizes, numbers of steps and paths are cut; no feature is switched off.
"""

import io
import json
import math
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.config import REPOSITORY, load_config
from common.images import write_image, write_image16
from inpainter.settings import PicardConfig
from tests.image_files import write_png16
from tests.tiny_runs import (
    CONFIGS,
    PREDICT,
    TRAIN,
    DiaFile,
    as_flags,
    heatmaps_in,
    read_table,
    run_script,
    texture,
)

EVALUATE = str(REPOSITORY / "eval.py")
DDPM = str(REPOSITORY / "diffusion_models" / "train_eval_ddpm.py")
TRAIN_DIA = str(REPOSITORY / "train_dia.py")

PICARD_CUTS = {
    "train.n_steps": "5",
    "train.batch_size": "2",
    "train.image_shape": "[32, 32, 1]",
    "train.mask_shape": "[16, 16]",
    "train.select_crops": "3",
    "train.print_iter": "1",
    "train.viz_iter": "5",
    "train.snapshot_save_iter": "5",
    "test.patch_shape": "[32, 32, 1]",
    "test.mask_shape": "[16, 16]",
    "test.patch_stride": "16",
    "test.heatmap_M_inpaint": "2",
    "test.calibration_windows": "80",
    "netG.ngf": "4",
    "netD.ndf": "2",
}
FULL_SIZE = PICARD_CUTS | {"train.max_delta_shape": "[4, 4]"}
COLOUR = {
    "train.image_shape": "[32, 32, 3]",
    "test.patch_shape": "[32, 32, 3]",
    "netG.input_dim": "3",
}
DDPM_CUTS = {
    "diffusion.dim": "8",
    "diffusion.ddpm_batch_size": "2",
    "diffusion.train_num_steps": "2",
    "diffusion.save_every": "1",
    "diffusion.log_every": "1",
    "diffusion.ema_update_every": "1",
    "diffusion.sampling_timesteps": "2",
    "diffusion.num_samples": "1",
}
DIA_CUTS = {
    "data.resize_to": "32",
    "contrastive.epochs": "1",
    "contrastive.batch_size": "2",
    "contrastive.simclr_dim": "8",
    "evaluation.ood_samples": "2",
    "evaluation.select_ood_samples": "1",
}


def at_side(side: int) -> dict[str, str]:
    """The cuts of a file whose diffusion model has a size of its own; the others have 32²."""
    return {"diffusion.image_size": str(side), "contrastive.diff_resolution": str(side)}


CUTS = {
    "default": FULL_SIZE,
    "published": FULL_SIZE,
    "demo_phantom": PICARD_CUTS,
    "demo_ct": PICARD_CUTS,
    "dia": DDPM_CUTS | DIA_CUTS,
    "demo_dia": DDPM_CUTS | DIA_CUTS,
    "diffusion_perm": DDPM_CUTS | DIA_CUTS,
    "diffusion_rotate": DDPM_CUTS | DIA_CUTS,
    "gaussian_perm": DDPM_CUTS | DIA_CUTS,
    "gaussian_rotate": DDPM_CUTS | DIA_CUTS,
    "median_perm": DDPM_CUTS | DIA_CUTS,
    "median_rotate": DDPM_CUTS | DIA_CUTS,
    "resolution_64": DDPM_CUTS | DIA_CUTS | at_side(40),
    "resolution_128": DDPM_CUTS | DIA_CUTS | at_side(48),
}
"""All that is changed of each shipped file, besides paths, names and the colour of the images."""
PATHS = ("dataset_name", "train_data_path", "test_data_path")
PATHS += ("checkpoints_dir", "logs_dir", "heatmaps_dir")
SIZES = {
    *("train.image_shape", "train.mask_shape", "train.max_delta_shape", "train.batch_size"),
    *("train.select_crops", "test.patch_shape", "test.mask_shape", "test.heatmap_M_inpaint"),
    "test.calibration_windows",
    *("netG.ngf", "netD.ndf", "diffusion.dim", "diffusion.ddpm_batch_size"),
    *("diffusion.num_samples", "data.resize_to", "contrastive.batch_size"),
    *("diffusion.image_size", "contrastive.diff_resolution"),
    *("contrastive.simclr_dim", "evaluation.ood_samples", "evaluation.select_ood_samples"),
}
STEPS = {
    *("train.n_steps", "train.print_iter", "train.viz_iter", "train.snapshot_save_iter"),
    *("test.patch_stride", "diffusion.train_num_steps", "diffusion.save_every"),
    *("diffusion.log_every", "diffusion.ema_update_every", "diffusion.sampling_timesteps"),
    "contrastive.epochs",
}
MAY_BE_NONE = {"train.n_steps", "data.resize_to"}
"""Where none means another number, not "off": n_epochs, the dataset's own size."""
FILES = {path.stem: path for path in CONFIGS}
PICARD = [
    *(("default", 1), ("default", 3), ("published", 1), ("published", 3)),
    *(("demo_phantom", 1), ("demo_ct", 1)),
]
DIA = [name for name, cuts in CUTS.items() if "contrastive.epochs" in cuts]
BOX = (10, 20, 12, 12)
LESION = {1: (230,), 3: (26, 128, 230)}
"""Grey or colour value, of 255, of the lesion."""


def test_every_shipped_file_is_run_and_only_sizes_steps_and_paths_are_cut() -> None:
    assert set(CUTS) == set(FILES)
    assert {name for name, _ in PICARD} | set(DIA) == set(FILES)
    for name, cuts in CUTS.items():
        assert set(cuts) <= SIZES | STEPS, name
        kind = DiaFile if name in DIA else PicardConfig
        shipped = load_config(kind, FILES[name])
        cut = load_config(kind, FILES[name], [f"{key}={text}" for key, text in cuts.items()])
        for key in cuts:
            before, after = attrgetter(key)(shipped), attrgetter(key)(cut)
            assert np.asarray(after).dtype.kind in "if", key
            if before is None:
                assert key in MAY_BE_NONE, f"{name}: {key}"
            else:
                same = np.array_equal(np.equal(before, 0), np.equal(after, 0))
                assert same, f"{name}: {key} is switched on or off"


def marked(side: int, channels: int, seed: int, lesion: bool) -> torch.Tensor:
    """A texture of side x (side + 4) whose BOX is one colour if it has a lesion."""
    picture = texture(side, side + 4, channels, seed)
    top, left, height, width = BOX
    if lesion:
        colour = torch.tensor(LESION[channels])[:, None, None] / 255
        picture[:, top : top + height, left : left + width] = colour
    return (picture * 255).round() / 255


def write_deep(path: Path, picture: torch.Tensor) -> None:
    """A picture of multiples of 1/255 as a 16-bit PNG of the same values."""
    if picture.shape[0] == 1:
        write_image16(path, picture)
    else:
        levels = (picture.permute(1, 2, 0) * 65535).round().numpy().astype(np.uint16)
        write_png16(path, levels)


def write_scans(folder: Path, channels: int) -> None:
    """Training images and test images, in 8 and in 16 bits, and the boxes of the lesions."""
    for split, count, lesion in (("train", 2, False), ("test", 1, True)):
        for seed in range(count):
            write_image(folder / split / f"eight{seed}.png", marked(40, channels, seed, lesion))
            deep = marked(40, channels, seed, lesion)
            write_deep(folder / split / f"sixteen{seed}.png", deep)
    write_image(folder / "test" / "normal.png", marked(40, channels, 2, lesion=False))
    boxes = [(f"{kind}0.png", *BOX) for kind in ("eight", "sixteen")]
    lines = ["image,top,left,height,width", *(",".join(map(str, row)) for row in boxes)]
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")


def run(*command: object) -> str:
    """What a command line of the project prints; it must end with status 0."""
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pixels_of(picture: Path | io.BytesIO, mode: str = "RGB") -> np.ndarray:
    """The pixels (H, W, 3) of a picture, which are not all alike."""
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert(mode)).astype(int)
    assert pixels.std() > 1, picture
    return pixels


def assert_shows(picture: Path, colour: tuple[int, ...]) -> None:
    """That much of a picture has a colour (or grey value) of 0 ... 255."""
    pixels = pixels_of(picture)
    like = (np.abs(pixels - np.array(colour)) <= 2).all(axis=2)
    assert like.sum() > 400, f"{picture.name} does not show {colour}"


@pytest.mark.parametrize(("name", "channels"), PICARD)
def test_picard_trains_predicts_and_evaluates(name: str, channels: int, tmp_path: Path) -> None:
    write_scans(tmp_path, channels)
    paths = (name, *(tmp_path / part for part in ("train", "test", "runs", "logs", "heatmaps")))
    changed = dict(zip(PATHS, paths, strict=True)) | CUTS[name]
    if name == "demo_phantom":  # the only file that names other normal images
        changed["calibration_data_path"] = tmp_path / "train"
    if channels == 3:  # the default file keeps critics that see grey, the published one does not
        changed |= COLOUR | ({"netD.input_dim": "3"} if name == "published" else {})
    overrides = [f"{key}={value}" for key, value in changed.items()]
    config = load_config(PicardConfig, FILES[name], overrides)
    settings = ("--config", FILES[name], *as_flags(overrides))

    assert "Checkpoints of step 5" in run(TRAIN, *settings)
    (pixels,) = event_pictures(tmp_path / "logs", "train/completions")
    assert (np.ptp(pixels, axis=2).max() > 10) == (channels == 3)

    folder, boxes = tmp_path / "scored", tmp_path / "boxes.csv"
    printed = run(PREDICT, *settings, "--output_dir", folder, "--annotations", boxes)
    assert printed.startswith("3 images scored, 0 were finished before, 0 left out.")
    check_heatmaps(folder, config)

    found = ("--heatmap_dir", folder, "--annotations", boxes, "--image_dir", tmp_path / "test")
    table = run(EVALUATE, "--mode", "heatmap", *settings, *found)
    check_evaluation(folder / "evaluation", table, config)


def check_heatmaps(folder: Path, config: PicardConfig) -> None:
    """Size and values of every heatmap, and every plot where plots are on."""
    for metric in config.test.heatmap_metrics:
        heatmaps = heatmaps_in(folder, metric)
        assert len(heatmaps) == 3
        for heatmap in heatmaps.values():
            assert heatmap.shape == (40, 44)
            assert heatmap.isfinite().all()
            assert heatmap.min() >= 0
            assert heatmap.std() > 0
        # Nothing random in these distances: 16 bits of the same values score the same.
        if metric == "no_dropout" and config.test.calibration == "off":
            eight, sixteen = heatmaps["eight0.png"], heatmaps["sixteen0.png"]
            torch.testing.assert_close(eight, sixteen, rtol=1e-3, atol=1e-4)
    plots = list((folder / "plots").glob("*.png"))
    n_plots = 3 * len(config.test.heatmap_metrics) if config.test.save_heatmap_plots else 0
    assert len(plots) == n_plots
    for path in plots:
        if not path.name.startswith("normal"):
            assert_shows(path, LESION[config.netG.input_dim])


def check_evaluation(folder: Path, table: str, config: PicardConfig) -> None:
    """The printed table, the numbers and the pictures of an evaluation."""
    assert "AUROC" in table
    results = json.loads((folder / "results.json").read_text())["metrics"]
    assert list(results) == list(config.test.heatmap_metrics)
    for metric, result in results.items():
        assert f"\n{metric} " in table
        for kind in ("per_image", "pooled", "image_level"):
            assert 0 <= result[kind]["auroc"]["value"] <= 1
        assert (result["images_with_lesion"], result["images_normal"]) == (2, 1)
        assert result["lesion_pixels"] == 2 * 12 * 12
        for kind in ("roc", "pr", "scores", "image_scores"):
            pixels_of(folder / "plots" / f"{kind}_{metric}.png")
    assert len(read_table(folder / "per_image.csv")) == 3 * len(results)
    assert_shows(folder / "plots" / "contact_sheet.png", LESION[config.netG.input_dim])


def write_tree(root: Path) -> None:
    """Normal and anomalous colour images, 8-bit and a 16-bit one, as kvasir's are laid out."""
    for split, count in (("train", 2), ("test", 3)):
        for name, lesion in (("normal", False), ("polyps", True)):
            folder = root / "kvasir-anomaly-polyps" / split / name
            for seed in range(count):
                write_image(folder / f"{seed}.png", marked(36, 3, seed, lesion))
            write_deep(folder / "deep.png", marked(36, 3, count, lesion))


def commands(name: str, root: Path, *sections: str) -> list[object]:
    """The flags that name a shipped file and its cut settings in these sections."""
    dataset = ("kvasir", root / "data")
    if load_config(DiaFile, FILES[name]).data.dataset == "folder":
        dataset = ("folder", root / "data" / "kvasir-anomaly-polyps")
    cuts = [f"{k}={v}" for k, v in CUTS[name].items() if k.startswith(sections)]
    given = ("--config", FILES[name], "--dataset", dataset[0], "--data_root", dataset[1])
    return [*given, *as_flags(cuts)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with the tree of images, in which each test writes its own."""
    root = tmp_path_factory.mktemp("shipped")
    write_tree(root / "data")
    return root


def diffusion_model(name: str, root: Path) -> Path:
    """The diffusion model that the program trains with a shipped file.

    The files of tables that say nothing about diffusion share one: its settings are the defaults.
    """
    if load_config(DiaFile, FILES[name]).diffusion == DiaFile().diffusion:
        name = "diffusion_rotate"
    model = root / f"ddpm_{name}" / "model-2.pt"
    if not model.is_file():
        flags = commands(name, root, "diffusion.")
        run(DDPM, "--mode", "train", *flags, "--output_dir", model.parent)
        for pixels in event_pictures(model.parent, "eval/samples"):
            assert np.ptp(pixels, axis=2).max() > 10
    return model


def event_pictures(folder: Path, tag: str) -> list[np.ndarray]:
    """The pictures (H, W, 3) in the one TensorBoard file below a folder, none of them constant."""
    (events,) = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(events))
    events.Reload()
    return [pixels_of(io.BytesIO(image.encoded_image_string)) for image in events.Images(tag)]


def check_pictures(paths: list[Path]) -> None:
    """Colour pictures that are not constant."""
    assert paths
    for path in paths:
        assert np.ptp(pixels_of(path), axis=2).max() > 10, path


@pytest.mark.parametrize("name", ["dia", "demo_dia", "resolution_64", "resolution_128"])
def test_diffusion_program_draws_with_what_it_trained(name: str, root: Path) -> None:
    flags = commands(name, root, "diffusion.")
    for mode, n_pictures in (("eval", 4), ("sample", 1)):
        drawn = ("--output_dir", root / f"{name}_{mode}")
        drawn += ("--state_dict_path", diffusion_model(name, root))
        pictures = run(DDPM, "--mode", mode, *flags, *drawn).split()
        assert len(pictures) == n_pictures
        check_pictures([Path(picture) for picture in pictures])


@pytest.mark.parametrize("name", DIA)
def test_dia_trains_and_evaluates(name: str, root: Path, tmp_path: Path) -> None:
    flags = commands(name, root, "data.", "contrastive.", "evaluation.")
    folder = tmp_path / "run"
    chosen = ("--run_dir", folder, "--diffusion_model_path", diffusion_model(name, root))
    printed = run(TRAIN_DIA, *flags, *chosen)
    by_test = load_config(DiaFile, FILES[name]).contrastive.select_by == "test"
    assert ("best_CSI.model: " in printed) == by_test
    model = folder / ("best_CSI.model" if by_test else "last.model")
    check_scores(flags, model, "ood_pre", ["CSI"])
    if name in ("dia", "demo_dia"):  # the tables' files are for the published score, CSI
        check_scores(flags, model, "ood", ["clean_norm", "baseline"])
        assert "[Error@1 " in run(EVALUATE, *flags, "--mode", "test_acc", "--load_path", model)
        results = json.loads((folder / f"eval_test_acc_{model.stem}/results.json").read_text())
        assert 0 <= results["error"] <= 100


def check_scores(flags: list[object], model: Path, mode: str, scores: list[str]) -> None:
    """What eval.py prints and writes of 4 normal and 4 other images."""
    printed = run(EVALUATE, *flags, "--mode", mode, "--load_path", model, "--ood_score", *scores)
    assert "AUROC" in printed
    folder = model.parent / f"eval_{mode}_{model.stem}"
    results = json.loads((folder / "results.json").read_text())["scores"]
    assert list(results) == scores
    for score in scores:
        (auroc,) = results[score]["auroc"].values()
        assert 0 <= auroc["value"] <= 1
        rows = read_table(folder / f"scores_{score}.csv")
        assert sorted(row["label"] for row in rows) == ["0"] * 4 + ["1"] * 4
        assert all(math.isfinite(float(row[score])) for row in rows)
        for kind in ("histogram", "roc"):
            pixels_of(folder / f"{kind}_{score}.png")

"""`make demo-dia`: trains DIA on images of one kind, finds what is not normal.

The images are photographs of clothes, of Fashion-MNIST; anomalies are other clothes, and the same
clothes with a small change: a hole, a stain, a missing strap. With --normal tissue they are drawn
textures that look the same from every side, where rotation is a bad shift; anomalies are a rougher
and a smoother texture, crowded cells and a blurred patch.

Everything is written under demo/dia. DEMO_SEEDS=3 reports mean ± standard deviation over three
trainings. At which step t and resolution dissolving pays: run it again with, for instance,
--set contrastive.diffusion_offset=1.0 --set contrastive.diffusion_upper_offset=3.0 (t in hundreds),
or --set diffusion.image_size=32 --set contrastive.diff_resolution=32, and another --output;
--methods "CSI rotation" "DIA rotation" trains these alone.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

from common.config import load_config
from demos import dia_report as report
from demos.data import clothes
from demos.dia_report import Job
from dia.settings import DiaConfig

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = ROOT / "demos" / "data" / "fashion_mnist.npz"
CONFIG = "configs/demo_dia.yaml"
METHODS = {
    "CSI rotation": ("simclr_CSI", "rotation", "rotation"),
    "DIA rotation": ("simclr_DIA", "diffusion_rotation", "rotation"),
    "CSI cutperm": ("simclr_CSI", "cutperm", "cutperm"),
    "DIA cutperm": ("simclr_DIA", "diffusion_cutperm", "cutperm"),
}
"""Name in the table -> mode, shift transform in training, in evaluation."""
SHOWN = {"clothes": list(METHODS)[:3], "tissue": list(METHODS)}
"""Which of them a demo trains; all four would take the clothes too long."""
BEST_SHIFT = {"clothes": "rotation", "tissue": "cutperm"}
OWN_SETTINGS = {
    "clothes": (),
    "tissue": ("contrastive.resize_factor=0.5", "contrastive.epochs=14"),
}
"""Small crops of a texture rarely show the seams by which cutperm is told; it takes longer, too."""
SECTIONS = ("diffusion", "contrastive", "evaluation")
STRIP_STEPS = (0, 50, 100, 200, 300, 400, 500)
TINY = {
    "diffusion": ("diffusion.train_num_steps=2", "diffusion.dim=8", "diffusion.num_samples=1",
                  "diffusion.sampling_timesteps=2", "diffusion.ddpm_batch_size=4"),
    "contrastive": ("contrastive.epochs=1", "contrastive.batch_size=4", "contrastive.width=8",
                    "contrastive.max_batches=2", "evaluation.ood_samples=1"),
}  # fmt: skip
SMALL_COUNTS = clothes.Counts(train=8, test=6, per_other_class=2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--tiny", action="store_true", help="see in a minute that it runs; its numbers mean nothing"
    )
    add("--normal", default="bag", choices=(*clothes.CLASSES, clothes.TISSUE),
        help="the normal class: one of the clothes, or tissue (default: bag)")  # fmt: skip
    add("--seeds", type=int, default=int(os.environ.get("DEMO_SEEDS", "1")), metavar="N",
        help="trainings (default: the variable DEMO_SEEDS, or 1)")  # fmt: skip
    add("--methods", nargs="+", choices=METHODS, metavar="NAME",
        help=f"what to train, of {', '.join(METHODS)} (default: all, for clothes not the "
             "last)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of diffusion:, contrastive: or evaluation: that differs from "
             "configs/demo_dia.yaml")  # fmt: skip
    add("--output", type=Path, default=ROOT / "demo" / "dia", metavar="DIR",
        help="folder for everything; what an earlier demo left there is removed")  # fmt: skip
    arguments = parser.parse_args()
    if any(text.split(".")[0] not in SECTIONS for text in arguments.set):
        parser.error(f"--set takes settings of {', '.join(SECTIONS)}, such as contrastive.epochs=3")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    output, normal = arguments.output.resolve(), arguments.normal
    for part in ("images", "runs"):
        shutil.rmtree(output / part, ignore_errors=True)
    written = clothes.write_images(images_of(arguments), output / "images")
    say(f"Normal: {normal}. Test images by folder: {written}")
    kind = kind_of(arguments)
    methods = arguments.methods or SHOWN[kind]
    runs = [output / "runs" / f"seed{n}" for n in range(arguments.seeds)]
    jobs = [job for seed in range(len(runs)) for job in jobs_of(arguments, output, seed, methods)]
    seconds = report.run_jobs(jobs, output / "runs" / "logs", say)
    rows = []
    for name in methods:
        for seed, folder in enumerate(runs):
            scores = report.read_scores(results_of(folder, name) / "scores_CSI.csv", normal)
            rows += report.compare(name, scores, normal, seed)
    baselines = report.baseline_scores(output / "images", normal)
    for name, scores in baselines.items():
        rows += report.compare(name, scores, normal)
    seconds["total"] = time.monotonic() - started
    found = report.findings(rows, pairs(methods, list(baselines), BEST_SHIFT[kind]))
    dissolving = dissolved_at(runs[0], methods)
    say("\n" + report.format_table(rows))
    say(f"\nFound with {len(runs)} seed(s), {dissolving}"
        + (", numbers without meaning:" if arguments.tiny else ":"))  # fmt: skip
    say("\n".join(found))
    record = {"command": sys.argv, "normal": normal, "dissolving": dissolving, "found": found}
    report.save_results(output / "results.json", rows, {**record, "seconds": seconds})
    say(f"\nNumbers: {output / 'results.json'}")
    if diffusion_model(runs[0]).is_file():
        strip = report.save_strip(output, normal, diffusion_model(runs[0]), STRIP_STEPS)
        say(f"Originals and dissolved versions at t = {STRIP_STEPS}: {strip}")
    say(f"Losses: tensorboard --logdir {output / 'runs'}")
    say("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    return 0


def kind_of(arguments: argparse.Namespace) -> str:
    """A key of SHOWN."""
    return clothes.TISSUE if arguments.normal == clothes.TISSUE else "clothes"


def images_of(arguments: argparse.Namespace) -> clothes.DemoImages:
    counts = SMALL_COUNTS if arguments.tiny else clothes.Counts()
    if arguments.normal == clothes.TISSUE:
        return clothes.tissue(counts)
    return clothes.clothes(ARCHIVE, arguments.normal, counts)


def pairs(methods: list[str], baselines: list[str], best_shift: str) -> list[tuple[str, str]]:
    """What is compared: with dissolving and without, the shifts, and the best shift's baselines."""
    ours = [name for name in methods if name.startswith("DIA")]
    with_and_without = [(name, name.replace("DIA", "CSI")) for name in ours]
    wanted = [*with_and_without, ("CSI cutperm", "CSI rotation")]
    best = f"DIA {best_shift}" if f"DIA {best_shift}" in methods else f"CSI {best_shift}"
    wanted += [(best, name) for name in baselines]
    return [pair for pair in wanted if set(pair) <= {*methods, *baselines}]


def dissolved_at(runs: Path, methods: list[str]) -> str:
    """Resolution and steps of the first DIA training, as its run folder has them."""
    dissolving = [name for name in methods if name.startswith("DIA")]
    if not dissolving:
        return "without dissolving"
    path = results_of(runs, dissolving[0]).parent / "config.yaml"
    settings = load_config(DiaConfig, path).contrastive
    steps = [100 * part for part in (settings.diffusion_offset, settings.diffusion_upper_offset)]
    return f"dissolving at {settings.diff_resolution}², t = {steps[0]:.0f} to {steps[1]:.0f}"


def settings(arguments: argparse.Namespace, sections: tuple[str, ...]) -> list[str]:
    """--set flags for the settings of these sections."""
    tiny = [text for section in sections for text in TINY.get(section, ()) if arguments.tiny]
    chosen = [*OWN_SETTINGS[kind_of(arguments)], *arguments.set]
    chosen = [text for text in chosen if text.split(".")[0] in sections]
    return [part for text in [*tiny, *chosen] for part in ("--set", text)]


def common_flags(output: Path, seed: int) -> list[str]:
    return ["--config", CONFIG, "--data_root", str(output / "images"), "--seed", str(seed)]


def diffusion_model(runs: Path) -> Path:
    return runs / "ddpm" / "model-1.pt"


def results_of(runs: Path, name: str) -> Path:
    return runs / name.replace(" ", "_") / "evaluation"


def jobs_of(arguments: argparse.Namespace, output: Path, seed: int, methods: list[str]) -> list:
    """The trainings of one seed, in an order that keeps two cores busy to the end."""
    runs = output / "runs" / f"seed{seed}"
    script = ["diffusion_models/train_eval_ddpm.py", "--mode", "train"]
    flags = [*common_flags(output, seed), "--output_dir", str(runs / "ddpm")]
    ddpm = Job(f"seed{seed}_ddpm", [[*script, *flags, *settings(arguments, ("diffusion",))]])
    jobs = [contrastive_job(arguments, output, seed, name, ddpm.name) for name in methods]
    plain = [job for job in jobs if job.after is None]
    if len(plain) == len(jobs):
        return plain
    # What needs the diffusion model comes behind one job that does not, and before the others.
    return [ddpm, *plain[:1], *(job for job in jobs if job.after is not None), *plain[1:]]


def contrastive_job(
    arguments: argparse.Namespace, output: Path, seed: int, name: str, ddpm: str
) -> Job:
    """Training and CSI evaluation of one of METHODS, after the job `ddpm` where it dissolves."""
    mode, shift, plain_shift = METHODS[name]
    runs = output / "runs" / f"seed{seed}"
    folder = results_of(runs, name).parent
    common = [*common_flags(output, seed), *settings(arguments, ("contrastive", "evaluation"))]
    train = ["train_dia.py", "--mode", mode, "--shift_trans_type", shift]
    train += ["--run_dir", str(folder), *common]
    if mode == "simclr_DIA":
        train += ["--diffusion_model_path", str(diffusion_model(runs))]
    evaluate = ["eval.py", "--mode", "ood_pre", "--shift_trans_type", plain_shift]
    evaluate += ["--load_path", str(folder / "last.model")]
    evaluate += ["--results_dir", str(results_of(runs, name)), *common]
    after = ddpm if mode == "simclr_DIA" else None
    return Job(f"seed{seed}_{folder.name}", [train, evaluate], after)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

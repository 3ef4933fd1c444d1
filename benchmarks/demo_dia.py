"""`make demo-dia`: trains DIA on photographs of one kind of clothing, finds what is not normal.

The images are of Fashion-MNIST. Anomalies are other clothes, and the same clothes with a small
change: a hole, a stain, a missing strap. DEMO_SEEDS=3 reports mean ± standard deviation over three
trainings. Everything is written under demo/dia.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

from dia import demo
from dia.demo import Job

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = ROOT / "benchmarks" / "data" / "fashion_mnist.npz"
CONFIG = "configs/demo_dia.yaml"
OURS, PLAIN = "DIA rotation", "CSI rotation"
METHODS = {
    OURS: ("simclr_DIA", "diffusion_rotation", "rotation"),
    PLAIN: ("simclr_CSI", "rotation", "rotation"),
    "CSI cutperm": ("simclr_CSI", "cutperm", "cutperm"),
}
"""Name in the table -> mode, shift transform in training, in evaluation."""
STRIP_STEPS = (0, 50, 100, 200, 300, 400, 500)
TINY = {
    "diffusion": ("diffusion.train_num_steps=2", "diffusion.dim=8", "diffusion.num_samples=1",
                  "diffusion.sampling_timesteps=2", "diffusion.ddpm_batch_size=4"),
    "contrastive": ("contrastive.epochs=1", "contrastive.batch_size=4", "contrastive.width=8",
                    "contrastive.max_batches=2", "evaluation.ood_samples=1"),
}  # fmt: skip
SMALL_COUNTS = demo.Counts(train=8, test=6, per_other_class=2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--tiny", action="store_true", help="see in a minute that it runs; its numbers mean nothing"
    )
    add("--normal", default="bag", choices=demo.CLASSES, help="the normal class (default: bag)")
    add("--seeds", type=int, default=int(os.environ.get("DEMO_SEEDS", "1")), metavar="N",
        help="trainings (default: the variable DEMO_SEEDS, or 1)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of diffusion:, contrastive: or evaluation: that differs from "
             "configs/demo_dia.yaml")  # fmt: skip
    add("--output", type=Path, default=ROOT / "demo" / "dia", metavar="DIR",
        help="folder for everything; what an earlier demo left there is removed")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    started, seconds = time.monotonic(), {}
    output = arguments.output.resolve()
    for part in ("images", "runs"):
        shutil.rmtree(output / part, ignore_errors=True)
    counts = SMALL_COUNTS if arguments.tiny else demo.Counts()
    label = demo.CLASSES.index(arguments.normal)
    written = demo.write_images(ARCHIVE, output / "images", label, counts)
    say(f"Normal: {arguments.normal}. Test images by folder: {written}")
    rows, logs = [], output / "runs" / "logs"
    for seed in range(arguments.seeds):
        runs = output / "runs" / f"seed{seed}"
        clock = time.monotonic()
        demo.run_jobs([diffusion_job(arguments, output, runs, seed)], logs, say)
        seconds[f"diffusion, seed {seed}"] = time.monotonic() - clock
        clock = time.monotonic()
        jobs = [contrastive_job(arguments, output, runs, seed, name) for name in METHODS]
        demo.run_jobs(jobs, logs, say)
        seconds[f"contrastive, seed {seed}"] = time.monotonic() - clock
        for name in METHODS:
            scores = demo.read_scores(results_of(runs, name) / "scores_CSI.csv", arguments.normal)
            rows += demo.compare(name, scores, arguments.normal, seed)
    baselines = demo.baseline_scores(output / "images", arguments.normal)
    for name, scores in baselines.items():
        rows += demo.compare(name, scores, arguments.normal)
    seconds["total"] = time.monotonic() - started
    strip = demo.save_strip(output, arguments.normal, diffusion_model(runs), STRIP_STEPS)
    say("\n" + demo.format_table(rows))
    rivals = [name for name in [*METHODS, *baselines] if name != OURS]
    found = demo.findings(rows, OURS, rivals)
    say("\nWhat was found" + (", numbers without meaning:" if arguments.tiny else ":"))
    say("\n".join(found))
    record = {"command": sys.argv, "normal": arguments.normal, "seconds": seconds, "found": found}
    demo.save_results(output / "results.json", rows, record)
    say(f"\nNumbers: {output / 'results.json'}")
    say(f"Originals and dissolved versions at t = {STRIP_STEPS}: {strip}")
    say(f"Losses: tensorboard --logdir {output / 'runs'}")
    say("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    return 0


def settings(arguments: argparse.Namespace, sections: tuple[str, ...]) -> list[str]:
    """--set flags for the settings of these sections."""
    tiny = [text for section in sections for text in TINY.get(section, ()) if arguments.tiny]
    chosen = [text for text in arguments.set if text.split(".")[0] in sections]
    return [part for text in [*tiny, *chosen] for part in ("--set", text)]


def common_flags(output: Path, seed: int) -> list[str]:
    return ["--config", CONFIG, "--data_root", str(output / "images"), "--seed", str(seed)]


def diffusion_model(runs: Path) -> Path:
    return runs / "ddpm" / "model-1.pt"


def results_of(runs: Path, name: str) -> Path:
    return runs / name.replace(" ", "_") / "evaluation"


def diffusion_job(arguments: argparse.Namespace, output: Path, runs: Path, seed: int) -> Job:
    script = ["diffusion_models/train_eval_ddpm.py", "--mode", "train"]
    flags = [*common_flags(output, seed), "--output_dir", str(runs / "ddpm")]
    return Job(f"seed{seed}_ddpm", [[*script, *flags, *settings(arguments, ("diffusion",))]])


def contrastive_job(
    arguments: argparse.Namespace, output: Path, runs: Path, seed: int, name: str
) -> Job:
    """Training and CSI evaluation of one of METHODS."""
    mode, shift, plain_shift = METHODS[name]
    folder = results_of(runs, name).parent
    common = [*common_flags(output, seed), *settings(arguments, ("contrastive", "evaluation"))]
    train = ["train_dia.py", "--mode", mode, "--shift_trans_type", shift]
    train += ["--run_dir", str(folder), *common]
    if mode == "simclr_DIA":
        train += ["--diffusion_model_path", str(diffusion_model(runs))]
    evaluate = ["eval.py", "--mode", "ood_pre", "--shift_trans_type", plain_shift]
    evaluate += ["--load_path", str(folder / "last.model")]
    evaluate += ["--results_dir", str(results_of(runs, name)), *common]
    return Job(f"seed{seed}_{folder.name}", [train, evaluate])


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Trains the phantom demo's network briefly with many seeds and says which trainings collapsed.

A training has collapsed when it ends no better than filling every hole with the training crops'
mean grey value. Uses the entry point that users use; writes under demo/collapse.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

import torch

from demos.data.phantoms import write_phantoms
from demos.picard_report import ROOT

OUTPUT = ROOT / "demo" / "collapse"
DATA_SEED = 21


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=20, metavar="N", help="trainings (default: %(default)s)")
    add("--steps", type=int, default=300, metavar="N", help="steps each (default: %(default)s)")
    add("--config", default="configs/demo_phantom.yaml", metavar="FILE",
        help="settings, for grey 32x32 crops (default: %(default)s)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting that differs from the config's, as in train.py")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    data = write_phantoms(OUTPUT, DATA_SEED, n_train=50, n_test={})
    inside = torch.cat([torch.from_numpy(p.image[p.body]) for p in data.train.values()]) * 2 - 1
    spread = (inside - inside.mean()).abs().mean().item()
    print(f"Mean filling: L1 {spread:.4f} (images in [-1, 1])", flush=True)
    collapsed = []
    for seed in range(arguments.seeds):
        status, error = train_once(arguments, seed)
        bad = status != 0 or not error < spread
        collapsed += [seed] if bad else []
        print(f"seed {seed:3d}: L1 {error:.4f}{'  COLLAPSED' if bad else ''}", flush=True)
    print(f"{len(collapsed)} of {arguments.seeds} trainings collapsed {collapsed or ''}")
    return 1 if collapsed else 0


def train_once(arguments: argparse.Namespace, seed: int) -> tuple[int, float]:
    """Exit status of the training and its completion error on fixed crops, NaN if there is none."""
    settings = {
        "expname": f"seed{seed}",
        "train_data_path": OUTPUT / "train",
        "checkpoints_dir": OUTPUT / "checkpoints",
        "logs_dir": OUTPUT / "logs",
        "train.n_steps": arguments.steps,
        "train.snapshot_save_iter": arguments.steps,
        "test.calibration": "off",
    }
    overrides = [*(f"{key}={value}" for key, value in settings.items()), *arguments.set]
    flags = [part for override in overrides for part in ("--set", override)]
    script = ["inpainter/train.py", "--config", arguments.config, "--seed", str(seed), *flags]
    done = subprocess.run([sys.executable, *script], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    errors = [float("nan")]
    for path in (OUTPUT / "checkpoints").glob(f"*/*_seed{seed}/log.jsonl"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        errors += [line["select_l1"] for line in lines if "select_l1" in line]
    return done.returncode, errors[-1]


if __name__ == "__main__":
    sys.exit(main())

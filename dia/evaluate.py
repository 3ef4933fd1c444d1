"""The DIA modes of eval.py: ood_pre, ood, test_acc, test_marginalized_acc."""

import argparse
from pathlib import Path
from typing import Any, Literal

import torch

from common.checkpoint import load_tensors, strip_module_prefix
from common.config import ConfigError, add_common_arguments, config_to_yaml, resolve_path
from common.flags import add_flags, load_from_flags
from common.run_log import write_run_record
from common.runtime import resolve_device, seed_everything
from dia.building import layout_for
from dia.data import evaluation_sets, load_split, normal_train_set
from dia.encoders import Encoder, build_encoder, load_weights
from dia.evaluation import (
    FeatureCache,
    ViewSettings,
    accuracy,
    bank_scores,
    file_hash,
    plain_scores,
)
from dia.results import Results, SetScores, compare, deciles, table, write_results, write_scores
from dia.settings import BANK_SCORES, DiaConfig
from dia.shifts import parse_shift

EvalMode = Literal["ood_pre", "ood", "test_acc", "test_marginalized_acc"]
EVAL_MODES: tuple[str, ...] = EvalMode.__args__
CROP_FLAGS = {
    "resize_factor": "evaluation.eval_resize_factor",
    "resize_fix": "evaluation.eval_resize_fix",
}
"""In an evaluation these published flags mean the evaluation's crops, not training's."""


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the DIA modes, all but --mode itself."""
    add_common_arguments(parser, DiaConfig)
    add_flags(parser, DiaConfig, without=("mode",))


def evaluation_config(args: argparse.Namespace) -> DiaConfig:
    """The settings that the flags of `add_evaluation_flags` ask for."""
    args = argparse.Namespace(**{k: v for k, v in vars(args).items() if k != "mode"})
    return load_from_flags(DiaConfig, args, other_sections=("diffusion",), redirect=CROP_FLAGS)


def evaluate(config: DiaConfig, mode: EvalMode, command: list[str]) -> str:
    """Runs one mode, writes its results and returns the text to print."""
    seed_everything(config.seed)
    device = resolve_device(config.device)
    encoder, checkpoint = load_encoder(config)
    encoder = encoder.to(device, memory_format=layout_for(device)).eval()
    folder = results_folder(config, mode, checkpoint)
    write_run_record(folder, config_yaml=config_to_yaml(config), command=command)
    facts = {
        "mode": mode,
        "dataset": config.data.dataset,
        "one_class_idx": config.data.one_class_idx,
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": file_hash(checkpoint),
        "selected_by": selected_by(checkpoint),
    }
    if mode in ("test_acc", "test_marginalized_acc"):
        return _accuracy(config, mode, encoder, device, folder, facts)
    views = view_settings(config)
    results: dict[str, Results] = {}
    lines = []
    for score in checked_scores(config, mode):
        normal, others = _scores(config, encoder, score, views, device, checkpoint)
        write_scores(folder, score, normal, others, arrays=config.evaluation.save_score)
        results[score] = compare(
            normal,
            others,
            n_resamples=config.evaluation.bootstrap_samples,
            seed=config.seed,
        )
        if config.evaluation.print_score:
            named = {config.data.dataset: normal, **others}
            lines += [deciles(name, scored.scores) for name, scored in named.items()]
    write_results(folder, results, facts)
    shown = table(results, selected_by=facts["selected_by"])
    return "\n".join([*lines, shown, f"Written to {folder}"])


def load_encoder(config: DiaConfig) -> tuple[Encoder, Path]:
    """The encoder of load_path and that path; the heads' sizes are the checkpoint's own."""
    settings = config.contrastive
    path = resolve_path(settings.load_path, "contrastive.load_path")
    state = strip_module_prefix(load_tensors(path))
    kind = parse_shift(settings.shift_trans_type)
    if "linear.weight" not in state:
        raise ConfigError(
            f"--load_path: {path} has no linear.weight; expected a *.model of train_dia.py",
            key="contrastive.load_path",
        )
    encoder = build_encoder(
        settings.model,
        n_classes=state["linear.weight"].shape[0],
        n_shifts=kind.count,
        simclr_dim=settings.simclr_dim,
        width=settings.width,
    )
    load_weights(encoder, state, source=str(path), strict=not settings.no_strict)
    return encoder, path


def view_settings(config: DiaConfig) -> ViewSettings:
    """How images are looked at: always by the plain shift, never dissolved or blurred."""
    kind = parse_shift(config.contrastive.shift_trans_type)
    return ViewSettings(
        base=kind.base,
        n_shifts=kind.count,
        n_samples=config.evaluation.ood_samples,
        crop_scale=config.eval_crop_scale,
        seeding=config.evaluation.seeding,
        seed=config.seed,
        batch_size=config.evaluation.test_batch_size,
    )


def checked_scores(config: DiaConfig, mode: EvalMode) -> tuple[str, ...]:
    """The scores to compute; ConfigError where one is not of this mode."""
    wanted = config.evaluation.ood_score
    wrong = [score for score in wanted if (score in BANK_SCORES) != (mode == "ood_pre")]
    if wrong:
        ours = BANK_SCORES if mode == "ood_pre" else "clean_norm, similar, baseline, …marginalized"
        raise ConfigError(
            f"--ood_score: {', '.join(wrong)} is no score of --mode {mode}, which has {ours}",
            key="evaluation.ood_score",
        )
    return wanted


def selected_by(checkpoint: Path) -> str:
    """What chose a checkpoint, as its run's settings say; "unknown" for a lone file."""
    state = checkpoint.parent / "state.pt"
    if checkpoint.name.startswith("last"):
        return "last"
    if not state.is_file():
        return "unknown"
    return load_tensors(state)["config"]["contrastive"]["select_by"]


def results_folder(config: DiaConfig, mode: EvalMode, checkpoint: Path) -> Path:
    """results_dir, or eval_<mode>_<checkpoint> beside the checkpoint."""
    chosen = config.evaluation.results_dir
    if chosen is not None:
        return resolve_path(chosen, "evaluation.results_dir")
    return checkpoint.parent / f"eval_{mode}_{checkpoint.stem}"


def _scores(
    config: DiaConfig,
    encoder: Encoder,
    score: str,
    views: ViewSettings,
    device: torch.device,
    checkpoint: Path,
) -> tuple[SetScores, dict[str, SetScores]]:
    sets = evaluation_sets(config)
    if score in BANK_SCORES:
        folder = checkpoint.parent / "features" if config.evaluation.cache_features else None
        cache = FeatureCache(folder, file_hash(checkpoint))
        train = normal_train_set(config)
        return bank_scores(encoder, train, sets, score, views, device=device, cache=cache)
    layer = config.evaluation.ood_layer[0]
    every = {"normal": sets.normal, **sets.others}
    scored = {
        name: plain_scores(encoder, images, score, views, layer=layer, device=device)
        for name, images in every.items()
    }
    return scored.pop("normal"), scored


def _accuracy(
    config: DiaConfig,
    mode: EvalMode,
    encoder: Encoder,
    device: torch.device,
    folder: Path,
    facts: dict[str, Any],
) -> str:
    images = load_split(config, "test")
    if config.data.one_class_idx is not None:
        images = images.of_classes([config.data.one_class_idx])
    values = accuracy(
        encoder,
        images,
        marginal=mode == "test_marginalized_acc",
        base=parse_shift(config.contrastive.shift_trans_type).base,
        batch_size=config.evaluation.test_batch_size,
        device=device,
    )
    write_results(folder, {}, {**facts, **values})
    return f"[Error@1 {values['error']:.3f}] [ECE {values['ece']:.3f}]\nWritten to {folder}"

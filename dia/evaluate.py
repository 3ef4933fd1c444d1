"""The DIA modes of eval.py: ood_pre, ood, test_acc, test_marginalized_acc."""

import argparse
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from common.checkpoint import content_hash
from common.cli import add_common_arguments, add_flags, flag_keys, load_from_flags
from common.config import (
    ConfigError,
    config_to_yaml,
    flat_values,
    load_config,
    parse_override,
    read_yaml,
    resolve_path,
)
from common.datasets import dataset_row
from common.image_batches import BadImages
from common.run_log import write_run_record
from common.runtime import resolve_device, seed_everything, tf32_products
from dia.building import effective_shift, encoder_weights, layout_for
from dia.data import evaluation_sets, load_split, normal_train_set
from dia.encoders import Encoder, build_encoder, load_weights
from dia.evaluation import (
    FeatureSource,
    ViewSettings,
    accuracy,
    bank_scores,
    plain_scores,
)
from dia.results import Results, compare, deciles, table, write_results, write_scores
from dia.settings import BANK_SCORES, DiaConfig
from dia.shifts import parse_shift

LOG = logging.getLogger(__name__)
EvalMode = Literal["ood_pre", "ood", "test_acc", "test_marginalized_acc"]
EVAL_MODES: tuple[str, ...] = EvalMode.__args__
ACCURACY_MODES = ("test_acc", "test_marginalized_acc")
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
    """The settings that the flags of `add_evaluation_flags` ask for, and the checkpoint's own.

    What the command does not say of the encoder and the normal class, the settings of the run
    that made the checkpoint do. Raises ConfigError where the two contradict each other.
    """
    args = argparse.Namespace(**{k: v for k, v in vars(args).items() if k != "mode"})
    config = load_from_flags(DiaConfig, args, other_sections=("diffusion",), redirect=CROP_FLAGS)
    if config.contrastive.load_path is None:
        return config
    path = resolve_path(config.contrastive.load_path, "contrastive.load_path")
    run = run_settings(path)
    return config if run is None else with_run_settings(config, run, given_keys(args), path)


def run_settings(checkpoint: Path) -> DiaConfig | None:
    """The settings of the run in whose folder a checkpoint lies; none for a lone file."""
    record = checkpoint.parent / "config.yaml"
    if not record.is_file():
        LOG.info("no config.yaml beside %s: the command alone says what it is", checkpoint)
        return None
    try:
        return load_config(DiaConfig, record)
    except ConfigError as error:
        LOG.warning("%s. So the command alone says what %s is", error, checkpoint.name)
        return None


def given_keys(args: argparse.Namespace) -> set[str]:
    """Dotted keys of the settings that the flags, --set and --config give."""
    keys = {
        key for name, key in flag_keys(DiaConfig).items() if getattr(args, name, None) is not None
    }
    for text in args.overrides:
        keys |= set(parse_override(DiaConfig, text))
    if args.config is not None:
        sections = {k: v for k, v in read_yaml(args.config).items() if k != "diffusion"}
        keys |= set(flat_values(DiaConfig, sections, str(args.config)))
    return keys


def with_run_settings(
    config: DiaConfig, run: DiaConfig, given: Collection[str], checkpoint: Path
) -> DiaConfig:
    """The settings with the encoder, shifts, image size and normal class of the checkpoint's run.

    given: keys that the command gives; ConfigError where one of them contradicts the run.
    """
    same_data = dataset_row(config.data.dataset) == dataset_row(run.data.dataset)
    kind = effective_shift(run.contrastive)
    values: dict[str, Any] = {
        "contrastive.model": run.contrastive.model,
        "contrastive.width": run.contrastive.width,
        "contrastive.simclr_dim": run.contrastive.simclr_dim,
        "contrastive.shift_trans_type": kind.base,
        "data.resize_to": run.data.resize_to or dataset_row(run.data.dataset).size,
    }
    if same_data:
        values["data.one_class_idx"] = run.data.one_class_idx
    asked = {key: value_of(config, key) for key in values}
    written = {key: value_of(run, key) for key in values}  # a shift that mode simclr leaves unused
    asked["contrastive.shift_trans_type"] = parse_shift(asked["contrastive.shift_trans_type"]).base
    if asked["data.resize_to"] is None:
        asked["data.resize_to"] = dataset_row(config.data.dataset).size
    for key, value in values.items():
        if key in given and asked[key] not in (value, written[key]):
            raise ConfigError(
                f"{key}: {asked[key]!r} is asked for, but {checkpoint} was trained with {value!r} "
                f"(config.yaml beside it). Give {value!r}, or leave it out, or move the file away "
                "from its run to have it taken for what you say.",
                key=key,
            )
    taken = {key: value for key, value in values.items() if asked[key] != value}
    if taken:
        shown = ", ".join(f"{key}: {value}" for key, value in taken.items())
        LOG.info("as %s was trained: %s", checkpoint, shown)
    for section in ("contrastive", "data"):
        changes = {k.partition(".")[2]: v for k, v in taken.items() if k.startswith(section)}
        if section == "contrastive" and "shift_trans_type" in changes and kind.count == 1:
            changes["mode"] = "simclr"  # the only mode without shifts
        config = replace(config, **{section: replace(getattr(config, section), **changes)})
    return config


def value_of(config: DiaConfig, key: str) -> Any:
    """The value of a dotted key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def evaluate(config: DiaConfig, mode: EvalMode, command: list[str]) -> str:
    """Runs one mode, writes its results and returns the text to print."""
    seed_everything(config.seed)
    device = resolve_device(config.device)
    scores = () if mode in ACCURACY_MODES else checked_scores(config, mode)
    encoder, checkpoint = load_encoder(config)
    layout = layout_for(device, config.contrastive.width)
    encoder = encoder.to(device, memory_format=layout).eval()
    folder = results_folder(config, mode, checkpoint)
    checkpoint_hash = content_hash(checkpoint)
    source = FeatureSource(
        encoder,
        view_settings(config),
        device,
        bad=BadImages(config.data.on_bad_image),
        num_workers=config.data.num_workers,
        folder=checkpoint.parent / "features" if config.evaluation.cache_features else None,
        checkpoint_hash=checkpoint_hash,
    )
    facts = {
        "mode": mode,
        "dataset": config.data.dataset,
        "one_class_idx": config.data.one_class_idx,
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": checkpoint_hash,
        "selected_by": selected_by(checkpoint),
    }
    with tf32_products(config.precision == "tf32"):
        if mode in ACCURACY_MODES:
            return _accuracy(config, mode, source, folder, facts, command)
        return _auroc(config, scores, source, folder, facts, command)


def _auroc(
    config: DiaConfig,
    scores: Sequence[str],
    source: FeatureSource,
    folder: Path,
    facts: dict[str, Any],
    command: Sequence[str],
) -> str:
    """The modes that tell sets apart: writes and returns what their scores say."""
    sets = evaluation_sets(config)
    train = normal_train_set(config) if set(scores) & set(BANK_SCORES) else None
    write_run_record(folder, config_yaml=config_to_yaml(config), command=command)
    results: dict[str, Results] = {}
    lines = []
    for score in scores:
        if train is not None:
            normal, others = bank_scores(source, train, sets, score)
        else:
            layer = next(iter(config.evaluation.ood_layer), "")
            normal, others = (
                plain_scores(source, sets.normal, score, layer=layer),
                {
                    name: plain_scores(source, images, score, layer=layer)
                    for name, images in sets.others.items()
                },
            )
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
    write_results(folder, results, facts | left_out(source))
    shown = table(results, selected_by=facts["selected_by"])
    return "\n".join([*lines, shown, f"Written to {folder}"])


def left_out(source: FeatureSource) -> dict[str, Any]:
    """The images that could not be read, for results.json; said, too."""
    names = sorted(source.bad.found)
    if names:
        LOG.warning("%d images could not be read and are not in the results.", len(names))
    return {"images_left_out": names}


def load_encoder(config: DiaConfig) -> tuple[Encoder, Path]:
    """The encoder of load_path and that path; the number of classes is the checkpoint's own."""
    settings = config.contrastive
    path = resolve_path(settings.load_path, "contrastive.load_path")
    state = encoder_weights(path)
    kind = parse_shift(settings.shift_trans_type)
    linear = state.get("linear.weight")
    if linear is None or linear.ndim != 2:
        raise ConfigError(
            f"--load_path: {path} has no linear.weight; expected a *.model of train_dia.py",
            key="contrastive.load_path",
        )
    encoder = build_encoder(
        settings.model,
        n_classes=linear.shape[0],
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
    if not config.evaluation.ood_layer and {"clean_norm", "similar"} & set(wanted):
        raise ConfigError(
            "--ood_layer names no layer; clean_norm and similar need one: simclr, shift or "
            "penultimate",
            key="evaluation.ood_layer",
        )
    return wanted


def selected_by(checkpoint: Path) -> str:
    """What chose a checkpoint, as its run's settings say; "unknown" for a lone file."""
    if checkpoint.name.startswith("last"):
        return "last"
    record = checkpoint.parent / "config.yaml"
    if not record.is_file():
        return "unknown"
    try:
        return load_config(DiaConfig, record).contrastive.select_by
    except ConfigError as error:
        LOG.warning("%s. So what chose %s is not known", error, checkpoint.name)
        return "unknown"


def results_folder(config: DiaConfig, mode: EvalMode, checkpoint: Path) -> Path:
    """results_dir, or eval_<mode>_<checkpoint> beside the checkpoint."""
    chosen = config.evaluation.results_dir
    if chosen is not None:
        return resolve_path(chosen, "evaluation.results_dir")
    return checkpoint.parent / f"eval_{mode}_{checkpoint.stem}"


def _accuracy(
    config: DiaConfig,
    mode: EvalMode,
    source: FeatureSource,
    folder: Path,
    facts: dict[str, Any],
    command: Sequence[str],
) -> str:
    images = load_split(config, "test")
    if config.data.one_class_idx is not None:
        images = images.of_classes([config.data.one_class_idx])
    write_run_record(folder, config_yaml=config_to_yaml(config), command=command)
    values = accuracy(source, images, marginal=mode == "test_marginalized_acc")
    write_results(folder, {}, {**facts, **left_out(source), **values})
    return f"[Error@1 {values['error']:.3f}] [ECE {values['ece']:.3f}]\nWritten to {folder}"

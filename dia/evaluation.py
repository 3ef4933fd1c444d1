"""The DIA modes of eval.py: ood_pre and ood (AUROCs), test_acc and test_marginalized_acc."""

import argparse
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from common.checkpoint import (
    CheckpointError,
    load_tensors,
    require_mapping,
    require_state_dict,
    save_atomic,
)
from common.cli import add_common_arguments, add_flags, given_settings, load_from_arguments
from common.config import ConfigError, config_to_yaml, resolve_path
from common.datasets import DatasetError
from common.devices import tf32_products
from common.errors import Outcome
from common.html_report import REPORT, write_page
from common.image_batches import BadImages
from common.image_sets import ImageSet, set_identity
from common.processes import (
    Processes,
    gathered_in_main,
    joined_processes,
    launched,
    said_by_main,
)
from common.random_numbers import seed_everything
from common.run_log import write_run_record
from dia.data import evaluation_sets, load_split, normal_train_set
from dia.localisation import HEATMAPS, Heatmaps, write_heatmaps
from dia.predictor import (
    SetFeatures,
    TrainedEncoder,
    bank_scores,
    checkpoint_file,
    class_logits_over_shifts,
    evaluation_batches,
    extract_features,
    finite_scores,
    load_encoder,
    plain_scores,
    run_settings,
    with_run_settings,
)
from dia.report_page import Scored, accuracy_page, dia_page, load_configured
from dia.results import (
    NORMAL,
    Results,
    SetScores,
    compare,
    deciles,
    remove_others,
    table,
    write_results,
    write_scores,
)
from dia.scoring import calibration_error, top1_error
from dia.settings import BANK_SCORES, DiaConfig, OodScore

LOG = logging.getLogger(__name__)
EvalMode = Literal["ood_pre", "ood", "test_acc", "test_marginalized_acc"]
EVAL_MODES: tuple[str, ...] = get_args(EvalMode)
ACCURACY_MODES = ("test_acc", "test_marginalized_acc")
CROP_FLAGS = {
    "resize_factor": "evaluation.eval_resize_factor",
    "resize_fix": "evaluation.eval_resize_fix",
}
"""In an evaluation these published flags mean the evaluation's crops, not training's."""
CACHE_FORMAT = 5
"""Part of the names of cached features; a file of another format is not found."""


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the DIA modes, all but --mode itself."""
    add_common_arguments(parser, DiaConfig)
    add_flags(parser, DiaConfig, without=("mode",), redirect=CROP_FLAGS)


def evaluation_config(args: argparse.Namespace) -> DiaConfig:
    """The settings that the flags of `add_evaluation_flags` ask for, and the checkpoint's own.

    What the command does not say of the encoder and the normal class, the settings of the run
    that made the checkpoint do. Raises ConfigError where the two contradict each other.
    """
    config = load_from_arguments(DiaConfig, args, other_sections=("diffusion",))
    if config.contrastive.load_path is None:
        return config
    path = evaluated_file(config)
    try:
        run = run_settings(path)
    except ConfigError as error:
        LOG.warning("%s. So the command alone says what %s is", error, path.name)
        return config
    if run is None:
        LOG.info("no config.yaml beside %s: the command alone says what it is", path)
        return config
    given = given_settings(DiaConfig, args, other_sections=("diffusion",))
    return with_run_settings(config, run, given.keys(), path)


def evaluated_file(config: DiaConfig) -> Path:
    """The *.model file that load_path names, or the best one of the run's folder that it names."""
    path = resolve_path(config.contrastive.load_path, "contrastive.load_path")
    return checkpoint_file(path, "best")


def evaluate(config: DiaConfig, mode: EvalMode, command: Sequence[str]) -> Outcome:
    """Runs one mode, writes its results; returns the text to print and how many images failed."""
    seed_everything(config.seed)
    scores = () if mode in ACCURACY_MODES else checked_scores(config, mode)
    if config.evaluation.heatmaps and mode != "ood_pre":
        expected = "--heatmaps are of the scores of --mode ood_pre, CSI and simclr"
        raise ConfigError(
            f"{expected}; leave it out, or choose that mode", key="evaluation.heatmaps"
        )
    path = evaluated_file(config)
    encoder = load_encoder(path, config=config, device=config.device)
    folder = results_folder(config, mode, path)
    facts = {
        "mode": mode,
        "dataset": config.data.dataset,
        "one_class_idx": config.data.one_class_idx,
        "checkpoint": path.name,
        "checkpoint_sha256": encoder.sha256,
        "selected_by": selected_by(path),
    }
    with tf32_products(config.precision == "tf32"):
        if mode in ACCURACY_MODES:
            return evaluate_accuracy(encoder, mode, folder, facts, command)
        return evaluate_scores(encoder, scores, folder, facts, command)


def checked_scores(config: DiaConfig, mode: EvalMode) -> tuple[OodScore, ...]:
    """The scores to compute; ConfigError where one is not of this mode."""
    scores = config.evaluation.ood_score
    wrong = [score for score in scores if (score in BANK_SCORES) != (mode == "ood_pre")]
    if wrong:
        ours = BANK_SCORES if mode == "ood_pre" else "clean_norm, similar, baseline, …marginalized"
        raise ConfigError(
            f"--ood_score: {', '.join(wrong)} is no score of --mode {mode}, which has {ours}",
            key="evaluation.ood_score",
        )
    if not config.evaluation.ood_layer and {"clean_norm", "similar"} & set(scores):
        raise ConfigError(
            "--ood_layer names no layer; clean_norm and similar need one: simclr, shift or "
            "penultimate",
            key="evaluation.ood_layer",
        )
    return scores


def selected_by(checkpoint: Path) -> str:
    """What chose a checkpoint, as its name or its run's settings say; "unknown" for a lone file."""
    if checkpoint.name.startswith("last"):
        return "last"
    if checkpoint.name == "best_loss.model":  # of select_by val without anomalies
        return "training loss"
    try:
        run = run_settings(checkpoint)
    except ConfigError as error:
        LOG.warning("%s. So what chose %s is not known", error, checkpoint.name)
        return "unknown"
    return "unknown" if run is None else run.contrastive.select_by


def results_folder(config: DiaConfig, mode: EvalMode, checkpoint: Path) -> Path:
    """results_dir, or eval_<mode>_<checkpoint> beside the checkpoint."""
    folder = config.evaluation.results_dir
    if folder is not None:
        return resolve_path(folder, "evaluation.results_dir")
    return checkpoint.parent / f"eval_{mode}_{checkpoint.stem}"


def evaluate_scores(
    encoder: TrainedEncoder,
    scores: Sequence[str],
    folder: Path,
    facts: dict[str, Any],
    command: Sequence[str],
) -> Outcome:
    """The modes with AUROCs: writes and returns how well scores tell normals from other sets."""
    config, bad = encoder.config, BadImages(encoder.config.data.on_bad_image)
    sets = evaluation_sets(config)
    bank = set(scores) <= set(BANK_SCORES)  # all of one mode, see checked_scores
    train = normal_train_set(config) if bank else None
    dissolver = None
    if launched().is_main:
        if config.evaluation.report:
            dissolver = load_configured(encoder)
        write_run_record(folder, config_yaml=config_to_yaml(config), command=command)
    if train is not None:
        with joined_processes(encoder.device, config.peer_timeout) as processes:
            take = partial(cached_features, encoder, bad=bad, processes=processes)
            train_features = take(train)
            features = {name: take(images) for name, images in sets.items()}
        if not processes.is_main:
            return Outcome(f"Process {processes.rank} has done its share of the images.")
    results: dict[str, Results] = {}
    by_score: dict[str, dict[str, SetScores]] = {}
    written: set[str] = set()
    lines = []
    for score in scores:
        if train is not None:
            scored = bank_scores(encoder, train_features, features, score)
        else:
            scored = {n: plain_scores(encoder, images, score, bad) for n, images in sets.items()}
        by_score[score] = scored
        written |= write_scores(folder, score, scored, arrays=config.evaluation.save_score)
        draws = config.evaluation.bootstrap_samples
        results[score] = compare(scored, n_resamples=draws, seed=config.seed)
        if config.evaluation.print_score:
            if len(scores) > 1:
                lines.append(f"{score}:")
            for name, values in scored.items():
                title = config.data.dataset if name == NORMAL else name
                lines.append(deciles(title, values.scores))
    facts = facts | left_out(bad)
    write_results(folder, results, facts)
    remove_others(folder, written)
    heatmaps: Heatmaps = {}
    if config.evaluation.heatmaps:
        place = folder / HEATMAPS
        heatmaps = write_heatmaps(encoder, train_features, sets, scores, place, command)
    if config.evaluation.report:
        evaluation = Scored(encoder, sets, by_score, results, facts, heatmaps, dissolver)
        write_page(dia_page(evaluation, command), folder / REPORT)
    text = table(results, selected_by=facts["selected_by"])
    return Outcome("\n".join([*lines, text, f"Written to {folder}"]), len(bad.found))


def evaluate_accuracy(
    encoder: TrainedEncoder,
    mode: EvalMode,
    folder: Path,
    facts: dict[str, Any],
    command: Sequence[str],
) -> Outcome:
    """The modes of the linear and the joint head: writes top-1 error and calibration in percent.

    Raises ScoreError where a logit is not finite.
    """
    config, bad = encoder.config, BadImages(encoder.config.data.on_bad_image)
    images = load_split(config, "test")
    if config.data.one_class_idx is not None:
        images = images.of_classes([config.data.one_class_idx])
    write_run_record(folder, config_yaml=config_to_yaml(config), command=command)
    logits, labels, names = [], [], []
    network, base = encoder.network, encoder.views.base
    with evaluation_batches(encoder, images, bad) as batches:
        for batch in batches:
            x = batch.images.to(encoder.device, non_blocking=True)
            marginal = mode == "test_marginalized_acc"
            outputs = class_logits_over_shifts(network, x, base) if marginal else network(x).linear
            logits.append(outputs.cpu())
            labels.append(batch.labels)
            names += batch.names
    every, truth = torch.cat(logits), torch.cat(labels)
    finite_scores(names, every.sum(dim=1), "logit")
    values = {"error": top1_error(every, truth), "ece": calibration_error(every, truth)}
    facts = {**facts, **left_out(bad), **values}
    write_results(folder, {}, facts)
    remove_others(folder, ())
    if config.evaluation.report:
        probabilities = every.softmax(dim=1).numpy()
        page = accuracy_page(encoder, images, names, probabilities, facts, command)
        write_page(page, folder / REPORT)
    text = f"[Error@1 {values['error']:.3f}] [ECE {values['ece']:.3f}]\nWritten to {folder}"
    return Outcome(text, len(bad.found))


def left_out(bad: BadImages) -> dict[str, Any]:
    """The images that could not be read, for results.json; their number as a warning."""
    if bad.found:
        LOG.warning("%d images could not be read and are not in the results.", len(bad.found))
    return {"images_left_out": sorted(bad.found)}


def cached_features(
    encoder: TrainedEncoder, images: ImageSet, *, bad: BadImages, processes: Processes
) -> SetFeatures | None:
    """As `shared_features`, but read from a file beside the checkpoint where one has them.

    The file's name is a hash of the checkpoint and its products' precision, the views, the images'
    names and contents, and how they become pixels.
    """
    if not encoder.config.evaluation.cache_features or encoder.sha256 is None:
        return shared_features(encoder, images, bad, processes)
    views = encoder.views
    if views.seeding != "published":
        views = replace(views, batch_size=0)  # which does not matter then
    identity = set_identity(images, whole=True)
    facts = [CACHE_FORMAT, encoder.sha256, repr(views), identity, encoder.config.precision]
    facts += [images.size, images.white_value, images.window, images.refuse_grey]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    path = encoder.path.parent / "features" / f"features_{key}.pt"
    features = None
    if processes.is_main and path.is_file():
        try:
            features = read_features(path, images, encoder)
        except CheckpointError as error:
            LOG.warning("%s The features are taken anew.", error)
        else:
            bad.note(features.left_out, images.remedies)
    if said_by_main(features is not None, processes):
        return features
    features = shared_features(encoder, images, bad, processes)
    if features is not None:
        try:
            save_atomic(features._asdict(), path)
        except OSError as error:
            LOG.warning(
                "%s: %s. The features are not kept; make the folder writable, or pass "
                "--no-cache_features.",
                error.filename, error.strerror,
            )  # fmt: skip
    return features


def shared_features(
    encoder: TrainedEncoder, images: ImageSet, bad: BadImages, processes: Processes
) -> SetFeatures | None:
    """As `extract_features`, in which each process takes its share of the images.

    Complete in the main process, None in the others. With published seeding the main one does all,
    for an image's views follow from its batch. CheckpointError there where their weights differ.
    """
    if processes.world_size == 1:
        return extract_features(encoder, images, bad)
    rows = processes.rows if encoder.views.seeding == "per_image" else slice(processes.rank, None)
    own = images.subset(range(len(images))[rows])
    if encoder.views.seeding != "per_image" and not processes.is_main:
        own = images.subset([])
    features, fault = None, ""
    try:
        if len(own):
            features = extract_features(encoder, own, bad)
    except DatasetError as error:
        if not all(name in bad.found for name in own.names):
            raise
        fault = str(error)  # it is one only where no process can read an image
    gathered = gathered_in_main((features, fault, bad.found, encoder.sha256), processes)
    if gathered is None:
        return None
    if len({sha256 for *_, sha256 in gathered}) > 1:
        raise CheckpointError(
            f"{encoder.path} was replaced while the processes loaded it: they have different "
            "weights. Start the evaluation again, or evaluate a copy that no training replaces."
        )
    for _, _, found, _ in gathered:
        bad.note(found, images.remedies)
    parts = [part for part, *_ in gathered if part is not None]
    if not parts:
        raise DatasetError(next(text for _, text, *_ in gathered if text))
    return joined_features(parts, images, bad)


def joined_features(parts: Sequence[SetFeatures], images: ImageSet, bad: BadImages) -> SetFeatures:
    """Features of parts of a set as those of the whole, in its order."""
    names = [name for part in parts for name in part.names]
    place = {name: number for number, name in enumerate(images.names)}
    order = sorted(range(len(names)), key=lambda i: place[names[i]])
    simclr, shift = (torch.cat([getattr(part, n) for part in parts]) for n in ("simclr", "shift"))
    left_out = {name: bad.found[name] for name in images.names if name in bad.found}
    return SetFeatures([names[i] for i in order], simclr[order], shift[order], left_out)


def read_features(path: Path, images: ImageSet, encoder: TrainedEncoder) -> SetFeatures:
    """Cached features of a set; CheckpointError where the file holds anything else."""
    state = require_mapping(load_tensors(path), str(path), SetFeatures._fields)
    names, left_out = state["names"], require_mapping(state["left_out"], f"{path}: left_out")
    if not isinstance(names, list) or [n for n in images.names if n not in left_out] != names:
        raise CheckpointError(f"{path}: its names are not those of the images.")
    features = require_state_dict({n: state[n] for n in ("simclr", "shift")}, str(path))
    rows = (len(names), encoder.views.n_shifts * encoder.views.n_samples)
    if any(part.ndim != 3 or part.shape[:2] != rows for part in features.values()):
        shapes = [tuple(part.shape) for part in features.values()]
        raise CheckpointError(f"{path}: features of shapes {shapes}, expected {rows} and widths.")
    if any(part.dtype != torch.float32 or not part.isfinite().all() for part in features.values()):
        raise CheckpointError(f"{path}: features that are not finite 32-bit floats.")
    return SetFeatures(names, features["simclr"], features["shift"], left_out)

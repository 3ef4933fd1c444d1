"""Evaluating an encoder: CSI against the train bank, the other scores, accuracy.

N images, S samples, K shifts, T = K·S views, d features. Scores are larger for normal images.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.checkpoint import (
    CheckpointError,
    load_tensors,
    require_mapping,
    require_state_dict,
    save_atomic,
)
from common.image_batches import BadImages, ordered_batches, reading
from common.image_sets import ImageSet, set_identity
from common.runtime import eval_mode
from dia.augment import AugmentationSettings, augment
from dia.data import EvaluationSets
from dia.encoders import Encoder
from dia.features import DrawViews, extract_features, per_image_draws, published_draws
from dia.results import SetScores
from dia.scoring import (
    ScoreError,
    calibration_error,
    check_reference,
    csi_score,
    feature_norm,
    fit_csi,
    marginal_logits,
    max_softmax,
    similarity_to_mean,
    top1_error,
)
from dia.settings import Seeding
from dia.shifts import Base, rotate, shift

LOG = logging.getLogger(__name__)
SIMILAR_SAMPLES = 2
CACHE_FORMAT = 2
"""Of the files of kept features; others are not found again."""


@dataclass(frozen=True)
class ViewSettings:
    """How images are looked at in an evaluation."""

    base: Base
    """Shift transform, always undissolved; none = one unshifted view."""
    n_shifts: int
    n_samples: int
    crop_scale: tuple[float, float]
    seeding: Seeding
    seed: int
    batch_size: int

    @property
    def augmentation(self) -> AugmentationSettings:
        """The augmentation with these crops."""
        return AugmentationSettings(crop_scale=self.crop_scale)

    def draw(self) -> DrawViews:
        """The source of random views."""
        if self.seeding == "published":
            return published_draws(self.augmentation)
        return per_image_draws(self.augmentation, self.seed)


class CsiFeatures(NamedTuple):
    """Features of the images of a set that could be read, on the CPU."""

    names: list[str]
    simclr: Tensor
    """(N, T, 128)."""
    shift: Tensor
    """(N, T, K)."""
    left_out: dict[str, str]
    """Messages by name of the images that could not be read."""


class FeatureSource:
    """Takes features of image sets; with a folder keeps them, to find them again."""

    def __init__(
        self,
        encoder: Encoder,
        views: ViewSettings,
        device: torch.device,
        *,
        bad: BadImages | None = None,
        num_workers: int = 0,
        folder: Path | None = None,
        checkpoint_hash: str = "",
    ) -> None:
        """bad: what to do with images that cannot be read; none = an error.

        folder: where features are kept; None keeps nothing. They are known by the checkpoint's
        hash, the views, and names and contents of the images.
        """
        self.encoder, self.views, self.device = encoder, views, device
        self.bad, self.num_workers = bad or BadImages(), num_workers
        self.folder, self.checkpoint_hash = folder, checkpoint_hash
        self.taken: dict[ImageSet, CsiFeatures] = {}

    def features(self, images: ImageSet) -> CsiFeatures:
        """The features of a set, taken once. Raises what ordered_batches does."""
        if images not in self.taken:
            self.taken[images] = self._found_or_made(images)
        found = self.taken[images]
        self.bad.note(found.left_out)
        return found

    def _found_or_made(self, images: ImageSet) -> CsiFeatures:
        if self.folder is None:
            return self._made(images)
        alike = self.views
        if alike.seeding != "published":
            alike = replace(alike, batch_size=0)
        identity = set_identity(images, whole=True)
        facts = [CACHE_FORMAT, self.checkpoint_hash, repr(alike), images.size, identity]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        path = self.folder / f"features_{key}.pt"
        if path.is_file():
            try:
                return read_features(path, images, self.views)
            except CheckpointError as error:
                LOG.warning("%s The features are taken anew.", error)
        made = self._made(images)
        save_atomic(made._asdict(), path)
        return made

    def _made(self, images: ImageSet) -> CsiFeatures:
        def encode(rows: Tensor) -> dict[str, Tensor]:
            heads = self.encoder(rows, "simclr", "shift")
            return {"simclr": heads.simclr, "shift": heads.shift}

        views, bad = self.views, BadImages(self.bad.on_bad_image)
        names: list[str] = []
        with reading(ordered_batches(images, views.batch_size, self.num_workers, bad)) as batches:

            def pixels() -> Iterator[tuple[Tensor, Sequence[str]]]:
                for batch in batches:
                    names.extend(batch.names)
                    yield batch.images, batch.names

            with eval_mode(self.encoder):
                made = extract_features(
                    encode,
                    pixels(),
                    base=views.base,
                    n_shifts=views.n_shifts,
                    n_samples=views.n_samples,
                    draw=views.draw(),
                    device=self.device,
                )
        self.bad.found |= bad.found  # named already
        return CsiFeatures(names, made["simclr"], made["shift"], bad.found)


def read_features(path: Path, images: ImageSet, views: ViewSettings) -> CsiFeatures:
    """Features that were kept for a set; CheckpointError where the file holds anything else."""
    state = require_mapping(load_tensors(path), str(path), CsiFeatures._fields)
    names, left_out = state["names"], require_mapping(state["left_out"], f"{path}: left_out")
    if not isinstance(names, list) or [n for n in images.names if n not in left_out] != names:
        raise CheckpointError(f"{path}: its names are not those of the images.")
    features = require_state_dict({n: state[n] for n in ("simclr", "shift")}, str(path))
    rows = (len(names), views.n_shifts * views.n_samples)
    if any(part.ndim != 3 or part.shape[:2] != rows for part in features.values()):
        shapes = [tuple(part.shape) for part in features.values()]
        raise CheckpointError(f"{path}: features of shapes {shapes}, expected {rows} and widths.")
    if any(part.dtype != torch.float32 or not part.isfinite().all() for part in features.values()):
        raise CheckpointError(f"{path}: features that are not finite 32-bit floats.")
    return CsiFeatures(names, features["simclr"], features["shift"], left_out)


def finite_scores(names: Sequence[str], scores: Tensor, score: str) -> SetScores:
    """Scores (N,) of a set; ScoreError where any is not finite, with their number."""
    wrong = (~scores.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ScoreError(
            f"{len(wrong)} of {len(names)} {score} scores are not finite, the first of "
            f"{names[wrong[0]]}. The encoder's outputs are too large or not numbers: use another "
            "checkpoint, or train again with a lower --lr_init."
        )
    return SetScores(names, scores.cpu().numpy())


def bank_scores(
    source: FeatureSource, train: ImageSet, test: EvaluationSets, score: str
) -> tuple[SetScores, dict[str, SetScores]]:
    """CSI or simclr scores of test normals and of every other set, against the train images."""

    def features(images: ImageSet) -> tuple[Tensor, Tensor]:
        found = source.features(images)
        return found.simclr.to(source.device), found.shift.to(source.device)

    reference = fit_csi(*features(train), n_shifts=source.views.n_shifts, score=score)
    for warning in check_reference(reference):
        LOG.warning("%s", warning)

    def scored(images: ImageSet) -> SetScores:
        scores = csi_score(reference, *features(images))
        return finite_scores(source.features(images).names, scores, score)

    return scored(test.normal), {name: scored(images) for name, images in test.others.items()}


@torch.no_grad()
def plain_scores(source: FeatureSource, images: ImageSet, score: str, *, layer: str) -> SetScores:
    """clean_norm, similar, baseline or baseline_marginalized of a set.

    layer: simclr, shift or penultimate, for the first two.
    """
    encoder, views = source.encoder, source.views
    parts, names = [], []
    read = ordered_batches(images, views.batch_size, source.num_workers, source.bad)
    with eval_mode(encoder), reading(read) as batches:
        for batch in batches:
            x = batch.images.to(source.device)
            match score:
                case "clean_norm":
                    part = feature_norm(getattr(encoder(x, "simclr", "shift"), layer))
                case "similar":
                    part = similarity_to_mean(_samples(encoder, x, batch.names, layer, views))
                case "baseline":
                    part = max_softmax(encoder(x).linear)
                case "baseline_marginalized":
                    part = max_softmax(_marginal(encoder, x, views.base))
                case _:
                    raise ValueError(f"score {score!r} is none of mode ood's")
            parts.append(part.cpu())
            names += batch.names
    return finite_scores(names, torch.cat(parts), score)


def _samples(
    encoder: Encoder, x: Tensor, names: Sequence[str], layer: str, views: ViewSettings
) -> Tensor:
    """Features (S, N, d) of augmented, unshifted samples."""
    draw, size = views.draw(), tuple(x.shape[-2:])
    samples = []
    for sample in range(SIMILAR_SAMPLES):
        rows = augment(x, draw(names, sample, 1, size).augmentation)
        samples.append(getattr(encoder(rows, "simclr", "shift"), layer))
    return torch.stack(samples)


def _marginal(encoder: Encoder, x: Tensor, base: Base) -> Tensor:
    """Class logits (N, classes) of the joint head, averaged over the four shifts."""
    # The published code fails here for cutperm; any base but that is rotation there.
    turned = [shift(x, k, base) if base == "cutperm" else rotate(x, k) for k in range(4)]
    return marginal_logits(torch.stack([encoder(rows, "joint").joint for rows in turned]))


@torch.no_grad()
def accuracy(source: FeatureSource, images: ImageSet, *, marginal: bool) -> dict[str, float]:
    """Top-1 error and expected calibration error in percent over a whole set.

    Raises ScoreError where a logit is not finite.
    """
    encoder, base = source.encoder, source.views.base
    logits, labels, names = [], [], []
    read = ordered_batches(images, source.views.batch_size, source.num_workers, source.bad)
    with eval_mode(encoder), reading(read) as batches:
        for batch in batches:
            x = batch.images.to(source.device)
            logits.append((_marginal(encoder, x, base) if marginal else encoder(x).linear).cpu())
            labels.append(batch.labels)
            names += batch.names
    every, truth = torch.cat(logits), torch.cat(labels)
    finite_scores(names, every.sum(dim=1), "logit")
    return {"error": top1_error(every, truth), "ece": calibration_error(every, truth)}

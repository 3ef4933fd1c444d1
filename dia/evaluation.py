"""Evaluating an encoder: CSI against the train bank, the other scores, accuracy.

N images, S samples, K shifts, T = K·S views, d features. Scores are larger for normal images.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import CheckpointError, load_tensors, save_atomic
from common.image_batches import ordered_batches
from common.image_sets import ImageSet
from common.runtime import evaluating
from dia.augment import AugmentationSettings, augment
from dia.data import EvaluationSets
from dia.encoders import Encoder
from dia.features import DrawViews, Seeding, extract_features, per_image_draws, published_draws
from dia.results import SetScores
from dia.scoring import (
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
from dia.shifts import Base, rotate, shift

LOG = logging.getLogger(__name__)
SIMILAR_SAMPLES = 2


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


class FeatureCache:
    """Features on disk, found again by what they were made from."""

    def __init__(self, folder: Path | None, checkpoint_hash: str) -> None:
        """folder: None keeps nothing."""
        self.folder, self.checkpoint_hash = folder, checkpoint_hash

    def get(
        self, images: ImageSet, views: ViewSettings, make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The features of a set, from disk where checkpoint, settings and files are the same."""
        if self.folder is None:
            return make()
        alike = views if views.seeding == "published" else replace(views, batch_size=0)
        facts = [self.checkpoint_hash, repr(alike), images.size, fingerprint(images)]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        path = self.folder / f"features_{key}.pt"
        if path.is_file():
            try:
                return load_tensors(path)
            except CheckpointError as error:
                LOG.warning("%s; the features are taken anew", error)
        features = make()
        save_atomic(features, path)
        return features


def fingerprint(images: ImageSet) -> str:
    """A hash of a set's names and of its files' sizes and times, or of its pixels."""
    digest = hashlib.sha256("\0".join(images.names).encode())
    if isinstance(images.items, np.ndarray):
        digest.update(np.ascontiguousarray(images.items).tobytes())
    else:
        for path in images.items:
            stat = path.stat()
            digest.update(f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def csi_features(
    encoder: Encoder, images: ImageSet, views: ViewSettings, device: torch.device
) -> dict[str, Tensor]:
    """`simclr` (N, T, 128) and `shift` (N, T, K) of a set, on the CPU."""

    def encode(rows: Tensor) -> dict[str, Tensor]:
        heads = encoder(rows, "simclr", "shift")
        return {"simclr": heads.simclr, "shift": heads.shift}

    batches = ((b.images, b.names) for b in ordered_batches(images, views.batch_size))
    with evaluating(encoder):
        return extract_features(
            encode,
            batches,
            base=views.base,
            n_shifts=views.n_shifts,
            n_samples=views.n_samples,
            draw=views.draw(),
            device=device,
        )


def bank_scores(
    encoder: Encoder,
    train: ImageSet,
    test: EvaluationSets,
    score: str,
    views: ViewSettings,
    *,
    device: torch.device,
    cache: FeatureCache | None = None,
) -> tuple[SetScores, dict[str, SetScores]]:
    """CSI or simclr scores of test normals and of every other set, against the train images."""
    cache = cache or FeatureCache(None, "")

    def features(images: ImageSet) -> tuple[Tensor, Tensor]:
        found = cache.get(images, views, lambda: csi_features(encoder, images, views, device))
        return found["simclr"].to(device), found["shift"].to(device)

    reference = fit_csi(*features(train), n_shifts=views.n_shifts, score=score)
    for warning in check_reference(reference):
        LOG.warning("%s", warning)

    def scored(images: ImageSet) -> SetScores:
        return SetScores(images.names, csi_score(reference, *features(images)).cpu().numpy())

    return scored(test.normal), {name: scored(images) for name, images in test.others.items()}


@torch.no_grad()
def plain_scores(
    encoder: Encoder,
    images: ImageSet,
    score: str,
    views: ViewSettings,
    *,
    layer: str,
    device: torch.device,
) -> SetScores:
    """clean_norm, similar, baseline or baseline_marginalized of a set.

    layer: simclr, shift or penultimate, for the first two.
    """
    parts = []
    with evaluating(encoder):
        for batch in ordered_batches(images, views.batch_size):
            x = batch.images.to(device)
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
    return SetScores(images.names, torch.cat(parts).numpy())


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
def accuracy(
    encoder: Encoder,
    images: ImageSet,
    *,
    marginal: bool,
    base: Base,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Top-1 error and expected calibration error in percent over a whole set."""
    logits, labels = [], []
    with evaluating(encoder):
        for batch in ordered_batches(images, batch_size):
            x = batch.images.to(device)
            logits.append((_marginal(encoder, x, base) if marginal else encoder(x).linear).cpu())
            labels.append(batch.labels)
    every, truth = torch.cat(logits), torch.cat(labels)
    return {"error": top1_error(every, truth), "ece": calibration_error(every, truth)}

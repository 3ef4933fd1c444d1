"""The Python API: a trained encoder, and the scores that it gives images.

    encoder = load_encoder("runs/dia", select="best", device="auto")
    scores = score(encoder, train_images, test_images, ood_score="CSI")

eval.py gets its numbers from the same functions. Scores are larger for normal images.
N images, S samples, K shifts, T = K·S views, d features.
"""

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import CheckpointError, open_file, stream_hash
from common.cli import as_yaml
from common.config import ConfigError, load_config
from common.devices import eval_mode, resolve_device, tf32_products
from common.image_batches import BadImages, Batch, ordered_batches, reading
from common.image_sets import ImageSet
from dia.augment import augment
from dia.encoders import Encoder, build_encoder, encoder_weights, layout_for, load_weights
from dia.features import ViewSettings, draw_samples, image_features
from dia.results import SetScores
from dia.scoring import (
    ScoreError,
    check_reference,
    csi_score,
    feature_norm,
    fit_csi,
    marginal_logits,
    max_softmax,
    similarity_to_mean,
)
from dia.settings import BANK_SCORES, DiaConfig, OodScore
from dia.shifts import Base, ShiftType, effective_shift, parse_shift, shift

LOG = logging.getLogger(__name__)
SIMILAR_SAMPLES = 2
PIXEL_KEYS = ("data.white_value", "data.window")
"""Settings that say which grey values a file becomes."""
Images = ImageSet | Tensor | np.ndarray | Sequence[Path | str]


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder with what is needed to score images with it."""

    network: Encoder
    """In evaluation mode, on `device`."""
    config: DiaConfig
    views: ViewSettings
    device: torch.device
    path: Path
    """The checkpoint."""
    sha256: str | None = None
    """Of the bytes that were loaded, which a training may have replaced since; None for no file."""


class SetFeatures(NamedTuple):
    """Features of the images of a set that could be read, on the CPU."""

    names: list[str]
    simclr: Tensor
    """(N, T, d)."""
    shift: Tensor
    """(N, T, K)."""
    left_out: dict[str, str]
    """Messages by name of the images that could not be read."""


def load_encoder(
    checkpoint: Path | str,
    select: Literal["best", "last"] = "best",
    *,
    config: DiaConfig | None = None,
    device: str = "auto",
) -> TrainedEncoder:
    """The encoder of a run of train_dia.py, ready to score images.

    checkpoint: a run's folder, of which `select` names the file, or a *.model file. config: how
    images are looked at; None takes the run's own settings, as `eval.py --config
    <run>/config.yaml` does. Raises CheckpointError, ConfigError and RuntimeSetupError.
    """
    path = checkpoint_file(Path(checkpoint), select)
    if config is None:
        run = run_settings(path)
        if run is None:
            raise ConfigError(f"{path} has no config.yaml beside it; pass its settings as config.")
        config = with_run_settings(run, run, (), path)
        config = replace(config, data=replace(config.data, num_workers=0))
    settings, kind = config.contrastive, parse_shift(config.contrastive.shift_trans_type)
    settings.require_width()
    torch_device = resolve_device(device)
    with open_file(path) as file:  # one file for both, whatever is put in its place meanwhile
        state, sha256 = encoder_weights(path, file), stream_hash(file)
    linear = state.get("linear.weight")
    if linear is None or linear.ndim != 2:
        raise CheckpointError(
            f"{path} has no linear.weight, which says the number of classes. Pass a *.model of "
            "train_dia.py."
        )
    network = build_encoder(
        settings.model,
        n_classes=linear.shape[0],
        n_shifts=kind.count,
        simclr_dim=settings.simclr_dim,
        width=settings.width,
    )
    load_weights(network, state, source=str(path), strict=not settings.no_strict)
    network.to(torch_device, memory_format=layout_for(torch_device, settings.width)).eval()
    views = view_settings(config, kind, config.evaluation.ood_samples, config.eval_crop_scale)
    return TrainedEncoder(network, config, views, torch_device, path, sha256)


def view_settings(
    config: DiaConfig, kind: ShiftType, n_samples: int, crop_scale: tuple[float, float]
) -> ViewSettings:
    """How an evaluation looks at images; only the number of samples and the crops differ."""
    return ViewSettings(
        base=kind.base,
        n_shifts=kind.count,
        n_samples=n_samples,
        crop_scale=crop_scale,
        seeding=config.evaluation.seeding,
        seed=config.seed,
        batch_size=config.evaluation.test_batch_size,
    )


def score(
    encoder: TrainedEncoder,
    train_images: Images | None,
    test_images: Images,
    ood_score: str = "CSI",
    *,
    train_names: Sequence[str] | None = None,
    test_names: Sequence[str] | None = None,
) -> Tensor:
    """Scores of the test images, larger = more normal: (N,) float32 on the CPU.

    Images are floats (N, C, H, W) in [0, 1] with 1 or 3 channels, or paths of image files, or an
    ImageSet; other sizes are resized to the run's. train_images: the normal ones that CSI and
    simclr compare with; None for the other scores. Augmentation is drawn by an image's name: its
    number or path, or what `train_names` and `test_names` say; eval.py has the path below the
    dataset's folder. Raises ImageError, DatasetError and ScoreError, ValueError for other input.
    """
    test = as_image_set(encoder, test_images, test_names)
    with tf32_products(encoder.config.precision == "tf32"):
        if ood_score not in BANK_SCORES:
            return torch.from_numpy(plain_scores(encoder, test, ood_score, BadImages()).scores)
        if train_images is None:
            raise ValueError(f"{ood_score} compares with training images; pass train_images")
        train = as_image_set(encoder, train_images, train_names)
        bank, tested = (extract_features(encoder, images, BadImages()) for images in (train, test))
    return torch.from_numpy(bank_scores(encoder, bank, {"": tested}, ood_score)[""].scores)


def as_image_set(encoder: TrainedEncoder, images: Images, names: Sequence[str] | None) -> ImageSet:
    """Tensors or files as a set of the encoder's image size; ValueError for any other input."""
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
    if isinstance(images, Tensor):
        if not images.is_floating_point():
            raise ValueError(f"expected floats in [0, 1], got {images.dtype}")
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"expected images (N, 1 or 3, H, W), got {tuple(images.shape)}")
        if images.numel() and not (images.min() >= 0 and images.max() <= 1):  # NaN, too
            low, high = images.min().item(), images.max().item()
            raise ValueError(f"expected images in [0, 1], got values from {low:g} to {high:g}")
        items: Tensor | list[Path] = images.detach().cpu().float()
        own_names = [str(number) for number in range(len(items))]
    else:
        items = [Path(path) for path in ([images] if isinstance(images, str | Path) else images)]
        own_names = [path.as_posix() for path in items]
    if names is not None and len(names) != len(items):
        raise ValueError(f"expected a name for each of {len(items)} images, got {len(names)}")
    data = encoder.config.data
    return ImageSet(
        items,
        [0] * len(items),
        own_names if names is None else names,
        classes=("unknown",),
        size=data.side,
        white_value=data.white_value,
        window=data.window,
    )


def checkpoint_file(path: Path, select: Literal["best", "last"]) -> Path:
    """The *.model file that is meant; CheckpointError where a folder does not have one such."""
    if select not in ("best", "last"):
        raise ValueError(f"select must be best or last, got {select!r}")
    if not path.is_dir():
        return path
    found = sorted(path.glob("best_*.model" if select == "best" else "last.model"))
    if len(found) != 1:
        there = ", ".join(sorted(file.name for file in path.glob("*.model"))) or "none"
        raise CheckpointError(
            f"{path} has {len(found)} checkpoints for select={select!r}; *.model files there: "
            f"{there}. Pass one of them, or the folder of a run of train_dia.py."
        )
    return found[0]


def run_settings(checkpoint: Path) -> DiaConfig | None:
    """The settings of the run in whose folder a checkpoint lies; None for a lone file."""
    record = checkpoint.parent / "config.yaml"
    return load_config(DiaConfig, record) if record.is_file() else None


def with_run_settings(
    config: DiaConfig, run: DiaConfig, given: Collection[str], checkpoint: Path
) -> DiaConfig:
    """The settings with the encoder, shifts, image size, normal class, share of anomalies among
    the training images, and range of grey values of the checkpoint's run.

    given: dotted keys that the command gives; ConfigError where one of them contradicts the run.
    Another range of grey values is only said, for another scanner may need it; so is another share
    of anomalies, for the published evaluation has none.
    """
    kind = effective_shift(run.contrastive)
    keys = ("contrastive.model", "contrastive.width", "contrastive.simclr_dim")
    values: dict[str, Any] = {key: attrgetter(key)(run) for key in keys}
    values["contrastive.shift_trans_type"] = kind.base
    values["data.resize_to"] = run.data.side
    if config.data.row == run.data.row:
        values["data.one_class_idx"] = run.data.one_class_idx
    current = {key: attrgetter(key)(config) for key in values}
    current["contrastive.shift_trans_type"] = parse_shift(config.contrastive.shift_trans_type).base
    current["data.resize_to"] = config.data.side
    for key, value in values.items():
        # The run's own file may name a shift that its mode, simclr, left unused.
        if key in given and current[key] not in (value, attrgetter(key)(run)):
            raise ConfigError(
                f"{key}: {current[key]!r} is asked for, but {checkpoint} was trained with "
                f"{value!r} (config.yaml beside it). Give {value!r}, or leave it out, or move the "
                "file away from its run to have it taken for what you say.",
                key=key,
            )
    adopted = {key: value for key, value in values.items() if current[key] != value}
    adopted |= adopted_or_said(config, run, PIXEL_KEYS, given, checkpoint)
    if config.data.row == run.data.row:
        share = ("contrastive.contamination_ratio",)
        adopted |= adopted_or_said(config, run, share, given, checkpoint)
    if adopted:
        text = ", ".join(f"{key}: {as_yaml(value)}" for key, value in adopted.items())
        LOG.info("as %s was trained: %s", checkpoint, text)
    if kind.count == 1:
        adopted["contrastive.mode"] = "simclr"  # the only mode without shifts
    for section in ("contrastive", "data"):
        changes = {k.partition(".")[2]: v for k, v in adopted.items() if k.startswith(section)}
        config = replace(config, **{section: replace(getattr(config, section), **changes)})
    return config


def adopted_or_said(
    config: DiaConfig, run: DiaConfig, keys: Sequence[str], given: Collection[str], checkpoint: Path
) -> dict[str, Any]:
    """The run's values of these keys where its own differ; none, and a warning for each that
    differs, where the command gives any of them."""
    differing = {}
    for key in keys:
        here, there = attrgetter(key)(config), attrgetter(key)(run)
        if here != there:
            differing[key] = there
    if set(given).isdisjoint(keys):
        return differing
    for key, there in differing.items():
        LOG.warning(
            "%s: %s here, and %s where %s was trained: the encoder knows other images.",
            *(key, as_yaml(attrgetter(key)(config)), as_yaml(there), checkpoint),
        )
    return {}


@contextlib.contextmanager
def evaluation_batches(
    encoder: TrainedEncoder, images: ImageSet, bad: BadImages
) -> Iterator[Iterator[Batch]]:
    """Batches of a set, with the encoder in evaluation mode and without gradients meanwhile."""
    size, workers = encoder.views.batch_size, encoder.config.data.num_workers
    pins = encoder.device.type == "cuda"
    stream = ordered_batches(images, size, workers, bad, pin_memory=pins)
    with torch.no_grad(), eval_mode(encoder.network), reading(stream) as batches:
        yield batches


def extract_features(encoder: TrainedEncoder, images: ImageSet, bad: BadImages) -> SetFeatures:
    """CSI features of a set. bad: what to do with images that cannot be read, and which they are.

    Raises ImageError, and DatasetError where no image can be read.
    """
    views = encoder.views
    names: list[str] = []
    parts: list[tuple[Tensor, Tensor]] = []
    with evaluation_batches(encoder, images, bad) as batches:
        for batch in batches:
            x = batch.images.to(encoder.device, non_blocking=True)
            samples = draw_samples(views, batch.names, (x.shape[2], x.shape[3]))
            pair = image_features(encoder.network, x, views.base, views.n_shifts, samples)
            parts.append((pair[0].cpu(), pair[1].cpu()))
            names += batch.names
    simclr, shift_logits = (torch.cat(part) for part in zip(*parts, strict=True))
    left_out = {name: bad.found[name] for name in images.names if name in bad.found}
    return SetFeatures(names, simclr, shift_logits, left_out)


def bank_scores(
    encoder: TrainedEncoder, train: SetFeatures, tests: Mapping[str, SetFeatures], score: str
) -> dict[str, SetScores]:
    """CSI or simclr scores of every test set against the training images' features."""
    device = encoder.device
    reference = fit_csi(
        train.simclr.to(device),
        train.shift.to(device),
        n_shifts=encoder.views.n_shifts,
        score=score,
    )
    for warning in check_reference(reference):
        LOG.warning("%s", warning)
    scores: dict[str, SetScores] = {}
    for name, test in tests.items():
        values = csi_score(reference, test.simclr.to(device), test.shift.to(device))
        scores[name] = finite_scores(test.names, values, score)
    return scores


def plain_scores(
    encoder: TrainedEncoder, images: ImageSet, score: str, bad: BadImages
) -> SetScores:
    """clean_norm, similar, baseline or baseline_marginalized of a set, without training images."""
    parts, names = [], []
    with evaluation_batches(encoder, images, bad) as batches:
        for batch in batches:
            x = batch.images.to(encoder.device)
            parts.append(plain_score(encoder, x, batch.names, score).cpu())
            names += batch.names
    return finite_scores(names, torch.cat(parts), score)


def plain_score(encoder: TrainedEncoder, x: Tensor, names: Sequence[str], score: str) -> Tensor:
    """One of these scores of a batch (B, C, H, W) with its names: (B,).

    clean_norm and similar are of the first layer of `evaluation.ood_layer`.
    """
    network, views = encoder.network, encoder.views
    layer = next(iter(encoder.config.evaluation.ood_layer), "")
    match score:
        case "clean_norm":
            return feature_norm(getattr(network(x, "simclr", "shift"), layer))
        case "similar":
            unshifted = replace(views, n_shifts=1, n_samples=SIMILAR_SAMPLES)
            draws = draw_samples(unshifted, names, (x.shape[2], x.shape[3]))
            heads = [network(augment(x, d.augmentation), "simclr", "shift") for d in draws]
            return similarity_to_mean(torch.stack([getattr(head, layer) for head in heads]))
        case "baseline":
            return max_softmax(network(x).linear)
        case "baseline_marginalized":
            return max_softmax(class_logits_over_shifts(network, x, views.base))
    raise ValueError(f"score {score!r} is unknown; choose from {', '.join(get_args(OodScore))}")


def class_logits_over_shifts(network: Encoder, x: Tensor, base: Base) -> Tensor:
    """Class logits (N, classes) of the joint head, averaged over the four shifts."""
    # The published code fails here for cutperm; any base but that is rotation there.
    base = "cutperm" if base == "cutperm" else "rotation"
    joint = [network(shift(x, k, base), "joint").joint for k in range(4)]
    return marginal_logits(torch.stack(joint))


def finite_scores(names: Sequence[str], scores: Tensor, score: str) -> SetScores:
    """Scores (N,) of a set; ScoreError where any is not finite, with their number."""
    scores = scores.cpu()
    wrong = (~scores.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ScoreError(
            f"{len(wrong)} of {len(names)} {score} scores are not finite, the first of "
            f"{names[wrong[0]]}. The encoder's outputs are too large or not numbers: use another "
            "checkpoint, or train again with a lower --lr_init."
        )
    return SetScores(names, scores.numpy())

"""What chooses the best checkpoint of a run: test AUROC, held-out images, or nothing."""

import logging

import torch

from common.image_batches import BadImages
from common.image_sets import ImageSet
from dia.data import EvaluationSets, evaluation_sets
from dia.encoders import Encoder
from dia.evaluation import FeatureSource, ViewSettings, bank_scores
from dia.results import compare
from dia.settings import DiaConfig
from dia.shifts import parse_shift

LOG = logging.getLogger(__name__)
SELECTION_CROP = (0.54, 1.0)
"""Crop areas of the evaluations during training, as published."""


class Selection:
    """Values of an encoder, larger = better, by the name of the checkpoint they choose."""

    def __init__(
        self,
        config: DiaConfig,
        train: ImageSet,
        held: EvaluationSets | None,
        device: torch.device,
    ) -> None:
        """held: the validation sets of select_by val; None where no anomalies are labelled."""
        self.by, self.train, self.device = config.contrastive.select_by, train, device
        self.sets = held
        if self.by == "test":
            self.sets = evaluation_sets(config)
        elif self.by == "val" and held is None:
            LOG.warning("no labelled anomalies to validate on: the training loss chooses")
        mode = config.contrastive.mode
        kind = parse_shift(config.contrastive.shift_trans_type if mode != "simclr" else "none")
        self.score = "simclr" if kind.count == 1 else "CSI"
        self.views = ViewSettings(
            base=kind.base,
            n_shifts=kind.count,
            n_samples=config.evaluation.select_ood_samples,
            crop_scale=SELECTION_CROP,
            seeding=config.evaluation.seeding,
            seed=config.seed,
            batch_size=config.evaluation.test_batch_size,
        )
        self.bad = BadImages(config.data.on_bad_image)
        self.num_workers = config.data.num_workers

    def values(self, encoder: Encoder, train_loss: float) -> dict[str, float]:
        """Mean one-class AUROC as {"CSI": …}, or minus the training loss as {"loss": …}."""
        if self.by == "last":
            return {}
        if self.sets is None:
            return {"loss": -train_loss}
        source = FeatureSource(
            encoder, self.views, self.device, bad=self.bad, num_workers=self.num_workers
        )
        normal, others = bank_scores(source, self.train, self.sets, self.score)
        return {self.score: compare(normal, others).one_class_mean}

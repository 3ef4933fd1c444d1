"""Golden checks of DIA: one function for each `dia_` prefix of the manifest's files."""

from collections.abc import Callable
from pathlib import Path

from tests.golden.golden_dia_diffusion import (
    check_beta_by_epoch,
    check_ddpm,
    check_dissolve_transform,
    check_schedules,
)
from tests.golden.golden_dia_scoring import (
    check_csi_scores,
    check_feature_order,
    check_other_scores,
    check_transforms,
)
from tests.golden.golden_dia_tools import Entry
from tests.golden.golden_dia_training import (
    check_contrastive,
    check_lars,
    check_lr_schedule,
    check_model,
    check_train_two_steps,
)
from tests.golden.golden_tools import Arrays

Check = Callable[[Path, Entry, Arrays], None]

CHECKS: dict[str, Check] = {
    "dia_ddpm_": check_ddpm,
    "dia_schedules": check_schedules,
    "dia_dissolve_transform": check_dissolve_transform,
    "dia_model_": check_model,
    "dia_contrastive": check_contrastive,
    "dia_transforms": check_transforms,
    "dia_csi_scores_": check_csi_scores,
    "dia_feature_order": check_feature_order,
    "dia_other_scores": check_other_scores,
    "dia_lars": check_lars,
    "dia_lr_schedule": check_lr_schedule,
    "dia_beta_by_epoch": check_beta_by_epoch,
    "dia_train_two_steps": check_train_two_steps,
}
"""check(folder, manifest entry, arrays) by the prefix of the file's name."""

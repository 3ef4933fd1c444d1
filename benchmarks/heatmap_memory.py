"""Memory that the fast engine needs for a large image, measured in a process of its own."""

import dataclasses
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks.heatmap_subject import METRICS, random_networks
from inpainter.completion import dropout_of
from inpainter.fast.scorer import FastScorer
from inpainter.heatmap import score_image
from inpainter.settings import PicardConfig

TISSUE = 32  # pixels a side: enough windows to fill every buffer more than once


def image_memory(
    config: PicardConfig, image_hw: tuple[int, int], batch: int, threads: int, device: torch.device
) -> dict[str, float]:
    """Peak memory of scoring an image with `image_hw` pixels, random weights.

    Only the windows around a spot of tissue are completed: memory depends on the batch, not on
    their number. Returns peak_memory_gib (of the process; on a GPU, of its tensors) and how many
    of the image's windows were completed. To be called before the caller grows: a child's peak on
    Linux is at least what its parent held when it started.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_score_here, config, image_hw, batch, threads, device).result()


def _score_here(
    config: PicardConfig, image_hw: tuple[int, int], batch: int, threads: int, device: torch.device
) -> dict[str, float]:
    torch.set_num_threads(threads)
    test = dataclasses.replace(
        config.test,
        heatmap_metrics=METRICS,
        parallel_batchsize=batch,
        patch_stride=config.test.mask_shape[0] // 4,
        heatmap_alignment="centred",
        only_check_nonblack_pixels=True,
        min_tissue_fraction=0.0,
        refine="off",
    )
    generator, critic = random_networks(config, 1.0, device)
    scorer = FastScorer(generator, critic, METRICS, test.mask_shape)
    dropout = dropout_of(generator, config.netG, test, 0, "benchmark")
    image = torch.zeros(test.patch_shape[2], *image_hw)
    top, left = (side // 2 for side in image_hw)
    image[:, top : top + TISSUE, left : left + TISSUE] = 0.5
    *_, result = score_image(image, scorer, test, dropout, device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"peak_memory_gib": peak, "windows": result.n_windows, "completed": result.n_scored}

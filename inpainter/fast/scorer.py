"""Scores windows as `inpainter.completion.WindowScorer` does, without its waste.

N windows, M completions, C channels, H x W window, h x w hole.
"""

import copy
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from common.devices import upcast_to_fp32
from inpainter.completion import FeatureNetwork, WindowScorer, score_windows
from inpainter.fast.geometry import whole
from inpainter.fast.layers import Arithmetic, Patch, drop_plan
from inpainter.fast.stages import FastCoarse, FastFine
from inpainter.fast.winograd import Workspace
from inpainter.networks.critic import Critic
from inpainter.networks.dropout import ElementMasks, WindowMasks
from inpainter.networks.generator import Generator, with_mask_planes
from inpainter.settings import Metric
from inpainter.windows import centre_mask

Precision = Literal["fp32", "bf16", "tf32", "fp64"]
DTYPES = {"bf16": torch.bfloat16, "fp64": torch.float64}

THIN_FROM_PIXELS = 128 * 128
"""Windows of at least this size are thinned one by one on a CPU: below, gathering the weights of
every window costs more than the convolutions that it saves."""


class FastScorer:
    """Scores windows by completion distance; called as WindowScorer is, with the same results.

    generator, feature_network, metrics, mask_hw: as of WindowScorer. precision: bf16 rounds
    activations and weights of generator and critic, softmax and norms stay in fp32; fp64 goes with
    networks and windows of that type, and tells rounding from a difference in what is computed.
    thin: leave dropped channels out window by window, None = where it is faster. minimal_filtering:
    see `inpainter.fast.winograd`. compiled: the attention goes through torch.compile.

    Where all windows of a batch drop the same channels (`masks.same`), these are left out of the
    convolutions. The weights are taken at the first call and not looked at again.
    """

    def __init__(
        self,
        generator: Generator,
        feature_network: FeatureNetwork | None,
        metrics: tuple[Metric, ...],
        mask_hw: tuple[int, int],
        *,
        precision: Precision = "fp32",
        thin: bool | None = None,
        minimal_filtering: bool = True,
        compiled: bool = False,
    ) -> None:
        self.plain = WindowScorer(generator, feature_network, metrics, mask_hw)
        self.generator = generator
        self.metrics, self.mask_hw = metrics, mask_hw
        self.spaces = self.plain.spaces
        self.thin, self.compiled = thin, compiled
        dtype = DTYPES.get(precision, torch.float32)
        self.feature_network = feature_network
        self.feature_dtype = torch.float64 if precision == "fp64" else torch.float32
        if isinstance(feature_network, Critic) and precision == "bf16":
            self.feature_network = copy.deepcopy(feature_network).to(dtype)
            self.feature_dtype = dtype
        self.arithmetic = Arithmetic(dtype, Workspace(), minimal_filtering)
        self.stages: dict[tuple[int, int], tuple[FastCoarse, FastFine | None]] = {}

    @torch.inference_mode()
    def __call__(
        self, windows: Tensor, masks: WindowMasks | None, *, more: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Scores of a batch, as WindowScorer's."""
        self.stages_for((windows.shape[2], windows.shape[3]))  # before threads ask for them
        if not self.one_by_one(windows):
            return score_windows(self, windows, masks, more=more)

        @torch.inference_mode()
        def score(i: int) -> dict[str, Tensor]:
            own_masks = None if masks is None else masks.of_window(i)
            return score_windows(self, windows[i : i + 1], own_masks, more=more)

        workers = torch.get_num_threads() if windows.device.type == "cpu" else 1
        in_parallel = workers > 1 and len(windows) > 1
        scores = list((self.threads.map if in_parallel else map)(score, range(len(windows))))
        return {key: torch.cat([each[key] for each in scores]) for key in scores[0]}

    def one_by_one(self, windows: Tensor) -> bool:
        """Whether windows are completed one at a time, so that each is thinned by its own masks."""
        if self.thin is not None:
            return self.thin
        large = windows.shape[2] * windows.shape[3] >= THIN_FROM_PIXELS
        return windows.device.type == "cpu" and large

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """Threads of one core each, which score a window each."""
        one_core = {"initializer": torch.set_num_threads, "initargs": (1,)}
        return ThreadPoolExecutor(torch.get_num_threads(), **one_core)

    def completions(self, windows: Tensor, masks: WindowMasks | None) -> Iterator[Tensor]:
        """The holes' completions, (N, C, h, w) each in fp32 or wider; one if nothing drops."""
        if isinstance(masks, ElementMasks):
            yield from self.plain.completions(windows, masks)
            return
        hw = (windows.shape[2], windows.shape[3])
        coarse, fine = self.stages_for(hw)
        # What all completions share.
        active = frozenset() if masks is None else frozenset(masks.keep)
        mask = centre_mask(hw, self.mask_hw, windows.device)
        planes = with_mask_planes(windows * (1 - mask), mask).to(self.arithmetic.dtype)
        known = Patch(planes.contiguous(memory_format=torch.channels_last), whole(hw), hw)
        prefix = coarse.prefix(known, active)
        around = fine.surroundings(known, active) if fine is not None else None
        # The completions, all from one coarse result where only fine layers drop.
        holes, like = None, windows.new_empty(0, dtype=self.arithmetic.dtype)
        for m in range(1 if masks is None else masks.M):
            plan = drop_plan(masks, m, like)
            if holes is None or not active.isdisjoint(coarse.chain.names):
                holes = coarse.complete(prefix, plan)
            yield upcast_to_fp32(holes if fine is None else fine.complete(around, holes, plan))

    def stages_for(self, window_hw: tuple[int, int]) -> tuple[FastCoarse, FastFine | None]:
        """Both stages for a size of window, planned at its first use."""
        if window_hw not in self.stages:
            sizes = (window_hw, self.mask_hw, self.arithmetic)
            coarse = FastCoarse(self.generator.coarse_generator, *sizes)
            fine = self.generator.fine_generator
            if fine is not None:
                fine = FastFine(fine, *sizes)
                if self.compiled:
                    fine.attend = torch.compile(fine.attend)
            self.stages[window_hw] = coarse, fine
        return self.stages[window_hw]

    def represent(self, holes: Tensor) -> dict[str, Tensor]:
        """Holes (N, C, h, w) as the metrics' spaces see them: pixels, features, or both.

        A critic's features are in the arithmetic's type, a pretrained network's not in bf16: its
        distances are small beside its features.
        """
        spaces = {}
        if "image" in self.spaces:
            spaces["image"] = holes
        if "feature" in self.spaces:
            spaces["feature"] = self.feature_network.features(holes.to(self.feature_dtype))
        return spaces

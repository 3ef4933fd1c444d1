"""A GPU that is pretended: tensors there have a shape and no values, those on the CPU are real.

with pretended_gpu():
    explain(replace(config, device="cuda"), ...)

As on a GPU, operations that mix devices are refused, and NumPy cannot read what lies there. What is
copied from it to the CPU, or read of it by item(), is made up: random numbers in [0, 1], or ones
where it has no fractions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import arg_tree_leaves, tree_map_only

ANSWERS = {
    "is_available": True,
    "device_count": 1,
    "get_device_name": "pretended",
    "get_rng_state_all": [],
    "get_device_properties": SimpleNamespace(total_memory=2**36),
    "is_bf16_supported": True,
    "synchronize": None,
    "max_memory_allocated": 2**20,
}
"""What torch.cuda is asked for."""


class _Fake(FakeTensorMode):
    avoid_device_init = True
    """Whatever torch.cuda answers: there is none to start."""

    def __deepcopy__(self, _: dict[int, object]) -> "_Fake":
        return self  # a copy of a network lies on the same GPU


class _Pretended(_Fake):
    """Gives what concerns the GPU to fake tensors, and leaves the rest as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.there = _Fake()
        self.numbers = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if not any(
            isinstance(x, FakeTensor) or _is_cuda(x) for x in arg_tree_leaves(*args, **kwargs)
        ):
            return func(*args, **kwargs)
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            return self.made_up(args[0]).item()
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs))
        with self.there:
            result = func(*args, **kwargs)
        if isinstance(result, FakeTensor) and result.is_cuda:
            return result
        return tree_map_only(FakeTensor, lambda x: x if x.is_cuda else self.made_up(x), result)

    def _fake(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self.there.from_tensor(x)

    def made_up(self, of: Tensor) -> Tensor:
        """Numbers in the place of those that a tensor has not, on the CPU."""
        if not of.is_floating_point():
            return torch.ones(of.shape, dtype=of.dtype)
        return torch.rand(of.shape, generator=self.numbers).to(of.dtype)


def _is_cuda(x: object) -> bool:
    return isinstance(x, torch.device) and x.type == "cuda"


def _load_values(*args: Any, load: Callable[..., Any] = torch.load, **kwargs: Any) -> Any:
    """torch.load, which would read no values where tensors may be fake."""
    with unset_fake_temporarily():
        return load(*args, **kwargs)


def _backward(loss: Tensor, *_: Any, inputs: Sequence[Tensor] | None = None, **__: Any) -> None:
    """Gradients of the right shape: autograd takes none on a GPU that is not there."""
    for leaf in _leaves(loss) if inputs is None else inputs:
        leaf.grad = torch.zeros_like(leaf)


def _leaves(of: Tensor) -> set[Tensor]:
    """The parameters that a tensor was made from."""
    nodes, found = {of.grad_fn}, set()
    while nodes - found:
        node = (nodes - found).pop()
        found.add(node)
        nodes |= {before for before, _ in node.next_functions if before is not None}
    return {node.variable for node in found if hasattr(node, "variable")}


def _grad(outputs: Tensor, inputs: Tensor, **_: Any) -> tuple[Tensor]:
    """torch.autograd.grad, likewise."""
    return (torch.zeros_like(inputs) + 0 * outputs.sum(),)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, there is a GPU."""
    gpu, save = _Pretended(), torch.save

    def save_values(content: object, *args: Any) -> None:
        save(tree_map_only(FakeTensor, gpu.made_up, content), *args)

    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, a=answer, **__: a))
        for where, name, stand_in in (
            (Tensor, "pin_memory", lambda x: x),
            (Tensor, "backward", _backward),
            (torch.autograd, "grad", _grad),
            (torch, "load", _load_values),
            (torch, "save", save_values),
        ):
            stack.enter_context(mock.patch.object(where, name, stand_in))
        stack.enter_context(gpu)
        yield

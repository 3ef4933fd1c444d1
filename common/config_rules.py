"""The rules that a setting's type may carry: `Annotated[int, AtLeast(1, 1000)]`.

They are checked by `common.config_types.check_fields` and shown by --help.
"""

import re
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Numbers from low to high; not a number is in no range."""

    low: float
    high: float
    ends: str = "[]"
    """Which ends belong to it, in the usual brackets: [) leaves the upper one out."""

    def __contains__(self, number: float) -> bool:
        above = number >= self.low if self.ends[0] == "[" else number > self.low
        below = number <= self.high if self.ends[1] == "]" else number < self.high
        return above and below

    def expected(self, number: float) -> str:
        """Completes "train.beta1: ..., got 2", for a number outside the range."""
        return f"must be {self}"

    def __str__(self) -> str:
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


class AtLeast(Range):
    """Numbers from low on; high keeps out only what no machine can do, and is not advertised."""

    def expected(self, number: float) -> str:
        return f"must be <= {self.high}" if number > self.high else f"must be {self}"

    def __str__(self) -> str:
        return f">= {self.low}" if self.ends[0] == "[" else f"> {self.low}"


@dataclass(frozen=True)
class TextRule:
    """What a text must look like."""

    pattern: re.Pattern[str]
    """Matches the whole of every allowed text."""
    expected: str
    """Completes "device: ..., got 'x'"."""
    longest: int = 4096
    """Most bytes in UTF-8."""

    def allows(self, text: str) -> bool:
        fits = len(text.encode("utf-8", "surrogatepass")) <= self.longest
        return fits and self.pattern.fullmatch(text) is not None


UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
ANY_TEXT = TextRule(
    re.compile(rf"[^{UNPRINTABLE}]*"),
    "must be text in UTF-8 without control characters, at most 4096 bytes",
)
PATH_TEXT = TextRule(re.compile(rf"[^{UNPRINTABLE}]+"), f"a path {ANY_TEXT.expected}, not empty")
NAME = TextRule(
    re.compile(rf"(?![. ])[^/\\{UNPRINTABLE}]+(?<! )"),
    "names a folder: 1 to 100 bytes in UTF-8, no slash, backslash or control character, no dot at "
    "the start, no blank at either end",
    longest=100,
)
DEVICE = TextRule(
    re.compile(r"auto|cpu|cuda|cuda:[0-9]{1,3}|mps"), "must be auto, cpu, cuda, cuda:1 (a number) "
    "or mps",
)  # fmt: skip

PathText = Annotated[str, PATH_TEXT]
"""Text that names a file or folder; see `common.config.resolve_path` for what it is relative to."""
NameText = Annotated[str, NAME]
"""Text that becomes the name of one folder, or a part of it."""
DeviceText = Annotated[str, DEVICE]
"""What `common.runtime.resolve_device` understands."""

# Upper ends are generous: nobody who has a machine for it is refused.
Seed = Annotated[int, Range(0, 2**63 - 1)]
Share = Annotated[float, Range(0, 1, "[)")]
"""A share, probability or decay below 1."""
PositiveShare = Annotated[float, Range(0, 1, "(]")]
"""A share that is not nothing and may be all."""
Weight = Annotated[float, AtLeast(0, 10**6)]
"""Weight of a term of a loss."""
LearningRate = Annotated[float, Range(1e-12, 1e38)]
"""What float32 holds; one that is too high ends in a loss that is not finite, with advice."""
GradientNorm = Annotated[float, Range(1e-8, 10**8)]
Steps = Annotated[int, AtLeast(1, 10**9)]
"""A number of steps, epochs or batches, or how many lie between two events."""
BatchSize = Annotated[int, AtLeast(1, 2**16)]
Pixels = Annotated[int, AtLeast(1, 2**14)]
"""A length in an image."""
Channels = Annotated[int, AtLeast(1, 2**12)]
"""The width of a network."""
Samples = Annotated[int, AtLeast(1, 10**4)]
"""How often one image, window or picture is repeated."""
Processes = Annotated[int, AtLeast(0, 1024)]
ClassNumber = Annotated[int, AtLeast(0, 10**6)]
WhiteValue = Annotated[int, AtLeast(1, 2**32)]
"""A stored pixel value."""

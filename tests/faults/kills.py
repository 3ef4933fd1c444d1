"""kill -9 at random moments of a program, which is then started again until it has ended."""

import random
import time
from functools import cache
from pathlib import Path

from tests.faults.programs import (
    PROGRAMS,
    assert_whole,
    place,
    run,
    started,
    undisturbed,
)
from tests.tiny_runs import assert_equal_states

KILLS_IN_A_ROW = 5


@cache
def seconds_of(name: str, root: Path) -> float:
    """How long the program takes."""
    program = PROGRAMS[name]
    with place(root, f"timed {name.replace('/', ' ')}") as folder:
        program.prepare(folder)
        begun = time.monotonic()
        assert run(program, folder).status == 0
        return time.monotonic() - begun


def kill_at_random(name: str, root: Path, number: int) -> int:
    """One run, killed again and again, ends with the results of one that was not: the kills."""
    program, chance = PROGRAMS[name], random.Random(f"{name} {number}")
    whole, seconds = undisturbed(name, root), seconds_of(name, root)
    kills = 0
    with place(root, f"killed {number}") as folder:
        program.prepare(folder)
        for _ in range(KILLS_IN_A_ROW):
            running = started(program, folder)
            running.child.join(chance.uniform(0, seconds))
            running.kill()
            kills += running.done().status < 0
            assert_whole(folder, at_rest=False)
        done = run(program, folder)
        assert done.status == 0, done.said
        assert_whole(folder, at_rest=True)
        assert_equal_states(dict(program.results(folder)), dict(whole))
    return kills

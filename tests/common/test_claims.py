"""Claims of files: one living process holds each, and a dead one's does not hold."""

import contextlib
import dataclasses
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from common.claims import SILENCE_SECONDS, Claim, Holder, claim, holder_of
from tests.tiny_runs import ended, forked, wait_until


def lock(folder: Path) -> Path:
    return folder / "run" / "writer.lock"


def written(path: Path, **changes: object) -> Holder:
    """The file of a claim of this process with some entries changed."""
    with claim(path) as claimed:
        holder = dataclasses.replace(claimed.holder, **changes)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def test_second_claim_is_refused_until_the_first_is_released(tmp_path: Path) -> None:
    first = claim(lock(tmp_path))
    assert isinstance(first, Claim)
    assert first.is_held()
    assert claim(lock(tmp_path)) is None
    assert holder_of(lock(tmp_path)).pid == os.getpid()
    first.release()
    assert list(tmp_path.iterdir()) == []  # the folder, too, which was made for it
    with claim(lock(tmp_path)):
        (tmp_path / "run" / "result").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]


def test_claim_is_released_by_an_interrupt(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), claim(lock(tmp_path)):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def hold(path: Path) -> None:
    claim(path)
    time.sleep(600)


def test_claim_of_a_living_process_holds_and_that_of_a_killed_one_does_not(tmp_path, caplog):
    caplog.set_level("INFO")
    child = forked(partial(hold, lock(tmp_path)))
    wait_until(lambda: (holder := holder_of(lock(tmp_path))) and holder.pid == child.pid)
    assert claim(lock(tmp_path)) is None
    os.kill(child.pid, signal.SIGKILL)
    ended(child)
    with claim(lock(tmp_path)) as claimed:
        assert claimed.holder.pid == os.getpid()
        assert f"process {child.pid} on " in caplog.text
        assert [path.name for path in lock(tmp_path).parent.iterdir()] == ["writer.lock"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no start times of processes")
def test_number_that_belongs_to_another_process_by_now_does_not_hold(tmp_path: Path) -> None:
    written(lock(tmp_path), started=1)
    assert claim(lock(tmp_path)) is not None


@pytest.mark.parametrize("other", [{"machine": "another one", "pid": 1}, None])
def test_claim_of_another_machine_holds_until_it_is_silent(tmp_path: Path, other) -> None:
    path = lock(tmp_path)
    if other is None:  # a kill left the file empty
        path.parent.mkdir()
        path.touch()
    else:
        written(path, **other)
    now = time.time()
    os.utime(path, (now, now - SILENCE_SECONDS + 30))
    assert claim(path) is None
    os.utime(path, (now, now - SILENCE_SECONDS - 30))
    with claim(path) as claimed:
        assert claimed.is_held()


def test_claim_that_was_lost_is_left_to_its_new_holder(tmp_path: Path) -> None:
    lost = claim(lock(tmp_path))
    lock(tmp_path).unlink()
    with claim(lock(tmp_path)) as new:
        assert not lost.is_held()
        lost.release()
        assert new.is_held()


def take(folder: Path, number: int) -> None:
    """Claims 20 paths, waiting at none, and notes those that it got."""
    wait_until(lambda: (folder / "go").exists())
    got = [n for n in range(20) if claim(folder / f"{n}.lock") is not None]
    (folder / f"{number}.json").write_text(json.dumps(got))
    wait_until(lambda: len(list(folder.glob("*.json"))) == 4)


def test_of_processes_that_take_over_dead_claims_together_one_gets_each(tmp_path: Path) -> None:
    for number in range(20):
        written(tmp_path / f"{number}.lock", started=1)
    children = [forked(partial(take, tmp_path, number)) for number in range(4)]
    (tmp_path / "go").touch()
    assert [ended(child) for child in children] == [0] * 4
    got = [n for path in tmp_path.glob("*.json") for n in json.loads(path.read_text())]
    assert sorted(got) == list(range(20))


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(OSError, match="run"):
        claim(lock(tmp_path))

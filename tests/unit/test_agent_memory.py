"""Each want of memory is told once; a group that is gone disturbs nobody. What wakes the watcher is the kernel: see
tests/integration/test_agent.py.
"""

from pathlib import Path

import pytest
from pymicro.agent.memory import Watch, Watcher, killed


@pytest.mark.parametrize(
    ("text", "count"), [("oom 1\noom_kill 0\n", 0), ("oom_kill 2\n", 2), ("", 0), ("oom_kill x\n", 0)]
)
def test_count(text: str, count: int) -> None:
    assert killed(text) == count


def test_what_was_before_is_not_told_and_each_growth_is_once(tmp_path: Path) -> None:
    told: list[str] = []
    events = tmp_path / "memory.events"
    events.write_text("oom_kill 3\n")
    watch = Watch(str(tmp_path), lambda: told.append(events.read_text()))

    watch.look()
    assert told == []
    for text in ("oom_kill 4\n", "oom_kill 9\n"):
        events.write_text(text)
        watch.look()
        watch.look()
    assert told == ["oom_kill 4\n", "oom_kill 9\n"]
    watch.close()


def test_a_closed_watch_tells_nothing(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("oom_kill 0\n")
    told: list[int] = []
    watch = Watch(str(tmp_path), lambda: told.append(1))
    watch.close()
    watch.close()
    events.write_text("oom_kill 1\n")
    watch.look()
    assert told == []


def test_a_group_without_a_count_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Watch(str(tmp_path), lambda: None)


def test_a_watch_that_was_never_added_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("oom_kill 0\n")
    watch = Watch(str(tmp_path), lambda: None)
    Watcher().remove(watch)
    assert watch.fd < 0

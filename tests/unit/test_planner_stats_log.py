"""What the planner writes down survives its death at any moment."""

from __future__ import annotations

from pathlib import Path

import msgspec

from planner.collector import NOTHING_YET, Collector, Totals
from planner.stats_log import StatsLog
from shared.messages import PlannerStats


def stats_with(num_rounds: int) -> PlannerStats:
    totals = msgspec.structs.replace(NOTHING_YET, num_rounds=num_rounds)
    return Collector(totals, 0.0).stats(1.0)


def with_rounds(num_rounds: int) -> Totals:
    return msgspec.structs.replace(NOTHING_YET, num_rounds=num_rounds)


def test_an_empty_folder_has_no_totals(tmp_path: Path) -> None:
    assert StatsLog(tmp_path / "planner").read_totals() == NOTHING_YET


def test_the_last_line_is_read_back(tmp_path: Path) -> None:
    log = StatsLog(tmp_path)
    log.append(stats_with(3))
    log.append(stats_with(7))
    assert StatsLog(tmp_path).read_totals() == with_rounds(7)
    lines = log.path.read_bytes().splitlines()
    assert [msgspec.json.decode(line, type=PlannerStats).num_rounds for line in lines] == [3, 7]


def test_a_torn_last_line_is_passed_over_and_not_glued_to_the_next(tmp_path: Path) -> None:
    log = StatsLog(tmp_path)
    log.append(stats_with(3))
    log.append(stats_with(4))
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-40])  # killed in the middle of a write
    restarted = StatsLog(tmp_path)
    assert restarted.read_totals() == with_rounds(3)
    restarted.append(stats_with(5))
    assert StatsLog(tmp_path).read_totals() == with_rounds(5)


def test_strangers_lines_are_passed_over(tmp_path: Path) -> None:
    log = StatsLog(tmp_path)
    log.append(stats_with(2))
    with log.path.open("ab") as file:
        file.write(b'{}\n{"num_rounds": "many"}\n\xff\xfe\n')
    assert log.read_totals() == with_rounds(2)


def test_the_file_is_rotated_and_totals_are_found_in_the_one_before(tmp_path: Path) -> None:
    line_bytes = len(msgspec.json.encode(stats_with(1))) + 1
    log = StatsLog(tmp_path, max_bytes=2 * line_bytes)
    for num_rounds in range(1, 8):
        log.append(stats_with(num_rounds))
    assert log.path.stat().st_size <= 2 * line_bytes
    assert log.previous_path.stat().st_size <= 2 * line_bytes
    assert log.read_totals() == with_rounds(7)
    log.path.unlink()  # killed between the rotation and the next line
    assert StatsLog(tmp_path).read_totals() == with_rounds(6)

"""The six invariants of model hopper parallelism, checked against the machine's memory.

1. completeness: per epoch a trial visits every shard exactly once;
2. isolation: a trial runs on at most one worker at a time;
3. exclusivity: a worker runs at most one job at a time;
4. no preemption inside a unit: what runs is on a worker that is there, in the job that it was started in;
5. a unit is committed exactly once;
6. a unit starts only from the state its predecessor committed.

What cannot be seen from one moment (that nothing was committed twice along the way) shows here as a count that does not
fit; the tests prove it once more, from the orders and reports alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NoReturn

from cerebro_tune.errors import InvariantError
from cerebro_tune.instructions import StartJob
from cerebro_tune.roster import Job, Seat, TrialRecord
from cerebro_tune.units import Status


def check_all(
    records: Mapping[str, TrialRecord], seats: Mapping[int, Seat], jobs: Mapping[int, Job], shards: int
) -> None:
    """Raise InvariantError, with the story of the trial concerned, when one does not hold."""
    for record in records.values():
        check_visits(record, shards)
    check_jobs(records, seats, jobs)


def check_visits(record: TrialRecord, shards: int) -> None:
    """Completeness and exactly-once: as many units are committed as shards are marked visited, epoch by epoch."""
    total = record.trial.epochs * shards
    visited = shards - record.left.bit_count() if record.units_left else 0
    if record.units_done != record.epoch * shards + visited:
        _broken(record, f"completeness: {record.units_done} units committed, {record.epoch} epochs and {visited} seen")
    if record.units_done + record.units_left != total:
        _broken(record, f"exactly once: {record.units_done} units done and {record.units_left} left are not {total}")
    if (record.status is Status.FINISHED) and record.units_left:
        _broken(record, f"completeness: finished with {record.units_left} units left")


def check_jobs(records: Mapping[str, TrialRecord], seats: Mapping[int, Seat], jobs: Mapping[int, Job]) -> None:
    """Isolation, exclusivity, no preemption, and the right predecessor."""
    busy = Counter(job.runner.id for job in jobs.values())
    placed = Counter(unit.trial for job in jobs.values() for unit in job.open)
    for job in jobs.values():
        for unit in job.open:
            record = records[unit.trial]
            if placed[unit.trial] > 1:
                _broken(record, f"isolation: in {placed[unit.trial]} jobs")
            runner = job.runner
            if busy[runner.id] > 1 or runner.running is not job or job.seat.job is not job:
                _broken(record, f"exclusivity: {runner.id} runs {busy[runner.id]} jobs")
            if not runner.present or seats.get(runner.id.number) is not runner or record.job is not job:
                _broken(record, f"no preemption: {unit} runs on {runner.id}, which does not run it")
            if unit.epoch != record.epoch or not record.left >> unit.shard & 1 or not job.held >> unit.shard & 1:
                _broken(record, f"completeness: {unit} runs and is not to be visited there")
            _check_start(record, job)
    for record in records.values():
        if (record.status is Status.RUNNING) is not (placed[record.trial.id] == 1 or _is_early(record)):
            _broken(record, f"isolation: {record.status.value}, and in {placed[record.trial.id]} jobs")


def _is_early(record: TrialRecord) -> bool:
    """Whether the trial's result waits for its turn on the logical clock."""
    return record.job is not None and any(event.unit.trial == record.trial.id for event in record.job.early)


def _check_start(record: TrialRecord, job: Job) -> None:
    start = next((row.what for row in reversed(record.story) if isinstance(row.what, StartJob)), None)
    if start is None:
        return  # so many wishes came during this unit that its start is out of the story
    version = {unit.trial: version for unit, version in zip(start.units, start.versions, strict=True)}[record.trial.id]
    if start.job != job.number or version != record.units_done:
        _broken(record, f"predecessor: job {job.number} began at version {version}, committed is {record.units_done}")


def _broken(record: TrialRecord, what: str) -> NoReturn:
    story = "\n".join(map(str, record.story))
    raise InvariantError(f"trial {record.trial.id!r}, {what}. This is a defect of cerebro_tune; its story:\n{story}")

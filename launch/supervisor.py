"""Inside a job: one stage, attempt after attempt, until it is done or there is a verdict.

A supervisor runs once a job, beside the ranks and not in them: it starts them, learns from each how it ended, and
decides what follows: the same again, back into the queue, or the end. It holds no state that a kill could lose: what
it knows is in the record's files, and where the stage goes on is found by the stage itself.
"""

import contextlib
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from cxr_vae.stopping import SIGNALS, STOPPED_EXIT_CODE
from launch.rank import VISIBLE_S
from launch.records import Attempt, RankEnd, Record
from launch.stages import Stage
from launch.starters import Processes, Starter

MAX_CRASHES = 2
"""In a row without progress: then it is no accident."""

MAX_FRUITLESS = 20
"""Attempts in a row of whatever end without progress."""

MAX_LOSSES = 10
"""In a row without progress, of ranks that were never heard of: a node that is down may be given again a few times."""

EXIT_CODES = {"done": 0, "mistake": 2, "stopped": STOPPED_EXIT_CODE, "cancelled": STOPPED_EXIT_CODE}
"""Of a job by the outcome of its last attempt; 1 for any other."""

PAUSE_S = 1.0
"""Before another attempt in the same place."""


@dataclass
class Supervisor:
    """Runs a stage to its end. `margin_s` before a time limit the ranks are told to stop."""

    stage: Stage
    starter: Starter
    margin_s: float = 0.0
    _children: Processes = ()
    _told: int = 0
    """The last signal that came."""

    def run(self) -> int:
        """The job's exit code: 0 done, 2 a mistake of the user's, 75 stopped, 1 anything else."""
        record = Record.read(self.stage.record_path(self.starter.job))
        with self._signals_passed_on():
            while True:
                if record.cancelled or self.starter.is_cancelled():
                    say(f"{self.stage.name}: cancelled")
                    return STOPPED_EXIT_CODE
                outcome = self.attempt(record)
                following = record.attempts[-1].next
                if following == "again":
                    time.sleep(PAUSE_S)
                    if self._told and not self.starter.can_requeue:
                        return STOPPED_EXIT_CODE
                elif following == "requeue":
                    return self.requeue(record)
                else:
                    return EXIT_CODES.get(outcome, 1)

    def attempt(self, record: Record) -> str:
        """Runs the ranks once; records how they ended and what follows."""
        stage = self.stage
        attempt = record.begin(socket.gethostname(), stage.progress(), self.starter.allocation)
        at_once = self.starter.on_terminal and attempt.number == 1
        more = f", attempt {attempt.number} on {attempt.host}{stage.describe_progress()}"
        say(f"\n── {stage.name} ──" if at_once else f"── {stage.name}{more}")
        ends = record.ranks(attempt.number)
        self._children = self.starter.start(stage, ends)
        if self._told:  # while nobody was there to be told
            self._stop()

        def ended() -> list[RankEnd]:
            return record.rank_ends(attempt.number, stage.num_ranks)

        codes = self.starter.wait(self._children, lambda: any(end.code for end in ended()))
        deadline = time.monotonic() + (VISIBLE_S if codes and not any(codes) else 0)
        outcome, why = judge(ended(), stage.num_ranks, codes)
        while outcome == "lost" and time.monotonic() < deadline:
            time.sleep(1)  # all went well: what ranks of other nodes wrote is not to be seen here yet
            outcome, why = judge(ended(), stage.num_ranks, codes)
        if outcome != "done" and (record.cancelled or self.starter.is_cancelled()):
            outcome = "cancelled"
        near_limit = outcome != "done" and self.is_near_limit()
        if outcome == "stopped" and near_limit:
            why = "the time limit was near"
        attempt.outcome, attempt.progress_at_end = outcome, stage.progress()
        following, verdict = decide(record.attempts, can_requeue=self.starter.can_requeue, near_limit=near_limit)
        record.end(outcome, "; ".join(filter(None, [why, verdict])), stage.progress(), following)
        if not self.starter.on_terminal or outcome != "done":
            reason = record.attempts[-1].why or "by every rank"
            say(f"── {stage.name} {outcome}{stage.describe_progress()}: {reason}")
        return outcome

    def is_near_limit(self) -> bool:
        """Whether so little time is left that the ranks were, or would be at once, told to stop."""
        left = self.starter.left_s()
        return left is not None and left <= self.margin_s

    def _stop(self) -> None:
        for child in self._children:
            if child.poll() is None:
                self.starter.stop(child, self._told)

    def requeue(self, record: Record) -> int:
        """Leaves the rest to the next start of this job."""
        trouble = self.starter.requeue()
        if trouble is not None:
            record.end("stopped", f"it can't go back into the queue: {trouble}", self.stage.progress(), "end")
            say(f"── this job can't go back into the queue ({trouble}): submit the same again, it goes on where it was")
            return 1
        say("── back into the queue")
        deadline = time.monotonic() + 600
        while self._told != signal.SIGTERM and time.monotonic() < deadline:
            time.sleep(PAUSE_S)  # until Slurm has told us to end: to return before would look like the job's own end
        return STOPPED_EXIT_CODE

    @contextlib.contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def handle(number: int, frame: FrameType | None) -> None:
            self._told = number
            self._stop()

        previous = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def judge(ends: Sequence[RankEnd], num_ranks: int, codes: Sequence[int]) -> tuple[str, str]:
    """How an attempt ended, and why, from every rank's word in the order of time: not from the job's state alone.

    `codes` are those of the processes that were started (Slurm's srun, or the ranks' own), for where the ranks could
    leave no word; there are none where these processes don't end. The rank that ended first tells why: what came after
    may be its consequence.
    """
    stops = [STOPPED_EXIT_CODE, *(-number for number in SIGNALS), *(128 + number for number in SIGNALS)]
    if not codes:
        return "lost", "some ranks don't end and can't be ended"
    failed = [end for end in ends if end.code not in (0, None)]
    silent = num_ranks - sum(end.code is not None for end in ends)
    if not failed and not silent:
        return "done", ""
    if not ends:  # none could leave a word, as on a full disk
        code = max(codes, key=abs)
        known = {0: "done", 2: "mistake", STOPPED_EXIT_CODE: "stopped"}
        return known.get(code, "crashed"), f"exit code {code}, and no rank left word: see the job's log"
    if not failed:
        return "lost", f"{silent} of {num_ranks} ranks left no word"
    first = failed[0]
    who = f"rank {first.rank} on {first.host}"
    if first.code == 2:
        return "mistake", f"{who} met what you can mend: see its log"
    if first.code in stops:
        return "stopped", "told to stop"
    assert first.code is not None
    killed = f"was killed by {signal.Signals(-first.code).name}" if first.code < 0 else None
    how = killed or f"ended with exit code {first.code}"
    return "crashed", f"{who} {how}"


def decide(attempts: Sequence[Attempt], *, can_requeue: bool, near_limit: bool) -> tuple[str, str]:
    """What follows the last attempt (`again`, `requeue` or `end`), and why where it is the end."""
    last = attempts[-1]
    if last.outcome in ("done", "cancelled"):
        return "end", ""
    if last.outcome == "mistake":
        return "end", "it would meet the same again"
    if last.outcome == "stopped":
        if not can_requeue:
            return "end", "start it again to go on"
        here = [attempt for attempt in attempts if attempt.allocation == last.allocation]
        if near_limit and not any(attempt.advanced for attempt in here):
            return "end", "a whole time limit brought it no step further: raise resources.hours"
    outcomes = fruitless(attempts)
    limits = {"crashed": MAX_CRASHES, "lost": MAX_LOSSES}
    if len(outcomes) >= MAX_FRUITLESS or any(outcomes.count(one) >= limit for one, limit in limits.items()):
        return "end", f"{len(outcomes)} times in a row without progress: see the ranks' logs"
    if last.outcome == "stopped":
        return "requeue", ""
    if can_requeue and (near_limit or last.outcome == "lost"):
        return "requeue", ""
    return "again", ""


def fruitless(attempts: Sequence[Attempt]) -> list[str]:
    """The outcomes of those since the last that brought the stage on; those that were cut off don't count."""
    outcomes: list[str] = []
    for attempt in reversed(attempts):
        if attempt.advanced:
            break
        outcomes += [attempt.outcome] if attempt.outcome else []
    return outcomes


def say(text: str) -> None:
    """A line of the job's log, as long as its disk takes it."""
    with contextlib.suppress(OSError):
        print(text, flush=True)

"""Talking to Slurm through its own commands. That Slurm doesn't answer is an answer here, not an error."""

import getpass
import os
import re
import shutil
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass

ANSWER_S = 60.0
"""How long a command may take; a controller that is away makes them wait for minutes."""

REQUEUE_FOR_S = 900.0
"""How long a requeue is tried: a controller may be restarted meanwhile."""

NEVER = re.compile(
    "AccountNotAllowed|BadConstraints|DependencyNeverSatisfied|InvalidAccount|InvalidQOS|JobHeldAdmin|MaxMemPerLimit"
    "|Partition(Config|Down|Inactive|NodeLimit|TimeLimit)|QOS(NotAllowed|TimeLimit|Min)"
    r"|(Assoc|QOS)Max\w+Per(Job|Node)|(Assoc|QOS)MaxWallDuration"
)
"""Beginnings of squeue's reasons for which a job may wait for ever: what it asks for, not what others have just now."""


@dataclass(frozen=True)
class Queued:
    """A job as squeue shows it."""

    state: str
    """PENDING, RUNNING, COMPLETING …"""
    reason: str
    left_s: float | None
    """Until its time limit; None: no limit, or not known."""

    @property
    def may_wait_for_ever(self) -> bool:
        """Whether Slurm holds it back for something that time alone doesn't change."""
        return self.state == "PENDING" and NEVER.match(self.reason) is not None


def ask(*command: str) -> str | None:
    """What a command prints; None where it fails, takes too long or isn't there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def controller_answers() -> bool:
    """Whether there is a cluster to submit to: its controller answers, not only its commands are installed."""
    return shutil.which("sbatch") is not None and ask("sinfo", "--noheader") is not None


def queue(users: Collection[str] = ()) -> dict[str, Queued] | None:
    """My jobs and those of `users` in the queue by job id, of arrays as `12_3`; None where the controller is silent."""
    others = set(users) - {getpass.getuser()} if users else set()
    whose = f"--user={','.join([str(os.getuid()), *sorted(others)])}" if others else "--me"
    answer = ask("squeue", whose, "--noheader", "--array", "--format=%i|%T|%r|%L")
    if answer is None:
        return None
    rows = [line.split("|") for line in answer.splitlines() if line.count("|") == 3]
    return {job: Queued(state, reason, seconds(left)) for job, state, reason, left in rows}


def accounting(jobs: list[str]) -> dict[str, str] | None:
    """What sacct says of jobs, as `NODE_FAIL`; None where there is no accounting or it doesn't answer."""
    columns = ("--allusers", "--noheader", "--parsable2", "--allocations", "--format=JobID,State")
    answer = ask("sacct", *columns, f"--jobs={','.join(jobs)}")
    if answer is None:
        return None
    return {job: state for job, _, state in (line.partition("|") for line in answer.splitlines())}


def seconds(text: str) -> float | None:
    """`1-02:03:04`, `03:04` or `INVALID` as seconds."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]):
        return None
    total = 0
    for part in parts:
        total = total * 60 + int(part)
    return float(total + 86400 * int(days or 0))


def job_id() -> str:
    """Of the job this process is in, as squeue shows it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def job_fields(job: str) -> dict[str, str]:
    """What scontrol shows of a job, by its names, such as JobState; empty where it doesn't answer."""
    answer = ask("scontrol", "show", "job", "--oneliner", job)
    return dict(field.partition("=")[::2] for field in (answer or "").split())


def is_cancelled(fields: dict[str, str], restarts: int) -> bool:
    """Whether someone has used scancel on a job with these fields that was started `restarts` times before.

    While it is cleaned up Slurm shows COMPLETING for it as for one that it requeues or whose time is up; those have
    another count or a reason. A requeue would bring it back to life.
    """
    if fields.get("JobState") != "COMPLETING":
        return fields.get("JobState") == "CANCELLED"
    return fields.get("Reason") == "None" and fields.get("Restarts") == str(restarts)


def requeue(job: str, restarts: int) -> str | None:
    """Puts a job back into the queue; tries again while the controller is away. None, or why it didn't work.

    Looks before each try: one that was cancelled must not come back to life.
    """
    deadline = time.monotonic() + REQUEUE_FOR_S
    trouble = "Slurm's controller doesn't answer"
    while time.monotonic() < deadline:
        fields = job_fields(job)
        if is_cancelled(fields, restarts):
            return "it is cancelled"
        if fields:
            try:
                call = ["scontrol", "requeue", job]
                done = subprocess.run(call, capture_output=True, text=True, timeout=ANSWER_S, check=False)
                trouble = done.stderr.strip() or f"exit code {done.returncode}"
                if done.returncode == 0 or "already" in trouble.lower() or "pending" in trouble.lower():
                    return None  # Slurm may have been first
                if "disabled" in trouble.lower():
                    break
            except (OSError, subprocess.SubprocessError) as error:
                trouble = str(error)
        time.sleep(5)
    return trouble


def cancel(jobs: list[str]) -> str | None:
    """Ends jobs; None, or what scancel says."""
    try:
        done = subprocess.run(["scancel", *jobs], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return done.stderr.strip() or None if done.returncode else None

"""What a job needs, checked: `cxr-launch doctor`. One line a check, and with what is amiss what to do about it."""

import platform
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxr_vae.config import Config, ResourcesConfig
from cxr_vae.console import counted
from cxr_vae.errors import UserError
from cxr_vae.locks import DirectoryLock
from cxr_vae.run_dir import git_revision
from launch import probe, slurm_commands
from launch.findings import (
    FAIL,
    OK,
    WARN,
    Finding,
    Words,
    by_node,
    clock_finding,
    folder_finding,
    name_finding,
    of_two_processes,
    space_finding,
    together_finding,
    torch_finding,
    torch_of_node,
)
from launch.logs import Tail
from launch.probe import Probe
from launch.profiles import Profile, gpus_of, load_profile, sbatch_options, shape_of
from launch.rank import VISIBLE_S
from launch.slurm_findings import controller_finding, of_slurm
from launch.slurm_queue import Slurm
from launch.stages import Stage

MINUTES = 10
"""Time limit of the job on the nodes, which takes one where nothing is amiss."""

WAIT_S = 420.0
"""How long it may wait in the queue, and then how long it may run."""


def examine(where: str | None, profile_name: str | None, nodes: int, folder: Path) -> int:
    """Prints a line for each check, as soon as it is known; exit code 1 where one failed."""
    from launch.submission import choose_cluster

    where = where or choose_cluster(profile_name)
    if where != "slurm" and nodes > 1:
        raise UserError(f"--nodes={nodes}: this is one machine; use --cluster slurm")
    profile = load_profile(profile_name)
    levels = set()
    for finding in findings(where, profile, profile_name, nodes, folder):
        print(finding, flush=True)
        levels.add(finding.level)
    return int(FAIL in levels)


def findings(where: str, profile: Profile, profile_name: str | None, nodes: int, folder: Path) -> Iterator[Finding]:
    """All checks, the cheap ones first."""
    yield from of_this_machine(folder, computes=where != "slurm")
    if where != "slurm":
        yield of_two_processes()
        return
    controller = controller_finding()
    yield controller
    if controller.level == OK:
        yield from of_slurm(profile, nodes)
        yield from of_nodes(profile, profile_name, nodes, folder)


def of_this_machine(folder: Path, *, computes: bool) -> Iterator[Finding]:
    """What needs no queue."""
    yield Finding(OK, f"Python {platform.python_version()} at {sys.executable}")
    driver = probe.look_at_driver()
    yield torch_finding(probe.look_at_torch(), driver, driver["gpus"] if computes else None)
    yield weights_finding()
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.is_dir())
    yield space_finding(f"{folder} has", shutil.disk_usage(there).free / 1e9)
    yield code_finding(git_revision())


def weights_finding() -> Finding:
    """Whether an evaluation has the Inception weights."""
    from cxr_vae.evaluation.inception_weights import cache_path, find_weights

    try:
        found = find_weights()
    except UserError as error:
        return Finding(WARN, str(error))
    if found is None:
        remedy = "run `cxr-vae fetch-weights` where there is internet; without: features=random, which is no FID"
        return Finding(WARN, f"no Inception weights in {cache_path().parent}", remedy)
    return Finding(OK, f"Inception weights at {found}")


def code_finding(revision: str | None) -> Finding:
    """Whether a run could say what it ran."""
    if revision is None:
        return Finding(OK, "the code is no git checkout: runs won't record its revision")
    if revision.endswith("-dirty"):
        remedy = "jobs run what is on the disk when they start: commit, and edit in another checkout"
        return Finding(WARN, f"the checkout at {revision[:9]} has uncommitted changes", remedy)
    return Finding(OK, f"the code is at {revision[:9]}, without changes")


def of_nodes(profile: Profile, profile_name: str | None, nodes: int, folder: Path) -> Iterator[Finding]:
    """What a real job sees."""
    from launch.submission import check_shared

    config = Config(resources=ResourcesConfig(nodes=nodes))
    try:
        if not profile.shared_disks:
            check_shared(folder)
        shape = shape_of(config, profile, profile_name)
    except UserError as error:
        yield Finding(FAIL, str(error))
        return
    options = sbatch_options(config, profile, gpus=gpus_of(config, profile))
    scratch = folder.absolute() / f".doctor-{secrets.token_hex(4)}"
    stage = Stage("doctor", (), scratch, scratch, shape.nodes, shape.ranks_per_node, shape.cpus_per_rank)
    trial = Trial(Slurm(profile, options, MINUTES), stage, secrets.token_hex(16))
    try:
        yield from trial.findings(profile.gpus_per_node)
    except UserError as error:  # Slurm's own words
        yield Finding(FAIL, str(error), "change the profile, or --nodes")
    except OSError as error:
        yield Finding(FAIL, f"{folder}: {error.strerror}", "name a folder you may write into, with --folder")
    finally:
        trial.end()


@dataclass
class Trial:
    """One job on the nodes, in a folder of its own."""

    cluster: Slurm
    stage: Stage
    token: str
    words: Words = field(default_factory=Words)
    job: str = ""
    waiting_at: float = 0.0
    """When the job was last seen waiting."""
    keep: bool = False
    """The folder, for the log in it."""

    def findings(self, gpus: int) -> Iterator[Finding]:
        """Submits it, waits for it, and says what the nodes told."""
        folder = self.stage.run
        self.stage.run_dir.logs.mkdir(parents=True)
        (folder / "token").write_text(self.token)
        for rank in range(self.stage.num_ranks):
            (folder / f"rank{rank}").write_text("to be replaced")
        lock = DirectoryLock(folder)
        self.job = self.submit()
        yield Finding(OK, f"job {self.job} is queued, to look at {counted(self.stage.nodes, 'node')}")
        trouble = self.wait()
        lock.release()
        if trouble is not None:
            yield trouble
        if self.words.reports or trouble is None:
            self.words.see_files(folder, self.token)
            yield from self.judge(gpus)

    def submit(self) -> str:
        """Queues it with the options of the stages, but to run once only; returns its id."""
        parameters: dict[str, Any] = self.cluster.parameters(self.stage, None) | {"job_name": "cxr-doctor"}
        del parameters["additional_parameters"]["requeue"]
        parameters["additional_parameters"]["no-requeue"] = True
        self.waiting_at = time.time()
        return self.cluster.queue(Probe(self.stage, self.cluster.starter), self.stage, parameters)

    def wait(self) -> Finding | None:
        """Until it has ended; None, or why that isn't waited for."""
        tail, since = Tail(self.stage.run / "words"), dict[str, float]()
        trouble = None
        while trouble is None and not (self.stage.run / "ended").exists():
            time.sleep(1)
            self.words.take(tail.new_lines(), time.time())
            looked, queue = time.time(), slurm_commands.queue()
            mine = (queue or {}).get(self.job)
            state = mine.state if mine else "gone" if queue is not None else "not known"
            age = time.monotonic() - since.setdefault(state, time.monotonic())
            if mine is not None and state in ("PENDING", "CONFIGURING"):
                self.waiting_at = looked
                trouble = self.waits(mine, age)
            elif state in ("gone", "COMPLETING"):
                state = slurm_commands.job_fields(self.job).get("JobState", "not known")
                if age > (VISIBLE_S if state == "COMPLETED" else 5):
                    trouble = self.failed(f"job {self.job} ended as {state} before it had told all")
            elif age > WAIT_S:
                trouble = self.failed(f"job {self.job} does not end")
        self.words.take(tail.new_lines(), time.time())
        return trouble

    def waits(self, queued: slurm_commands.Queued, age: float) -> Finding | None:
        """Where it has waited long enough, what Slurm says."""
        never = queued.may_wait_for_ever
        if age < (10 if never else WAIT_S):
            return None
        text = f"the nodes were not looked at, the job still waits: Slurm says {queued.reason}"
        return Finding(FAIL if never else WARN, text, "ask for fewer nodes, for another partition, or later again")

    def failed(self, text: str) -> Finding:
        """With where to see more, which stays there."""
        logs = self.stage.run_dir.logs
        self.keep = any(logs.iterdir())
        nowhere = f"do the nodes see {logs.parents[1]}? Name a folder with --folder that all machines see"
        remedy = f"see {logs}" if self.keep else nowhere
        return Finding(FAIL, f"{text}{self.words.last_noise(logs)}", remedy)

    def judge(self, gpus: int) -> Iterator[Finding]:
        """What follows from the words of the ranks."""
        reports = {node: report for node, report in self.words.reports.items() if "node" in report}
        folder, num_ranks = self.stage.run.parent, self.stage.num_ranks
        same_disk = [one["folder"] for one in reports.values() if one.get("folder", {}).get("token") == self.token]
        for facts in same_disk:  # looked at at different moments
            facts["free_gb"] = min(one["free_gb"] for one in same_disk)
        silent = self.stage.nodes - len(reports)
        if silent:
            yield self.failed(f"{silent} of {counted(self.stage.nodes, 'node')} left no word")
        yield from by_node(reports, lambda one: Finding(OK, f"Python {one['node']['python']}"))
        yield from by_node(reports, lambda one: torch_of_node(one, gpus))
        yield from by_node(reports, lambda one: folder_finding(one, folder, self.token))
        yield from by_node(reports, lambda one: clock_finding(one, self.waiting_at))
        torch = [one.get("torch", {}) for one in reports.values()]
        if num_ranks > 1 and torch and not any("error" in one for one in torch):
            yield from by_node(reports, name_finding)
            yield together_finding("gloo", self.words.together["gloo"], num_ranks)
            if any(one.get("gpus") for one in torch):
                yield together_finding("nccl", self.words.together["nccl"], num_ranks)

    def end(self) -> None:
        """Leaves neither job nor files, but for the log of one that went wrong."""
        if self.job and not (self.stage.run / "ended").exists():
            slurm_commands.cancel([self.job])
        if not self.keep:
            shutil.rmtree(self.stage.run, ignore_errors=True)

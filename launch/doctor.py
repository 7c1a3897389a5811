"""What a job needs, checked: `cxr-launch doctor`. One line a check, and with what is amiss what to do about it."""

import getpass
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxr_vae.config import Config, ResourcesConfig
from cxr_vae.errors import UserError
from cxr_vae.locks import DirectoryLock
from cxr_vae.run_dir import git_revision
from launch import probe, slurm_commands
from launch.clusters import Slurm, submitting
from launch.logs import Tail
from launch.probe import FAIL, OK, WARN, Finding, Probe, Words, counted
from launch.profiles import Profile, gpus_of, load_profile, sbatch_options, shape_of
from launch.stages import Stage

MINUTES = 5
"""Time limit of the job on the nodes, which takes one where nothing is amiss."""

WAIT_S = 180.0
"""How long it may wait in the queue, and then how long it may run."""

SHORT_S = 30.0
"""Less than this is little time for a save."""

NO_TIME = "lower checkpoint.every_minutes: where a save takes longer, the last periodic one is what is left"

Fields = Mapping[str, str]


def examine(where: str | None, profile_name: str | None, nodes: int, folder: Path) -> int:
    """Prints a line for each check, as soon as it is known; exit code 1 where one failed."""
    where = where or ("slurm" if profile_name or slurm_commands.controller_answers() else "local")
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
        yield probe.of_two_processes()
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
    yield probe.torch_finding(probe.look_at_torch(), driver, driver["gpus"] if computes else None)
    yield weights_finding()
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.is_dir())
    yield probe.space_finding(f"{folder} has", shutil.disk_usage(there).free / 1e9)
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


def controller_finding() -> Finding:
    """Whether there is a cluster to ask."""
    if shutil.which("sbatch") is None:
        remedy = "run this on a login node (or `module load slurm`), or use --cluster local"
        return Finding(FAIL, "Slurm's commands are not on the PATH", remedy)
    if not slurm_commands.controller_answers():
        remedy = "look at `scontrol ping`; if it stays so, tell the administrators"
        return Finding(FAIL, "Slurm's controller doesn't answer", remedy)
    return Finding(OK, "Slurm's controller answers")


def of_slurm(profile: Profile, nodes: int) -> Iterator[Finding]:
    """What Slurm says of itself, its partitions and us."""
    config = fields_of(slurm_commands.ask("scontrol", "show", "config") or "")
    yield Finding(OK, f"Slurm {config.get('SLURM_VERSION', '?')}, cluster {config.get('ClusterName', '?')}")
    yield accounting_finding(slurm_commands.accounting(["1"]) is not None, config)
    mine = ("where", f"user={getpass.getuser()}", "format=account,qos")
    yield account_finding(profile, slurm_commands.ask("sacctmgr", "-nP", "show", "assoc", *mine), config)
    yield ending_finding(config)
    partitions = records_of(slurm_commands.ask("scontrol", "show", "partition", "--oneliner") or "")
    listed = slurm_commands.ask("sacctmgr", "-nP", "show", "qos", "format=name,preempt,preemptmode,gracetime") or ""
    qos = {line.split("|")[0]: line.split("|")[1:] for line in listed.splitlines() if line.count("|") == 3}
    default = next((name for name, partition in partitions.items() if partition.get("Default") == "YES"), "")
    for name in (profile.partition or default).split(","):
        if name not in partitions:
            text = f"no partition {name!r}" if name else "no partition named, and the cluster has no default"
            yield Finding(FAIL, text, f"name one as partition in the profile: {', '.join(partitions) or 'see sinfo'}")
            continue
        listed = slurm_commands.ask("sinfo", "-Nh", f"--partition={name}", "--format=%N|%c|%m|%G|%T") or ""
        yield from limits(profile, nodes, partitions[name], listed)
        yield from preemption(config, partitions[name], partitions, qos, profile.qos)


def fields_of(text: str) -> dict[str, str]:
    """`Key = value` lines of `scontrol show config`."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def records_of(text: str) -> dict[str, dict[str, str]]:
    """The lines of `scontrol show … --oneliner` by their first value."""
    lines = [dict(word.partition("=")[::2] for word in line.split()) for line in text.splitlines()]
    return {next(iter(fields.values())): fields for fields in lines if fields}


def accounting_finding(answers: bool, config: Fields) -> Finding:
    """Whether it is known afterwards how a job ended."""
    if answers:
        return Finding(OK, "accounting answers (sacct)")
    text = f"accounting doesn't answer ({config.get('AccountingStorageType', 'type unknown')})"
    return Finding(WARN, text, "`status` works without; `scontrol show job` tells of jobs that ended minutes ago")


def account_finding(profile: Profile, associations: str | None, config: Fields) -> Finding:
    """Whether the accounting knows the profile's account and quality of service as ours."""
    rows = [line.split("|") for line in (associations or "").splitlines() if line.count("|") == 1]
    known = {"account": {row[0] for row in rows}, "qos": {name for row in rows for name in row[1].split(",")} - {""}}
    if not rows:
        return Finding(OK, "accounts and qos: sacctmgr tells none of yours, so they are not checked")
    wrong = [f"{key} {getattr(profile, key)!r}" for key in known if getattr(profile, key) not in (None, *known[key])]
    yours = "; ".join(f"{key}: {', '.join(sorted(names - {''})) or 'none'}" for key, names in known.items())
    if not wrong:
        return Finding(OK, f"the profile's account and qos, as far as it names them, are yours ({yours})")
    enforced = config.get("AccountingStorageEnforce", "none") not in ("none", "0")
    text = f"{' and '.join(wrong)} is not among yours ({yours})"
    return Finding(FAIL if enforced else WARN, text, "set it in the profile, or ask for it")


def ending_finding(config: Fields) -> Finding:
    """Whether jobs may be started again, and how long one that is cancelled has."""
    wait = leading_number(config.get("KillWait", "30"))
    again = f"all jobs may start again, they ask for that themselves (JobRequeue={config.get('JobRequeue', '?')})"
    text = f"{again}; one that is cancelled has {wait:.0f} s to save (KillWait)"
    return Finding(OK if wait >= SHORT_S else WARN, text, NO_TIME * (wait < SHORT_S))


def leading_number(text: str) -> float:
    """30 of `30 sec`; infinite for UNLIMITED."""
    found = re.match(r"\d+", text)
    return float(found[0]) if found else float("inf")


def gpus_in(gres: str) -> int:
    """6 of `gpu:a100:4(S:0-1),gpu:2`."""
    return sum(int(number) for number in re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres))


def limits(profile: Profile, nodes: int, partition: Fields, listed: str) -> Iterator[Finding]:
    """A partition against what the profile says of it; `listed` are its nodes as sinfo shows them."""
    name, state = partition["PartitionName"], partition.get("State", "UP")
    asked = (profile.cpus_per_node or 0, 1024 * (profile.memory_gb or 0), profile.gpus_per_node)
    what = f"{asked[0]} CPUs, {profile.memory_gb or 0} GB and {asked[2]} GPUs"
    fit = up = 0
    for _, cpus, memory, gres, node_state in (row.split("|") for row in listed.splitlines() if row.count("|") == 4):
        given = (leading_number(cpus), leading_number(memory), gpus_in(gres))
        fits = all(wanted <= has for wanted, has in zip(asked, given, strict=True))
        fit += fits
        up += fits and not re.match("down|drain|fail|unk|boot|maint", node_state)
    most = min(leading_number(partition.get("MaxNodes", "")), fit)
    mend = f"mend the profile; what there is: sinfo -p {name} -o '%D %c %m %G'"
    if state != "UP":
        yield Finding(FAIL, f"partition {name} is {state}", "name another in the profile, or wait until it is up")
    elif most < nodes:
        yield Finding(FAIL, f"partition {name} gives a job {most:.0f} of its nodes with {what}, not {nodes}", mend)
    elif up < nodes:
        text = f"of the {fit} nodes of partition {name} with {what} only {up} are up"
        yield Finding(WARN, text, "jobs will wait; sinfo -R says why")
    else:
        yield Finding(OK, f"partition {name} is up, and so are {up} of its nodes with {what} or more")
    if profile.max_nodes and nodes <= most < profile.max_nodes:
        yield Finding(WARN, f"max_nodes is {profile.max_nodes}, but partition {name} gives {most:.0f}", mend)
    longest, hours = slurm_commands.seconds(partition.get("MaxTime", "")), profile.max_hours or 24.0
    if longest is not None and longest < 3600 * hours:
        text = f"jobs ask for {hours:g} hours unless told otherwise, partition {name} allows {longest / 3600:g}"
        yield Finding(FAIL, text, f"set max_hours: {longest / 3600:g} in the profile")


def preemption(
    config: Fields, partition: Fields, partitions: Mapping[str, Fields], qos: Mapping[str, list[str]], mine: str | None
) -> Iterator[Finding]:
    """Who may throw our jobs out, what becomes of them, and how long they have to save."""
    name, kind = partition["PartitionName"], config.get("PreemptType", "preempt/none")
    mode, grace = partition.get("PreemptMode", "OFF"), leading_number(partition.get("GraceTime", "0"))
    tier = leading_number(partition.get("PriorityTier", "1"))
    others = [key for key, one in partitions.items() if leading_number(one.get("PriorityTier", "1")) > tier]
    if kind == "preempt/qos":
        if mine is None or mine not in qos:
            yield Finding(OK, "whether others preempt your jobs depends on your qos: name it in the profile to see")
            return
        _, mode, text = qos[mine]
        others = [key for key, (preempts, *_) in qos.items() if mine in preempts.split(",")]
        others += [mine] * ("within" in mode.lower())
        mode = config.get("PreemptMode", "OFF") if mode in ("", "cluster") else mode.upper()
        grace = slurm_commands.seconds(text) or 0.0
    if kind == "preempt/none" or mode == "OFF" or not others:
        yield Finding(OK, f"jobs in {name} are not preempted by others")
        return
    who = f"jobs in {name} may be preempted by those of {', '.join(others)}"
    if "SUSPEND" in mode:
        yield Finding(OK, f"{who}: they are suspended meanwhile (PreemptMode={mode})")
    elif "REQUEUE" in mode:
        yield Finding(OK, f"{who}, and come back by themselves (PreemptMode={mode})")
    else:
        remedy = "they don't come back by themselves: submit the same again, which goes on where it was"
        yield Finding(WARN, f"{who}, and are then cancelled (PreemptMode={mode})", remedy)
    if "SUSPEND" not in mode:
        yield notice_finding(config, grace)


def notice_finding(config: Fields, grace: float) -> Finding:
    """How a job learns that it is preempted, and how long it has then."""
    wait = leading_number(config.get("KillWait", "30"))
    if "preempt_send_user_signal" in config.get("SlurmctldParameters", ""):
        told = "preempted jobs are told by the signal they asked for (preempt_send_user_signal)"
    else:
        told = "preempt_send_user_signal is not set: preempted jobs are told by SIGTERM, on which training saves too"
    text = f"{told}, and have {grace + wait:.0f} s (GraceTime {grace:.0f} s + KillWait {wait:.0f} s)"
    short = grace + wait < SHORT_S
    return Finding(WARN if short else OK, text, NO_TIME * short)


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
        yield Finding(OK, f"job {self.job} is queued, to look at {counted(self.stage.nodes)}")
        trouble = self.wait()
        lock.release()
        if trouble is not None:
            yield trouble
        if self.words.reports or trouble is None:
            self.words.see_files(folder, self.token)
            yield from self.judge(gpus)

    def submit(self) -> str:
        """Queues it with the options of the stages, but to run once only; returns its id."""
        import submitit

        parameters: dict[str, Any] = self.cluster.parameters(self.stage, None) | {"job_name": "cxr-doctor"}
        del parameters["additional_parameters"]["requeue"]
        parameters["additional_parameters"]["no-requeue"] = True
        executor = submitit.SlurmExecutor(self.stage.run_dir.jobs / "submitit")
        executor.update_parameters(**parameters)
        self.waiting_at = time.time()
        with submitting(self.stage, self.cluster.options):
            return str(
                executor.submit(Probe(self.stage, self.cluster.starter.python, self.cluster.starter.srun)).job_id
            )

    def wait(self) -> Finding | None:
        """Until it has ended; None, or why that isn't waited for."""
        tail, since = Tail(self.stage.run / "words"), dict[str, float]()
        trouble = None
        while trouble is None and not (self.stage.run / "ended").exists():
            time.sleep(1)
            self.words.take(tail.new_lines(), time.time())
            queue = slurm_commands.queue()
            mine = (queue or {}).get(self.job)
            state = mine.state if mine else "gone" if queue is not None else "not known"
            age = time.monotonic() - since.setdefault(state, time.monotonic())
            if mine is not None and state in ("PENDING", "CONFIGURING"):
                self.waiting_at = time.time()
                trouble = self.waits(mine, age)
            elif state in ("gone", "COMPLETING"):
                state = slurm_commands.job_fields(self.job).get("JobState", "not known")
                if age > (probe.VISIBLE_S if state == "COMPLETED" else 5):
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
        silent = self.stage.nodes - len(reports)
        if silent:
            yield self.failed(f"{silent} of {counted(self.stage.nodes)} left no word")
        yield from probe.by_node(reports, lambda one: Finding(OK, f"Python {one['node']['python']}"))
        yield from probe.by_node(reports, lambda one: probe.torch_of_node(one, gpus))
        yield from probe.by_node(reports, lambda one: probe.folder_finding(one, folder, self.token))
        yield from probe.by_node(reports, lambda one: probe.clock_finding(one, self.waiting_at))
        torch = [one.get("torch", {}) for one in reports.values()]
        if num_ranks > 1 and torch and not any("error" in one for one in torch):
            yield from probe.by_node(reports, probe.name_finding)
            yield probe.together_finding("gloo", self.words.together["gloo"], num_ranks)
            if any(one.get("gpus") for one in torch):
                yield probe.together_finding("nccl", self.words.together["nccl"], num_ranks)

    def end(self) -> None:
        """Leaves neither job nor files, but for the log of one that went wrong."""
        if self.job and not (self.stage.run / "ended").exists():
            slurm_commands.cancel([self.job])
        if not self.keep:
            shutil.rmtree(self.stage.run, ignore_errors=True)

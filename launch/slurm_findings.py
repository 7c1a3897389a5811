"""What Slurm says of itself, its partitions and us, read for `cxr-launch doctor`."""

import getpass
import re
import shutil
from collections.abc import Iterator, Mapping

from launch import slurm_commands
from launch.findings import FAIL, OK, WARN, Finding
from launch.profiles import Profile

SHORT_S = 30.0
"""Less than this is little time for a save."""

NO_TIME = "lower checkpoint.every_minutes: where a save takes longer, the last periodic one is what is left"

Fields = Mapping[str, str]


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

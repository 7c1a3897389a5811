# shellcheck shell=bash
# What the sbatch scripts here share: a stage is run by srun, start after start of its job, until it is done.
#
# A script that sources this defines two functions and then calls `run_stage NAME`:
#   start_step   starts srun in the background
#   progress     prints something else once the stage was brought on

set -euo pipefail

# `12_3` in an array: the bare number may mean all of it.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
job=${job:-$SLURM_JOB_ID}
python=${CXR_VENV:-.venv}/bin/python
cpus=${SLURM_CPUS_PER_TASK:-1}
ranks=${CXR_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
max_losses=2    # in a row without progress
told=''         # the last signal this script got

export PYTHONUNBUFFERED=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds the ranks have to save in; before torch 2.12 it is 30 all the same
# srun doesn't take over --cpus-per-task from Slurm 22.05 on; one task that ends badly ends the others.
srun=(srun --export=ALL --cpus-per-task="$cpus" --kill-on-bad-exit=1)
torchrun=("$python" -m torch.distributed.run --nproc-per-node="$ranks" --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1)

say() { echo "── $*"; }

mistake() {
    echo "error: $*" >&2
    exit 2
}

[ -x "$python" ] || mistake "$python is missing: submit from the checkout, or name the environment in CXR_VENV"

# Facts of this job as Slurm knows them, such as `fact JobState`; nothing where it doesn't answer.
fact() {
    local shown
    shown=$(timeout 30 scontrol show job --oneliner "$job" 2>/dev/null) || return 0
    if [[ $shown =~ \ $1=([^\ ]*) ]]; then echo "${BASH_REMATCH[1]}"; fi
}

cancelled() { [ "$(fact JobState)" = CANCELLED ]; }

preempted() {
    local time
    time=$(fact PreemptTime)
    [ -n "$time" ] && [ "$time" != None ]
}

# Whether the time limit told the ranks to stop, or would at once. Who is preempted has an earlier end.
near_limit() {
    local end
    if preempted; then return 1; fi
    end=$(date --date="$(fact EndTime)" +%s 2>/dev/null) && ((end - $(date +%s) < 180))
}

# Waits until srun has ended, and passes signals on; sets `code`. A trap does nothing but note: bash 5.2 at times loses
# one of two signals, and fails where one comes while it reads `$(…)`.
wait_for_step() {
    local step=$1 passed_on=''
    while kill -0 "$step" 2>/dev/null; do
        # TERM comes to this script alone by hand; otherwise Slurm ends the job and has told the ranks itself.
        if [ -z "$passed_on" ] && { [ "$told" = USR1 ] || { [ "$told" = TERM ] && [ "$(fact JobState)" = RUNNING ]; }; }; then
            kill -USR1 "$step" 2>/dev/null || true  # srun hands it to every process, also while the controller is away
            passed_on=yes
        fi
        sleep 1 || true
    done
    code=0
    wait "$step" || code=$?
}

# How a step with exit code `code` ended that wrote what is on stdin: stopped, lost (a process was killed) or failed.
how_it_ended() {
    local text own others
    text=$(cat)
    if [ -n "$told" ]; then echo stopped; return; fi
    case $code in
        75 | 138 | 143) echo stopped; return ;;
        129 | 1[3-9]? | 2??) echo lost; return ;;
        2) echo failed; return ;;
    esac
    # torchrun ends with 1 whatever the ranks said; its summary has their codes.
    own=$(grep -Ec 'exitcode +: [1-9]' <<<"$text" || true)
    others=$(grep -Ec 'error: (another process of this job|the other processes of this job|no sign of) ' <<<"$text" || true)
    if grep -Eq 'exitcode +: 75 ' <<<"$text"; then echo stopped
    elif grep -Eq 'exitcode +: -' <<<"$text"; then echo lost
    elif ((own > others)); then echo failed
    elif ((others)); then echo lost
    elif grep -q 'SignalException' <<<"$text"; then echo stopped
    elif grep -q 'Traceback' <<<"$text"; then echo failed
    else echo lost
    fi
}

requeue() {
    local answer give_up=$((SECONDS + 900))
    until answer=$(LC_ALL=C timeout 30 scontrol requeue "$job" 2>&1); do
        case $answer in
            *already* | *pending*) break ;;  # Slurm was first
            *disabled*) give_up=0 ;;
        esac
        if cancelled; then say 'cancelled'; exit 1; fi
        if ((SECONDS >= give_up)); then
            say "this job can't go back into the queue (${answer##*$'\n'}): submit the same again, it goes on where it was"
            exit 1
        fi
        sleep 5 || true
    done
    say 'back into the queue'
    trap '' USR1
    trap - TERM
    sleep 600  # until Slurm ends us: to leave would look like the job's own end
    exit 1
}

run_stage() {
    local name=$1 log mark at_start before losses=0 how
    log=$(readlink "/proc/$$/fd/1")
    at_start=$(progress)
    trap 'told=USR1' USR1
    trap 'told=TERM' TERM
    while true; do
        before=$(progress)
        say "$name on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $job${before:+, after $before}"
        mark=$(stat --format=%s "$log" 2>/dev/null || echo 0)
        start_step
        wait_for_step $!
        if ((code == 0)); then say "$name is done"; exit 0; fi
        if cancelled; then say 'cancelled'; exit 1; fi
        how=$(tail --bytes="+$((mark + 1))" "$log" 2>/dev/null | how_it_ended)
        say "$name $how (exit code $code${told:+, after $told})"
        case $how in
            stopped)
                if [ "$(progress)" = "$at_start" ]; then
                    if near_limit; then
                        say 'a whole time limit brought it no step further: give it more with sbatch --time=…'
                        exit 1
                    elif [ -z "$told" ] && ! preempted; then
                        say 'it stopped before it came any further, and nothing had told this job to'
                        exit 1
                    fi
                fi
                requeue
                ;;
            failed)
                say 'it would meet the same again: see above'
                exit 1
                ;;
            lost)
                [ "$(progress)" = "$before" ] || losses=0
                losses=$((losses + 1))
                if ((losses > max_losses)); then
                    say "$losses times in a row without progress: see above"
                    exit 1
                fi
                sleep $((losses * 5)) || true
                if [ -n "$told" ]; then requeue; fi
                ;;
        esac
    done
}

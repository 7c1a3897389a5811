# shellcheck shell=bash disable=SC2034
# What the sbatch scripts here share: a job runs its stage with srun, and comes back by itself until it is done.
#
# Who sources this defines two functions and calls `run_stage NAME`:
#   start_step   starts srun in the background
#   progress     prints something else than before when the stage was brought on

set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

say() { echo "── $*"; }

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
job=${job:-$SLURM_JOB_ID}  # in an array `12_3`: the bare number may mean all of it
python=${CXR_VENV:-.venv}/bin/python
cpus=${SLURM_CPUS_PER_TASK:-1}
ranks=${CXR_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
told=''  # the last signal that came to this script

[ -x "$python" ] || fail "$python is missing: submit from the checkout, or name the environment in CXR_VENV"
[[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "CXR_PROCESSES_PER_NODE=$ranks should be a number of at least 1"

export PYTHONUNBUFFERED=1
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}  # without: a page of warnings when the agents take leave
export CXR_VAE_CORES=$((cpus > ranks ? cpus / ranks : 1))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds the ranks have to save in; torch 2.11 always gives them 30
# srun doesn't take over --cpus-per-task from Slurm 22.05 on. One task that ends badly ends the others; where their node
# is gone, srun and the next step would wait for them for ever, but for --wait and --overlap.
srun=(srun --export=ALL --cpus-per-task="$cpus" --label --kill-on-bad-exit=1 --wait=60 --overlap)
torchrun=("$python" -m torch.distributed.run --nproc-per-node="$ranks" "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1")

# What Slurm says of this job, as in `fact JobState`; nothing where it doesn't answer.
fact() {
    local shown
    shown=$(timeout 30 scontrol show job --oneliner "$job" 2>/dev/null) || return 0
    if [[ $shown =~ \ $1=([^\ ]*) ]]; then echo "${BASH_REMATCH[1]}"; fi
}

# Whether someone has used scancel: a requeue would bring the job back to life. While it is cleaned up Slurm shows
# COMPLETING, as for one that it requeues or whose time is up; those have another count, or a reason.
cancelled() {
    case $(fact JobState) in
        CANCELLED) return 0 ;;
        COMPLETING) [ "$(fact Reason)" = None ] && [ "$(fact Restarts)" = "${SLURM_RESTART_COUNT:-0}" ] ;;
        *) return 1 ;;
    esac
}

preempted() { [[ $(fact PreemptTime) = *[0-9]* ]]; }

# Whether the ranks were told to stop because of the time limit. A job that is preempted has another end.
near_limit() {
    local end
    end=$(date --date="$(fact EndTime)" +%s 2>/dev/null) && ((end - $(date +%s) < 180)) && ! preempted
}

# Until srun has ended; passes signals on; sets `code`. The traps only note them: bash 5.2 loses some of those that come
# while a trap does more. TERM comes to this script alone only by hand: otherwise Slurm ends all of the job itself.
wait_for_step() {
    local step=$1 passed_on=''
    while kill -0 "$step" 2>/dev/null; do
        if [ -z "$passed_on" ] && [ -n "$told" ] && { [ "$told" = USR1 ] || [ "$(fact JobState)" = RUNNING ]; }; then
            passed_on=yes
            kill -USR1 "$step" 2>/dev/null || true  # to all processes, also while Slurm's controller is away
        fi
        sleep 1 || true
    done
    code=0
    wait "$step" || code=$?
}

# How the step ended that had exit code `code` and wrote what is in stdin.
how_it_ended() {
    local text roots
    text=$(tail --lines=20000)
    # torchrun ends with 1 whatever its ranks did. Its summary says of the one that failed first `exitcode  : -9 (pid: …`,
    # and `error_file: <N/A>` where that rank had no error of its own to tell.
    roots=$(awk '/Root Cause/ { root[$1] = 1 }
        root[$1] && /exitcode/ { code[$1] = $4 }
        root[$1] && /error_file/ { print code[$1], $3; root[$1] = 0 }' <<<"$text")
    if [ -n "$told" ] || ((code == 75)) || grep -q '^75 ' <<<"$roots"; then
        echo stopped
    elif ((code == 2)) || grep -q '^[1-9].*json' <<<"$roots"; then
        echo failed
    elif grep -q '^-' <<<"$roots" || grep -q 'error: another process of this job has ended' <<<"$text"; then
        echo killed
    elif ((code == 128 + 10 || code == 128 + 15)) || grep -q SignalException <<<"$text"; then
        echo stopped
    elif ((code < 128)) && grep -q Traceback <<<"$text"; then
        echo failed
    else
        echo killed
    fi
}

requeue() {
    local answer give_up=$((SECONDS + 900))
    until answer=$(LC_ALL=C timeout 30 scontrol requeue "$job" 2>&1); do
        case $answer in
            *already* | *pending*) break ;;  # Slurm was first
            *disabled*) give_up=0 ;;
        esac
        if cancelled; then
            say 'cancelled'
            exit 1
        elif ((SECONDS >= give_up)); then
            say "this job can't go back into the queue (${answer##*$'\n'}): submit the same again, it goes on where it was"
            exit 1
        fi
        sleep 5 || true
    done
    say 'back into the queue'
    trap '' USR1
    trap - TERM
    sleep 600  # until Slurm ends this: to leave would look like the job's own end
    exit 1
}

run_stage() {
    local name=$1 log mark at_start before how losses=0 code
    log=$(readlink "/proc/$$/fd/1")
    at_start=$(progress)
    trap 'told=USR1' USR1
    trap 'told=TERM' TERM
    while true; do
        before=$(progress)
        say "$name on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))${before:+, after $before}"
        mark=$(stat --format=%s "$log" 2>/dev/null) || mark=0
        start_step
        wait_for_step $!
        if ((code == 0)); then
            say "$name done"
            exit 0
        elif cancelled; then
            say 'cancelled'
            exit 1
        fi
        how=$({ tail --bytes="+$((mark + 1))" "$log" 2>/dev/null || true; } | how_it_ended)
        say "$name $how${told:+ by $told}, exit code $code"
        if [ "$how" = failed ]; then
            say 'it would meet the same again: see above'
            exit 1
        elif [ "$how" = killed ]; then
            [ "$(progress)" = "$before" ] || losses=0
            losses=$((losses + 1))
            if ((losses == 3)); then
                say 'three times in a row without progress: see above'
                exit 1
            fi
            sleep $((5 * losses)) || true
            [ -n "$told" ] || continue
        elif [ "$(progress)" = "$at_start" ] && near_limit; then
            say 'a whole time limit brought it no step further: give it more, sbatch --time=…'
            exit 1
        elif [ "$(progress)" = "$at_start" ] && [ -z "$told" ] && ! preempted; then
            say 'it stopped before it came any further, and nobody had told this job to'
            exit 1
        fi
        requeue
    done
}

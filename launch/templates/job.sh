#!/usr/bin/env bash
@SBATCH@
# Written by `python -m launch.slurm`; SLURM has its own copy of it, this one is to be read.
#
# Exit code 75 of the program, or its death by a signal that we passed on, means: there is more to do. The job is then
# queued again under the same number, and the same words with resume=true go on from the last checkpoint.
set -uo pipefail
say() { echo "[$(date +%T)] job ${SLURM_JOB_ID}.${SLURM_RESTART_COUNT:-0}: $*"; }

told=0 step=
tell() {  # passed on once: a run that is told again, and much later, ends without its checkpoint
    told=$((told + 1))
    say "told by $1 to stop"
    if ((told == 1)) && [[ $step ]]; then kill -USR1 "$step" 2> /dev/null; fi
}
trap 'tell USR1' USR1  # the time limit comes: --signal above
trap 'tell USR2' USR2
trap 'tell TERM' TERM  # pre-emption, scancel

finish() {  # CODE: queue again where there is more to do, else end with it
    if ((told && ($1 == 138 || $1 == 140 || $1 == 143))) || (($1 == 75)); then
        if [[ $(scontrol show job "$SLURM_JOB_ID" -o) != *" JobState=RUNNING "* ]]; then
            say "ended with $1, but it was cancelled, or SLURM itself queues it again"
        elif ((${SLURM_RESTART_COUNT:-0} < @REQUEUE@)); then
            say "ended with $1: queued again"
            scontrol requeue "$SLURM_JOB_ID" && sleep 60  # SLURM ends this script meanwhile
        else
            say "ended with $1, and was queued again ${SLURM_RESTART_COUNT:-0} times: enough (requeue in conf/cluster)"
        fi
    fi
    exit "$1"
}

# ---- where, and with what
cd @HOME@ || exit 1
@SETUP@
export PYTHONPATH=@ROOT@${PYTHONPATH:+:$PYTHONPATH} PATH=@BIN@:$PATH
export OMP_NUM_THREADS=@THREADS@ PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore::FutureWarning
@ENVIRONMENT@
command=(@COMMAND@)
if ((${SLURM_RESTART_COUNT:-0})); then command+=(resume=true); fi  # without a checkpoint yet it begins anew

# ---- who meets where. A node's name need not resolve: its address is what SLURM itself uses
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address() { scontrol show node "$1" -o | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p'; }
comma() { local IFS=,; echo "$*"; }
port=$((10000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0} * 1009) % 20000))
MASTER_ADDR=$(address "${nodes[0]}")
export MASTER_ADDR MASTER_PORT=$port
@SERVERS@

# ---- the ranks: srun starts them and passes signals on; one that ends takes the others with it within three minutes
if ((told)); then finish 75; fi
say "@NODES@ node(s) x @RANKS@ rank(s) on $(comma "${nodes[@]}")"
ranks=(srun --mpi=none --kill-on-bad-exit=0 --wait=180 --nodes=@NODES@ --nodelist="$(comma "${nodes[@]:0:@NODES@}")"
       --ntasks=@NTASKS@ --ntasks-per-node=@RANKS@ --cpus-per-task=@CPUS@
       bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=@RANKS@
                exec "$@"' rank @CONTAINER@"${command[@]}")
(exec "${ranks[@]}") &  # in brackets: else bash has a trap that is due run by the new process as well
step=$!
if ((told)); then kill -KILL "$step" 2> /dev/null; finish 75; fi  # it came meanwhile, and srun may not have heard of it
while true; do  # a trap ends `wait`, not what is waited for
    before=$told
    wait "$step"
    code=$?
    if ((before == told)); then break; fi
done
say "ended with $code"
finish "$code"

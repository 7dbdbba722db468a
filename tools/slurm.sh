#!/usr/bin/env bash
# Train on one or several machines of a SLURM cluster, one process per GPU. Submit it in the root of the clone:
#
#   OUTPUT=runs/26t DATA=/data/imagenet sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 tools/slurm.sh -amp
#
# It takes the variables of run_train_multi.sh, of which OUTPUT is required, and options of main_multi_gpu.py.
# Two minutes before the time is over, and at a preemption, the run writes a checkpoint. The job then goes back to
# the queue, and goes on from the checkpoint when it starts again.
#
# Exit code: 0 when done or back in the queue, else as run_train_multi.sh.
#SBATCH --job-name=halonet
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

mistake() {
    echo "slurm.sh: $1" >&2
    exit 2
}

if [[ -z ${SLURM_JOB_ID:-} ]]; then mistake 'this is for sbatch; without SLURM there is ./run_train_multi.sh'; fi
if [[ -z ${OUTPUT:-} ]]; then mistake 'OUTPUT is missing, the run folder to go on in'; fi
if [[ ! -x run_train_multi.sh ]]; then mistake "no run_train_multi.sh in $PWD; submit it in the root of the clone"; fi

export NNODES=${SLURM_JOB_NUM_NODES:-1}
MASTER=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))
export MASTER
signals=0
trap 'signals=$((signals + 1))' TERM                # a preemption may send it here too; the tasks get their own
srun --kill-on-bad-exit=0 bash -c 'NODE_RANK=$SLURM_NODEID exec ./run_train_multi.sh "$@"' task "$@" -resume auto &
srun=$!
while :; do                                         # a trapped signal ends the waiting with a code of its own
    before=$signals code=0
    wait "$srun" || code=$?
    if (( signals == before )); then break; fi
done
if (( code != 75 )); then exit "$code"; fi
echo "slurm.sh: stopped, with a checkpoint in $OUTPUT; back to the queue"
scontrol requeue "$SLURM_JOB_ID"

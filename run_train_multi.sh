#!/usr/bin/env bash
# Train on all visible GPUs, one process each. Takes variables, here with their defaults, and options of
# main_multi_gpu.py:
#
#   CUDA_VISIBLE_DEVICES=0,1,2,3 DATA=/dataset/imagenet ./run_train_multi.sh -amp
#
#   CFG=configs/halonet_26t_256.yaml     the model and its recipe
#   DATA=/dataset/imagenet               the folder with train_list.txt and val_list.txt
#   BATCH_SIZE=                          training images per GPU; empty: as CFG says
#   PRETRAINED=                          weights to start from; empty: fresh ones
#   OUTPUT=                              the run folder; empty: a new one below ./output
#   NPROCS=                              processes on this machine; empty: one per visible GPU
#   NNODES=1                             number of machines
#   NODE_RANK= MASTER=                   of several machines: number of this one, from 0; host:port of number 0
#   MAX_RESTARTS=0                       restarts after a failure, from the newest checkpoint of OUTPUT (required)
#   PYTHON=                              empty: .venv's if there is one, else python
#
# Exit code: 0 when done; 75 when SIGTERM or Ctrl-C stopped it, with a checkpoint written; 2 for a mistake that
# another start would meet again; else a failure (docs/reliability.md).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # sh run_..._multi.sh works too
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/tools/run_multi.sh"
! show_usage "$root/run_train_multi.sh" "$@" || { show_options; exit 0; }

options=(-cfg "${CFG:-$root/configs/halonet_26t_256.yaml}" -dataset imagenet2012)
options+=(-data_path "${DATA:-/dataset/imagenet}")
if [[ -n ${BATCH_SIZE:-} ]]; then options+=(-batch_size "$BATCH_SIZE"); fi
if [[ -n ${PRETRAINED:-} ]]; then options+=(-pretrained "$PRETRAINED"); fi
if [[ -n ${OUTPUT:-} ]]; then options+=(-output "$OUTPUT"); fi

again=(-resume auto)
prepare "$@"
run_multi "$@"

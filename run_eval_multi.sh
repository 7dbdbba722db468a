#!/usr/bin/env bash
# Evaluate weights on all visible GPUs, one process each. Takes variables, here with their defaults, and options of
# main_multi_gpu.py:
#
#   CUDA_VISIBLE_DEVICES=0,1,2,3 DATA=/dataset/imagenet PRETRAINED=halonet_26t_256.pdparams ./run_eval_multi.sh -amp
#
#   PRETRAINED                           the weights; must be given
#   CFG=configs/halonet_26t_256.yaml     the model they belong to
#   DATA=/dataset/imagenet               the folder with val_list.txt
#   BATCH_SIZE=                          images per GPU; empty: as CFG says
#   OUTPUT=                              the run folder; empty: a new one below ./output
#   NPROCS=                              processes on this machine; empty: one per visible GPU
#   NNODES=1                             number of machines
#   NODE_RANK= MASTER=                   of several machines: number of this one, from 0; host:port of number 0
#   PYTHON=                              empty: .venv's if there is one, else python
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # sh run_..._multi.sh works too
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/tools/run_multi.sh"
! show_usage "$root/run_eval_multi.sh" "$@" || { show_options; exit 0; }
if [[ -z ${PRETRAINED:-} ]]; then
    usage_error 'name the weights: PRETRAINED=FILE ./run_eval_multi.sh'
fi

options=(-cfg "${CFG:-$root/configs/halonet_26t_256.yaml}" -dataset imagenet2012)
options+=(-data_path "${DATA:-/dataset/imagenet}" -eval -pretrained "$PRETRAINED")
if [[ -n ${BATCH_SIZE:-} ]]; then options+=(-batch_size_eval "$BATCH_SIZE"); fi
if [[ -n ${OUTPUT:-} ]]; then options+=(-output "$OUTPUT"); fi

again=()
prepare "$@"
run_multi "$@"

#!/usr/bin/env bash
# Evaluate weights on all visible GPUs, one process each. Variables, with their defaults, then options of main_multi_gpu.py:
#
#   CUDA_VISIBLE_DEVICES=0,1,2,3 DATA=/dataset/imagenet PRETRAINED=halonet_26t_256.pdparams ./run_eval_multi.sh -amp
#
#   PRETRAINED                           the weights; must be given
#   CFG=configs/halonet_26t_256.yaml     the model they belong to
#   DATA=/dataset/imagenet               the folder with val_list.txt
#   BATCH_SIZE=                          images per GPU; empty: as CFG says
#   OUTPUT=                              the run folder; empty: a new one below ./output
#   NPROCS=                              processes on this machine; empty: one per visible GPU
#   NNODES=1 NODE_RANK= MASTER=          of several machines: how many, which one this is from 0 on, host:port of number 0
#   PYTHON=                              empty: .venv's if there is one, else python
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # sh run_..._multi.sh works too
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/tools/run_multi.sh"
! show_usage "$root/run_eval_multi.sh" "$@" || { show_options; exit 0; }
[[ -n ${PRETRAINED:-} ]] || { echo 'run_eval_multi.sh: name the weights: PRETRAINED=FILE ./run_eval_multi.sh' >&2; exit 2; }

options=(-cfg "${CFG:-$root/configs/halonet_26t_256.yaml}" -dataset imagenet2012 -data_path "${DATA:-/dataset/imagenet}")
options+=(-eval -pretrained "$PRETRAINED")
[[ -z ${BATCH_SIZE:-} ]] || options+=(-batch_size_eval "$BATCH_SIZE")
[[ -z ${OUTPUT:-} ]] || options+=(-output "$OUTPUT")

again=()
prepare "$@"
run_multi "$@"

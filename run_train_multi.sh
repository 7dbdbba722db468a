#!/usr/bin/env bash
# Train on all visible GPUs, one process each. Variables, with their defaults, then options of main_multi_gpu.py:
#
#   CUDA_VISIBLE_DEVICES=0,1,2,3 DATA=/dataset/imagenet ./run_train_multi.sh -amp
#
#   CFG=configs/halonet_26t_256.yaml     the model and its recipe
#   DATA=/dataset/imagenet               the folder with train_list.txt and val_list.txt
#   BATCH_SIZE=                          training images per GPU; empty: as CFG says
#   PRETRAINED=                          weights to start from; empty: fresh ones
#   OUTPUT=                              the run folder; empty: a new one below ./output
#   PYTHON=                              empty: .venv's if there is one, else python
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -n ${PYTHON:-} ]] || { [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python; } || PYTHON=python

options=(-cfg "${CFG:-$root/configs/halonet_26t_256.yaml}" -dataset imagenet2012 -data_path "${DATA:-/dataset/imagenet}")
[[ -z ${BATCH_SIZE:-} ]] || options+=(-batch_size "$BATCH_SIZE")
[[ -z ${PRETRAINED:-} ]] || options+=(-pretrained "$PRETRAINED")
[[ -z ${OUTPUT:-} ]] || options+=(-output "$OUTPUT")

exec "$PYTHON" "$root/main_multi_gpu.py" "${options[@]}" "$@"

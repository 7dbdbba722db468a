#!/usr/bin/env bash
# From a clean checkout to a trained and evaluated HaloNet: real images, no download but the Python packages, CPU is enough.
#
#   ./run_demo.sh                        PYTHON=python3.12 ./run_demo.sh chooses the Python
#   ./run_demo.sh -opts SEED 1           more options of config.py for both the training and the evaluation
#
# Everything is written below demo/. A run starts from nothing and replaces the one before it.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
cfg=configs/halonet_digits.yaml
data=demo/digits
run=demo/run
python=.venv/bin/python

tools/setup_env.sh requirements-dev.txt
"$python" tools/make_digits.py "$data"

echo "demo: training ($cfg)"
rm -rf "$run" demo/eval
"$python" main_single_gpu.py -cfg "$cfg" -data_path "$data" -output "$run" "$@"

echo "demo: evaluating the saved weights"
"$python" main_single_gpu.py -cfg "$cfg" -data_path "$data" -output demo/eval -eval -pretrained "$run/final.pdparams" "$@"
result=$(grep -o 'acc@1 .*' demo/eval/log.txt | tail -n 1) || {
    echo 'demo: demo/eval/log.txt holds no accuracy' >&2
    exit 1
}

cat <<END

demo: done: $result
  images    $PWD/$data
  weights   $PWD/$run/final.pdparams
  log       $PWD/$run/log.txt
  metrics   $PWD/$run/metrics.jsonl
  page      $PWD/$run/report.html (curves, confusions, mistakes: open it in a browser)
Next, your own images (a folder with train_list.txt and val_list.txt, lines 'relative/path label'), here with three classes:
  $python main_single_gpu.py -cfg configs/halonet_26t_256.yaml -data_path DIR -batch_size 32 -opts MODEL.NUM_CLASSES 3
END

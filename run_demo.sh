#!/usr/bin/env bash
# Train and evaluate a small HaloNet on real images, from a clean checkout. Downloads nothing but the Python packages;
# a CPU is enough.
#
#   ./run_demo.sh                        install what is missing into .venv, train and evaluate
#   ./run_demo.sh -opts SEED 1           options of config.py for both the training and the evaluation
#   ./run_demo.sh -h                     show this text, and change nothing
#
#   PYTHON=                              the Python that makes .venv, such as python3.12; empty: python3
#
# Everything is written below demo/. A run starts from nothing and replaces the one before it.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # sh run_demo.sh works too
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/usage.sh
! show_usage run_demo.sh "$@" || exit 0

guard
cfg=configs/halonet_digits.yaml
data=demo/digits
run=demo/run
python=.venv/bin/python

check_options() {
    "$python" - "$@" <<'END'
import sys

from config import parse_args

sys.argv[0] = 'run_demo.sh'
config = parse_args()
if config.EVAL or config.MODEL.RESUME or config.MODEL.PRETRAINED or config.OUTPUT:
    print('run_demo.sh: error: it sets -output, -eval, -resume and -pretrained itself; leave them out',
          file=sys.stderr)
    sys.exit(2)
END
}

tools/setup_env.sh requirements-dev.txt
check_options -cfg "$cfg" -data_path "$data" "$@"   # before the last run is removed
mkdir -p demo
exec 9> demo/lock
if command -v flock > /dev/null && ! flock -n 9; then
    echo 'run_demo.sh: error: another demo is running in this folder' >&2
    exit 2
fi
"$python" tools/make_digits.py "$data"

echo "demo: training ($cfg)"
rm -rf "$run" demo/eval
program=("${guard[@]}" "$python" main_single_gpu.py -cfg "$cfg" -data_path "$data" "$@")
"${program[@]}" -output "$run"

echo "demo: evaluating the saved weights"
"${program[@]}" -output demo/eval -eval -pretrained "$run/final.pdparams"
result=$(grep -o 'acc@1 .*' demo/eval/log.txt | tail -n 1) || {
    echo 'demo: demo/eval/log.txt holds no accuracy' >&2
    exit 1
}

printf -v here '%q' "$PWD"
cat <<END

demo: done: $result
  images    $here/$data
  weights   $here/$run/final.pdparams
  log       $here/$run/log.txt
  metrics   $here/$run/metrics.jsonl
  page      $here/$run/report.html (curves, confusions, mistakes: open it in a browser)
Next, in this shell:
  cd $here && source .venv/bin/activate
  python tools/predict.py -pretrained $run/final.pdparams $data/val/8
Then your own images, a folder DIR with one subfolder per class (docs/finetune.md):
  python tools/make_lists.py DIR
  echo 'BASE: [configs/halonet_26t_256.yaml, configs/_finetune.yaml]' > mine.yaml
  python main_single_gpu.py -cfg mine.yaml -data_path DIR -pretrained timm/halonet26t.a1h_in1k
END

#!/usr/bin/env bash
# Run the tests in .venv, which is made at the first call; a CPU is enough. Two processes share the test files.
# Arguments go to pytest, with paths from the repository root:
#
#   ./run_tests.sh                       all but the slow ones
#   ./run_tests.sh -m slow               the slow ones
#   ./run_tests.sh tests/test_config.py -x -n 0           in one process, as for --pdb
#   ./run_tests.sh -h                    show this text, and change nothing
#
#   PYTHON=                              the Python that makes .venv, such as python3.12; empty: python3
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # sh run_tests.sh works too
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/usage.sh
! show_usage run_tests.sh "$@" || exit 0
tools/setup_env.sh requirements-dev.txt
# a worker that ends is not replaced: with loadfile, pytest-xdist would wait for it for ever
exec .venv/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 "$@"

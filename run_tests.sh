#!/usr/bin/env bash
# The test suite, in an environment of its own (.venv); CPU is enough. Arguments go to pytest, paths from the repository root:
#
#   ./run_tests.sh                       all but the slow ones
#   ./run_tests.sh -m slow               the slow ones
#   ./run_tests.sh tests/test_config.py -x
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
tools/setup_env.sh requirements-dev.txt
exec .venv/bin/python -m pytest "$@"

#!/usr/bin/env bash
# Make .venv in the repository root and install a requirement file into it, unless that is done already.
#
#   tools/setup_env.sh [requirements.txt]    or requirements-dev.txt: also what the demo and the tests need
#   PYTHON=python3.12 tools/setup_env.sh     with this Python, 3.9 to 3.13 (default: python3, or what .venv has)
#
# Installs nothing outside .venv. Keeps a paddlepaddle-gpu that .venv has, instead of installing Paddle for CPU.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # sh tools/setup_env.sh works too
set -euo pipefail

case ${1:-} in -h | -help | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
requirements=$root/${1:-requirements.txt}

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# pip must not be led out of .venv, nor see another one, by the caller's environment
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_ROOT VIRTUAL_ENV
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONNOUSERSITE=1

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
supported() { [[ $1 =~ ^3\.(9|10|11|12|13)\. ]]; }
usable() { supported "$installed" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

# The stamp records what is installed: all requirement files (one may include another) and the Python
state() { cat "$root"/requirements*.txt <(version_of "$venv/bin/python") | cksum; }

make_venv() {
    local python=$1 version
    command -v "$python" >/dev/null ||
        fail "$python not found. Install Python 3.9 to 3.13, or name one: PYTHON=/path/to/python3.12"
    version=$(version_of "$python") ||
        fail "$python does not run as a Python 3. Name another one: PYTHON=/path/to/python3.12"
    supported "$version" ||
        fail "$python is Python $version, and Paddle 3.3 needs 3.9 to 3.13." \
             "Name another one: PYTHON=/path/to/python3.12"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python ($version) lacks the module venv or ensurepip. On Debian and Ubuntu: apt install python3-venv" \
             "(python${version%.*}-venv for a Python that is not the system's own)"
    echo "setup: making $venv with Python $version"
    "$python" -m venv --clear "$venv" ||
        fail "'$python -m venv' failed, see above. On Debian and Ubuntu: apt install python3-venv;" \
             'else check the free disk space'
}

install() {
    copies=$(mktemp -d)
    trap 'rm -rf "$copies"' EXIT
    cp "$root"/requirements*.txt "$copies"
    if "$venv/bin/python" -m pip show -qq paddlepaddle-gpu 2>/dev/null; then
        echo 'setup: keeping the paddlepaddle-gpu that is installed'
        sed -i.bak '/^paddlepaddle==/d' "$copies/requirements.txt"
    fi
    echo "setup: installing ${requirements##*/} (about 1 GB on disk, most of it Paddle; this can take some minutes)"
    [[ -t 1 ]] || export PIP_QUIET=1
    "$venv/bin/python" -m pip install --requirement "$copies/${requirements##*/}" ||
        fail "pip could not install ${requirements##*/}, see above. If that is a network error: check the connection," \
             "set https_proxy=http://HOST:PORT behind a proxy or PIP_INDEX_URL for a mirror, and run this again"
}

[[ -f $requirements ]] || fail "$requirements: no such file"
stamp=$venv/.installed-${requirements##*/}
installed=$(version_of "$venv/bin/python") || installed=none
wanted=$installed
[[ -z ${PYTHON:-} ]] || wanted=$(version_of "$PYTHON") || wanted=unknown

if [[ $wanted == "$installed" && -f $stamp && $(<"$stamp") == "$(state)" ]]; then
    exit 0
fi
if [[ $wanted != "$installed" ]] || ! usable; then
    make_venv "${PYTHON:-python3}"
fi
rm -f "$stamp"
install
state >"$stamp.new"
mv "$stamp.new" "$stamp"

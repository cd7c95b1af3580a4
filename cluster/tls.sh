#!/usr/bin/env bash
# Certificates for Ray's own traffic (RAY_USE_TLS): a CA of the cluster's own, and one certificate for each node and client.
#   cluster/tls.sh DIR ADDRESS…     makes DIR/ca.key and DIR/ca.crt if they are not there, and DIR/ADDRESS/{ca.crt,node.crt,node.key}
# Copy DIR/ADDRESS/ to ~/.ray-ft/tls/ on that node; setup.sh and start.sh find it there. A client that joins the cluster as a
# driver needs one too. Keep ca.key off the nodes: who has it can make a node. Ray presents the same certificate whether it
# serves or asks, hence both uses. DAYS=… says how long they hold (365); run it again to renew, then restart Ray on the nodes.
# Covered: all gRPC (GCS, raylets, workers, objects on their way). Not covered: HTTP of the dashboard and of Serve, NCCL and Gloo.
set -euo pipefail
umask 077

die() { printf 'tls: error: %s\n' "$1" >&2; shift; [ $# -eq 0 ] || printf '  %s\n' "$@" >&2; exit 1; }

[ $# -ge 2 ] || die "a folder and at least one address are needed." "cluster/tls.sh DIR ADDRESS…"
command -v openssl >/dev/null || die "openssl not found." "Debian and Ubuntu: apt-get install openssl"
dir=$1
shift
days=${DAYS:-365}
mkdir -p "$dir"

if [ ! -e "$dir/ca.key" ]; then
    openssl req -x509 -newkey rsa:3072 -nodes -sha256 -days "$days" -subj "/CN=ray-ft cluster CA" \
        -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout "$dir/ca.key" -out "$dir/ca.crt" 2>/dev/null || die "openssl could not make the CA in $dir."
    echo "tls: CA in $dir"
fi

for address in "$@"; do
    case $address in
        */* | .* | '') die "'$address' is no address or host name." ;;
        *:* | *[0-9].*[0-9].*[0-9].*[0-9]) names=IP:$address ;;
        *) names=DNS:$address ;;
    esac
    node=$dir/$address
    mkdir -p "$node"
    # Ray's processes on one node also speak over loopback.
    printf '%s\n' "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature,keyEncipherment" \
        "extendedKeyUsage=serverAuth,clientAuth" "subjectAltName=$names,IP:127.0.0.1,DNS:localhost" >"$node/extensions"
    openssl req -newkey rsa:3072 -nodes -sha256 -subj "/CN=${address:0:64}" -keyout "$node/node.key" -out "$node/request" 2>/dev/null
    openssl x509 -req -sha256 -days "$days" -in "$node/request" -CA "$dir/ca.crt" -CAkey "$dir/ca.key" -CAcreateserial \
        -extfile "$node/extensions" -out "$node/node.crt" 2>/dev/null || die "openssl could not sign $address."
    rm -f "$node/request" "$node/extensions"
    cp "$dir/ca.crt" "$node/ca.crt"
    echo "tls: $node (for $names, $days days)"
done

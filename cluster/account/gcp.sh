#!/usr/bin/env bash
# PROJECT=NAME BUCKET=NAME SSH_FROM=YOUR.ADDRESS/32 cluster/account/gcp.sh
# What cluster/gcp.yaml needs in a Google Cloud project, once: networks in which ssh to the head is all that is reachable,
# an identity for the machines without keys, a bucket for runs. Costs what Cloud NAT costs. Stops where a command fails;
# again after that, it goes on past what is there already.
#   FABRIC=none     without the networks of A3 machines (h100, h200)      REGION, ZONE     as in gcp.yaml
set -euo pipefail

: "${PROJECT:?a project with billing: PROJECT=NAME}"
: "${BUCKET:?a bucket, to be made: BUCKET=NAME; recipes say run.storage=gs://NAME/runs}"
: "${SSH_FROM:?the addresses that may open ssh to the head: SSH_FROM=203.0.113.7/32}"
REGION=${REGION:-us-central1}
ZONE=${ZONE:-us-central1-a}
FABRIC=${FABRIC:-all}
email=ray-ft@$PROJECT.iam.gserviceaccount.com

make() { # WHAT… : describes it, and where it is not there creates it with the options after --
    local what=() scope=()
    while [ "$1" != -- ]; do what+=("$1"); shift; done
    shift
    local name=${what[-1]}
    unset 'what[-1]'
    case ${what[*]} in
        *subnets | *routers) scope=(--region="$REGION") ;;
        *nats) scope=(--region="$REGION" --router=ray-ft) ;;
    esac
    if gcloud --project="$PROJECT" "${what[@]}" describe "$name" "${scope[@]}" >/dev/null 2>&1; then
        echo "gcp: ${what[*]} $name is there"
    else
        gcloud --project="$PROJECT" "${what[@]}" create "$name" "${scope[@]}" "$@"
    fi
}

gcloud --project="$PROJECT" services enable compute.googleapis.com iam.googleapis.com cloudresourcemanager.googleapis.com

# In: ssh to the head, from one place; among the machines everything. Out: through NAT.
make compute networks ray-ft -- --subnet-mode=custom --mtu=8896
make compute networks subnets ray-ft -- --network=ray-ft --range=10.77.0.0/20 --enable-private-ip-google-access
make compute firewall-rules ray-ft-ssh -- --network=ray-ft --allow=tcp:22 --source-ranges="$SSH_FROM" \
    --target-tags=ray-ft-head
make compute firewall-rules ray-ft-inside -- --network=ray-ft --allow=tcp,udp,icmp --source-ranges=10.77.0.0/20
make compute routers ray-ft -- --network=ray-ft
make compute routers nats ray-ft -- --auto-allocate-nat-external-ips --nat-all-subnet-ip-ranges

if [ "$FABRIC" != none ]; then
    # GPUDirect-TCPX of A3 High takes four networks; the first of them is A3 Ultra's second one for IP.
    for card in 0 1 2 3; do
        make compute networks "ray-ft-gpu-$card" -- --subnet-mode=custom --mtu=8244
        make compute networks subnets "ray-ft-gpu-$card" -- --network="ray-ft-gpu-$card" --range="10.78.$((card * 16)).0/20"
        make compute firewall-rules "ray-ft-gpu-$card" -- --network="ray-ft-gpu-$card" --allow=tcp,udp,icmp \
            --source-ranges="10.78.$((card * 16)).0/20"
    done
    # RoCE of A3 Ultra: one network of the zone's profile, a rail for each GPU.
    make compute networks ray-ft-rdma -- --network-profile="$ZONE-vpc-roce" --subnet-mode=custom --mtu=8896
    for rail in 0 1 2 3 4 5 6 7; do
        make compute networks subnets "ray-ft-rdma-$rail" -- --network=ray-ft-rdma --range="10.79.$((rail * 16)).0/20"
    done
fi

# The machines: their bucket, and for the head to start workers with the same identity.
gcloud --project="$PROJECT" iam service-accounts describe "$email" >/dev/null 2>&1 ||
    gcloud --project="$PROJECT" iam service-accounts create ray-ft --display-name="ray-ft's machines"
gcloud projects add-iam-policy-binding "$PROJECT" --member="serviceAccount:$email" \
    --role=roles/compute.instanceAdmin.v1 --condition=None >/dev/null
gcloud --project="$PROJECT" iam service-accounts add-iam-policy-binding "$email" --member="serviceAccount:$email" \
    --role=roles/iam.serviceAccountUser >/dev/null
gcloud storage buckets describe "gs://$BUCKET" >/dev/null 2>&1 ||
    gcloud --project="$PROJECT" storage buckets create "gs://$BUCKET" --location="$REGION" \
        --uniform-bucket-level-access --public-access-prevention
gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --member="serviceAccount:$email" \
    --role=roles/storage.objectAdmin >/dev/null
echo "gcp: ready; in cluster/gcp.yaml: project_id: $PROJECT, and $email"

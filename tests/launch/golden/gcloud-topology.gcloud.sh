#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"

create() {
  gcloud compute tpus queued-resources create gpt2-tiny \
    --node-id=gpt2-tiny \
    --type=v4 \
    --topology=4x4x16 \
    --runtime-version=mine \
    --scopes=https://www.googleapis.com/auth/cloud-platform \
    --metadata-from-file=startup-script=gpt2-tiny.startup.sh
}

create
# job file of jaxformer launch for the run gpt2-tiny

#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"

create() {
  gcloud compute tpus queued-resources create gpt2-tiny \
    --node-id=gpt2-tiny \
    --accelerator-type=v4-8 \
    --runtime-version=tpu-ubuntu2204-base \
    --scopes=https://www.googleapis.com/auth/cloud-platform \
    --metadata-from-file=startup-script=gpt2-tiny.startup.sh
}

create
# job file of jaxformer launch for the run gpt2-tiny

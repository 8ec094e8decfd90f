#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"

create() {
  gcloud compute tpus queued-resources create gpt2-tiny \
    --node-count=2 \
    --node-prefix=gpt2-tiny \
    --accelerator-type=v5p-128 \
    --runtime-version=v2-alpha-tpuv5 \
    --service-account=a@p \
    --valid-until-duration=6h \
    --scopes=https://www.googleapis.com/auth/cloud-platform \
    --metadata-from-file=startup-script=gpt2-tiny.startup.sh
}

create
# job file of jaxformer launch for the run gpt2-tiny

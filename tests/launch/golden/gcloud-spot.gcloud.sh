#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"

create() {
  gcloud compute tpus queued-resources create gpt2-tiny \
    --zone=us-east5-a \
    --project=p \
    --node-id=gpt2-tiny \
    --accelerator-type=v6e-16 \
    --runtime-version=v2-alpha-tpuv6e \
    --spot \
    --scopes=https://www.googleapis.com/auth/cloud-platform \
    --metadata-from-file=startup-script=gpt2-tiny.startup.sh
}

state() {
  gcloud compute tpus queued-resources list --zone=us-east5-a --project=p --filter='name ~ /gpt2-tiny$' --format='value(state.state)'
}

remove() {
  gcloud compute tpus queued-resources delete gpt2-tiny --zone=us-east5-a --project=p --force --quiet
}

# The machines delete their resource when the run is over; a preempted one is left suspended.
if [ -z "$(state)" ]; then create; fi
while sleep "${POLL_SECONDS:-60}"; do
  now=$(state) || continue
  case "$now" in
    '') echo 'the run is over: gs://bucket/runs/gpt2-tiny'; exit 0 ;;
    SUSPENDED) echo 'preempted; requesting again'; remove; create ;;
    FAILED) echo 'the request failed' >&2; exit 1 ;;
  esac
done
# job file of jaxformer launch for the run gpt2-tiny

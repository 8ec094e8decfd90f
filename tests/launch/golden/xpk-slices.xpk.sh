#!/usr/bin/env bash
set -euo pipefail
xpk workload create \
  --workload=gpt2-tiny \
  --cluster=c \
  --project=p \
  --zone=us-east5-b \
  --tpu-type=v5litepod-64 \
  --num-slices=2 \
  --spot \
  --base-docker-image=python:3.12 \
  --script-dir=. \
  --priority=medium \
  --max-restarts=100 \
  --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 \
  '--command=python -m pip install --quiet '"'"'.[tpu,storage]'"'"' && exec jaxformer train gpt2-tiny --training.steps=2000 --optimizer.learning_rate=3e-4 --run.name=gpt2-tiny --run.dir=gs://bucket/runs'
# job file of jaxformer launch for the run gpt2-tiny

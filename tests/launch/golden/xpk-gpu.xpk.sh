#!/usr/bin/env bash
set -euo pipefail
xpk workload create \
  --workload=gpt2-tiny \
  --cluster=c \
  --device-type=h100-80gb-8 \
  --num-nodes=2 \
  --docker-image=python:3.12 \
  --priority=high \
  --max-restarts=100 \
  --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 \
  '--command=python -m pip install --quiet '"'"'jaxformer[cuda,storage] @ git+https://github.com/someone/jaxformer@0123abc'"'"' && exec jaxformer train gpt2-tiny --run.name=gpt2-tiny --run.dir=gs://bucket/runs'
# job file of jaxformer launch for the run gpt2-tiny

#!/usr/bin/env bash
set -uo pipefail
exec > >(tee -a /var/log/jaxformer.log) 2>&1
export HOME=/root
cd /root

setup() {
  export PATH="$HOME/.local/bin:$PATH" &&
  { command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; } &&
  uv venv --quiet --allow-existing --python 3.12 /root/jaxformer-env &&
  uv pip install --quiet --python /root/jaxformer-env 'jaxformer[tpu,storage] @ git+https://github.com/someone/jaxformer@0123abc' &&
  export PATH=/root/jaxformer-env/bin:$PATH
}

failures=0
code=1
if setup; then
  while true; do
    code=0
    jaxformer train gpt2-tiny --training.steps=2000 --optimizer.learning_rate=3e-4 --run.name=gpt2-tiny --run.dir=gs://bucket/runs || code=$?
    if [ "$code" -eq 75 ]; then
      echo 'preempted and saved; resuming'
    elif [ "$code" -ge 128 ] && [ "$failures" -lt 3 ]; then
      failures=$((failures + 1))
      sleep 30
    else
      break
    fi
  done
fi

# Worker 0 deletes the machines of all workers.
worker=$(curl -sf -H 'Metadata-Flavor: Google' http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
zone=$(curl -sf -H 'Metadata-Flavor: Google' http://metadata.google.internal/computeMetadata/v1/instance/zone)
gcloud storage cp /var/log/jaxformer.log gs://bucket/runs/gpt2-tiny.worker-"$worker".log
if [ "$worker" = 0 ]; then
  gcloud compute tpus queued-resources delete gpt2-tiny --zone="${zone##*/}" --force --quiet --async
fi
exit "$code"
# job file of jaxformer launch for the run gpt2-tiny

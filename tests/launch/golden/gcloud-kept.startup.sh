#!/usr/bin/env bash
set -uo pipefail
exec > >(tee -a /var/log/jaxformer.log) 2>&1
export HOME=/root
cd /root

setup() {
  export PATH="$HOME/.local/bin:$PATH" &&
  { command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; } &&
  uv venv --quiet --allow-existing --python 3.12 /root/jaxformer-env &&
  uv pip install --quiet --python /root/jaxformer-env 'jaxformer[tpu] @ git+https://github.com/someone/jaxformer@0123abc' &&
  export PATH=/root/jaxformer-env/bin:$PATH
}

failures=0
code=1
if setup; then
  while true; do
    code=0
    jaxformer train gpt2-tiny --run.name=gpt2-tiny --run.dir=runs || code=$?
    if [ "$code" -eq 75 ]; then
      echo 'preempted and saved; resuming'
    elif [ "$code" -ge 128 ] && [ "$failures" -lt 0 ]; then
      failures=$((failures + 1))
      sleep 30
    else
      break
    fi
  done
fi

exit "$code"
# job file of jaxformer launch for the run gpt2-tiny

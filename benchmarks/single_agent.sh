#!/usr/bin/env bash
# One script's offline policy with one agent that has all joints, the setting of the published
# single-agent scores: 3 seeds.
#
#     benchmarks/single_agent.sh SCRIPT ENV [FLAGS]
#     benchmarks/single_agent.sh otc_td3bc hopper-medium --offline-updates 30000
#
# Then: python -m benchmarks.offline_table runs/single_agent --csv FILE.csv
set -euo pipefail
script=$1 env=$2
shift 2
split=1x6
if [[ $env == hopper-* ]]; then split=1x3; fi
export OMP_NUM_THREADS=1
python "$script.py" --env "$env" --split $split --num-seeds 3 --deployments 0 --sampling uniform \
    --run-dir runs/single_agent "$@"

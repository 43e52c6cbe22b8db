#!/usr/bin/env bash
# Strategies from the same offline policies: 3 seeds, ten deployments.
#
#     benchmarks/strategies.sh SCRIPT ENV "STRATEGY, STRATEGY, ..." "OFFLINE FLAGS" "ONLINE FLAGS"
#     benchmarks/strategies.sh otc_awac hopper-medium "otc --distance embedding, uniform, offline" \
#         "--offline-updates 12000" "--finetune-updates 100 --deployment-steps 4000"
#
# Then: python -m benchmarks.curves runs/strategies/SCRIPT/ENV --csv FILE.csv --figure FILE.png
set -euo pipefail
script=$1 env=$2 strategies=$3 offline_flags=$4 online_flags=$5
export OMP_NUM_THREADS=1
common="--env $env --num-seeds 3 $offline_flags"

distance=
if [[ $strategies == *embedding* ]]; then distance="--distance embedding"; fi # trains the CVAE too
start=runs/strategies_start/$script
python "$script.py" $common --deployments 0 $distance --run-dir "$start"
offline=$(ls -d "$start/${env}__${script}__1__"* | tail -n 1)
IFS=, read -ra each <<< "$strategies"
for strategy in "${each[@]}"; do
    python "$script.py" $common --offline-checkpoint "$offline" --deployments 10 $online_flags \
        --sampling $strategy --run-dir "runs/strategies/$script/$env"
done

#!/usr/bin/env bash
# Strategies from the same offline policies; 3 seeds and ten deployments unless the flags say otherwise.
#
#     benchmarks/strategies.sh SCRIPT ENV "STRATEGY, STRATEGY, ..." "OFFLINE FLAGS" "ONLINE FLAGS"
#     benchmarks/strategies.sh otc_awac hopper-medium "otc --distance embedding, uniform, offline" \
#         "--offline-updates 12000" "--finetune-updates 100 --deployment-steps 4000"
#
# An offline policy of the same flags that is there already is taken. Then:
# python -m benchmarks.aggregate runs/strategies/SCRIPT/ENV --csv FILE.csv --out FILE.png
set -euo pipefail
script=$1 env=$2 strategies=$3 offline_flags=$4 online_flags=$5
export OMP_NUM_THREADS=1
if [[ " $offline_flags" != *" --num-seeds "* ]]; then offline_flags="--num-seeds 3 $offline_flags"; fi
common="--env $env $offline_flags"

distance=
if [[ $strategies == *embedding* ]]; then distance="--distance embedding"; fi # trains the CVAE too
flags=$(echo "$offline_flags $distance" | tr -cs 'a-zA-Z0-9.\n' _)
start=runs/strategies_start/$script/$env/$flags
if ! ls "$start"/*/offline.pt > /dev/null 2>&1; then # not of a start that was interrupted
    python "$script.py" $common --deployments 0 $distance --run-dir "$start"
fi
offline=$(dirname "$(ls "$start"/*/offline.pt | tail -n 1)")
IFS=, read -ra each <<< "$strategies"
for strategy in "${each[@]}"; do
    python "$script.py" $common --offline-checkpoint "$offline" --deployments 10 $online_flags \
        --sampling $strategy --run-dir "runs/strategies/$script/$env"
done

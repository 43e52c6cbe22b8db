#!/usr/bin/env bash
# OTC (both distances), uniform, balanced, online and the offline control, from the same offline
# policies: 3 seeds, five deployments of 2,000 updates. About two hours on two CPU cores.
#
#     benchmarks/bcq_strategies.sh ENV OFFLINE_UPDATES [FOLDER]
#     benchmarks/bcq_strategies.sh halfcheetah-medium 100000
#     benchmarks/bcq_strategies.sh hopper-medium-replay 50000
#
# Then: python -m benchmarks.curves FOLDER/ENV --csv FILE.csv --figure FILE.png
set -euo pipefail
env=$1 offline_updates=$2 folder=${3:-runs/strategies}
export OMP_NUM_THREADS=1
common="--env $env --num-seeds 3 --offline-updates $offline_updates"

offline=$(ls -d "$folder/$env/offline-policy/"*__1__* 2>/dev/null | head -n 1 || true)
if [ -z "$offline" ]; then
    python otc_bcq.py $common --deployments 0 --distance embedding --run-dir "$folder/$env/offline-policy"
    offline=$(ls -d "$folder/$env/offline-policy/"*__1__* | head -n 1)
fi
for strategy in "otc --distance embedding" "uniform" "otc --distance value" "online" "offline" "balanced"; do
    python otc_bcq.py $common --offline-checkpoint "$offline" --deployments 5 \
        --finetune-updates 2000 --sampling $strategy --run-dir "$folder/$env/strategies"
done

#!/usr/bin/env bash
# OMAR's comparison on one data set of its particle tasks: MA-ICQ, MA-TD3+BC, MA-CQL and OMAR, 5 seeds.
#
#     benchmarks/omar.sh ENV [FLAGS]
#     benchmarks/omar.sh simple-tag-medium --offline-updates 5000
#
# All four have the same networks, learning rates, discount and batches. Then:
# python -m benchmarks.offline_table runs/omar --csv FILE.csv
set -euo pipefail
env=$1
shift
export OMP_NUM_THREADS=1
common="--env $env --num-seeds 5 --deployments 0 --sampling uniform --eval-episodes 100 --run-dir runs/omar"
penalty="" sampler=""
case $env in # as released
halfcheetah-local-*) penalty="--penalise-policy" sampler="--refit elite --sampler-rounds 2 --sampler-samples 20" ;;
esac
python icq.py $common "$@"
python otc_td3bc.py $common --hidden-size 64 --batch-size 1024 --gamma 0.95 --tau 0.01 \
    --actor-learning-rate 3e-3 --critic-learning-rate 3e-3 "$@"
python omar.py $common --omar-coefficient 0 $penalty "$@"
python omar.py $common $penalty $sampler "$@"

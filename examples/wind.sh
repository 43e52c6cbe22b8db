#!/bin/sh
# An agent learned where its partner pushed at random; deployed, the partner has a policy. One offline
# policy, tuned by uniform draws and by OTC. Three seeds; ends with a table and a picture of returns.
set -e
flags="--env wind-random --dataset-size 100000 --num-seeds 3 --hidden-size 64 --bc-alpha 40 --gamma 0.9
    --actor-learning-rate 1e-3 --critic-learning-rate 1e-3 --offline-updates 5000 --eval-every 1000"
tune="--deployments 5 --finetune-updates 1000 --references 500"
out=runs/wind-$(date +%s)

python otc_td3bc.py $flags --deployments 0 --run-dir $out/offline
start=$(echo $out/offline/*__1__*)
for how in "--sampling uniform" "--distance residual"; do
    python otc_td3bc.py $flags $tune $how --offline-checkpoint "$start" --run-dir $out/tuned
done
python -m benchmarks.aggregate $out/tuned --curves --out $out/returns.png > $out/table.txt
tail -4 $out/table.txt
echo "picture: $out/returns.png"

#!/usr/bin/env bash
# The zoo goes on on one GPU in a stated time: six lambdas one after another, each from its last weights.
#   jobs/zoo-gpu.sh PHOTOS OUT SECONDS [--set train.steps=5000 ...]
# PHOTOS is a folder of photos; jobs/pack_photos.py makes it light enough to carry. OUT keeps base-LAMBDA.pth.tar, float16,
# 9 MB each, and the logs; the same command continues from them, those of oldest weights first. Another lambda begins while
# SECONDS leave as long as the last one took, and one that is killed keeps its old weights. About 85 s a lambda on an H200.
set -euo pipefail
photos=$1 out=$2 limit=$3
shift 3
lambdas=${LAMBDAS:-0.0018 0.0035 0.0067 0.013 0.025 0.0483}
configs=$(dirname "$0")/../configs
mkdir -p "$out"

start() { # the weights that a lambda goes on from: its own, or the shipped ones
    if [ -f "$out/base-$1.pth.tar" ]; then echo "$out/base-$1.pth.tar"; else echo "base-$1"; fi
}

age() { stat -c %Y "$out/base-$1.pth.tar" 2>/dev/null || echo 0; }

took=0
for lmbda in $(for one in $lambdas; do echo "$(age "$one") $one"; done | sort -n -s -k 1,1 | cut -d ' ' -f 2); do
    if ((took && SECONDS + took > limit)); then
        echo "lambda $lmbda is left for the next call: $((limit - SECONDS)) of $limit s are left, the last took $took s"
        continue
    fi
    began=$SECONDS
    lic-dist train "$configs/zoo.yaml" --set images.path="$photos" --set train.lmbda="$lmbda" \
        --set train.start="$(start "$lmbda")" --set train.out="$out/run-$lmbda" "$@"
    lic-dist export "$out/run-$lmbda" "$out/new.pth.tar" --half
    mv "$out/new.pth.tar" "$out/base-$lmbda.pth.tar"
    cat "$out/run-$lmbda/log.jsonl" >>"$out/log-$lmbda.jsonl"
    rm -r "$out/run-$lmbda"
    took=$((SECONDS - began))
    echo "lambda $lmbda took $took s"
done

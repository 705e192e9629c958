#!/usr/bin/env bash
# `moe-launch bench train` beside Hugging Face transformers, in one sitting: both sides in turn, several rounds, the best of each.
#
#   benches/train_beside_peer.sh [ROUNDS]        needs python3 with torch and transformers, or PYTHON=/path/to/python3
#
# Machines are noisy and noise only ever slows a side down, so the best round of each side is what is compared.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-5}
python=${PYTHON:-python3}
bench=(target/release/moe-launch bench train --preset moe-15m --device cpu --json)
root=()
[ "$(id -u)" -eq 0 ] && root=(--allow-run-as-root)

figure() { grep -o '"tokens_per_s": *[0-9.]*' | grep -o '[0-9.]*$' | sort -g | tail -1; }
ours=() pair=() peer=()
for round in $(seq "$rounds"); do
  ours+=("$("${bench[@]}" --threads 2 | figure)")
  peer+=("$("$python" benches/peers/hf_train.py --threads 2 | figure)")
  pair+=("$(mpirun "${root[@]}" -n 2 "${bench[@]}" --threads 1 --ep 2 | figure)")
  printf 'round %s: one process %.0f, two ranks %.0f, transformers %.0f tokens/s\n' "$round" "${ours[-1]}" "${pair[-1]}" "${peer[-1]}"
done
best() { printf '%s\n' "$@" | sort -g | tail -1; }
awk -v ours="$(best "${ours[@]}")" -v pair="$(best "${pair[@]}")" -v peer="$(best "${peer[@]}")" 'BEGIN {
  printf "best: one process %.0f, two ranks at EP=2 %.0f, transformers %.0f tokens/s\n", ours, pair, peer
  printf "one process / transformers: %.2f    two ranks / one process: %.2f\n", ours / peer, pair / ours
}'

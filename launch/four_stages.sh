#!/usr/bin/env bash
# The four stages one after another, each from the weights of the one before, and what they know of multiple choice.
#
#   launch/four_stages.sh                     the quickstart's: offline, four to ten minutes on two cores
#   launch/four_stages.sh full                the 250M's: FineWeb-Edu, UltraChat, MMLU's auxiliary_train, OpenHermes, from the hub
#   launch/four_stages.sh full --precision bfloat16 --optim.accumulate 1     flags after the name go to every stage
#
# Runs are written below the current directory, as are records. A stage that is done is not done again: the same command goes on
# where it was stopped.
set -euo pipefail

configs=$(cd "$(dirname "$0")/../configs" && pwd)
name=quickstart
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
  name=$1
  shift
fi
case $name in
  quickstart) stages=(quickstart quickstart_sft_v1 quickstart_sft_v2 quickstart_sft_v3) ;;
  full) stages=(pretrain sft_v1 sft_v2 sft_v3) ;;
  *) echo "error: $name is unknown: give quickstart or full" >&2; exit 2 ;;
esac

for stage in "${stages[@]}"; do
  echo "== $stage" >&2
  if [ "$name" = full ]; then
    python -m slimmoe_jax.data.prepare --config "$configs/$stage.py" "$@"
  fi
  python -m slimmoe_jax.train --config "$configs/$stage.py" "$@"
done

# The questions that the third stage held out, before it, after it and at the end. The table goes to the terminal.
questions=held-out:runs/${stages[2]}
for stage in "${stages[@]:1}"; do
  python -m slimmoe_jax.evaluate --checkpoint "runs/$stage" --tasks "$questions" --out "runs/$stage/multiple_choice.json"
done

#!/usr/bin/env bash
# Trains on the GPUs of this machine: looks for them, shows the plan, prepares the records where they are missing, and trains.
#
#   launch/single_gpu.sh                                   SlimMoE-250M: configs/pretrain.py in bfloat16, all 32 sequences at once
#   launch/single_gpu.sh --config configs/quickstart.py    any other; flags go to prepare and train alike
#   launch/single_gpu.sh --dry-run                         stops after the plan
#
# The same command goes on where it was stopped. JAX_PLATFORMS=cpu trains without a GPU.
set -euo pipefail

# JAX's own share, 75%, of a card of 40 GB is less than the 250M needs.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
configs=$(cd "$(dirname "$0")/../configs" && pwd)
case " $* " in
  *" --config"[\ =]*) ;;
  *) set -- --config "$configs/pretrain.py" --precision bfloat16 --optim.accumulate 1 "$@" ;;  # flags given after these win
esac

if [ "${JAX_PLATFORMS:-}" != cpu ]; then
  if ! command -v nvidia-smi > /dev/null || ! nvidia-smi --list-gpus >&2; then
    echo "error: nvidia-smi shows no GPU: mend the driver, or set JAX_PLATFORMS=cpu to train without one" >&2
    exit 2
  fi
  seen=$(python -c "import jax; print(jax.default_backend())")
  if [ "$seen" != gpu ]; then
    echo "error: JAX uses the $seen, not the GPU: pip install -e '.[cuda12]' in the environment of $(command -v python)" >&2
    exit 2
  fi
fi

words=()
dry_run=false
for word in "$@"; do
  if [ "$word" = --dry-run ]; then dry_run=true; else words+=("$word"); fi
done

python -m slimmoe_jax.train "${words[@]}" --dry-run
if $dry_run; then exit; fi
python -m slimmoe_jax.data.prepare "${words[@]}"
# exec: signals to this script reach the training, which saves and ends.
exec python -m slimmoe_jax.train "${words[@]}"

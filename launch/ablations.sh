#!/usr/bin/env bash
# Runs ablation studies: all of configs/ablations, or those that are named.
#
#   launch/ablations.sh --dry-run                                      what each would take
#   launch/ablations.sh --jobs 2                                       here, study after study, two arms at once
#   launch/ablations.sh routers dropout --launcher slurm --slurm slurm_partition=gpu gpus_per_node=1 timeout_min=240
#                                                                      all studies at once, each arm and seed a job of SLURM
#
# Flags go to every study. The same command goes on where it was stopped; results are in ablations/NAME/report.html.
set -euo pipefail

studies=$(cd "$(dirname "$0")/../configs/ablations" && pwd)
names=()
while [ $# -gt 0 ] && [[ $1 != -* ]]; do
  if [ "$1" = base ] || [ ! -f "$studies/$1.py" ]; then
    echo "error: $1 is no study in $studies" >&2
    exit 2
  fi
  names+=("$1")
  shift
done
if [ ${#names[@]} -eq 0 ]; then
  for path in "$studies"/*.py; do
    name=$(basename "$path" .py)
    if [ "$name" != base ]; then names+=("$name"); fi  # what the studies vary
  done
fi

start() { python -m slimmoe_jax.ablate --config "$studies/$1.py" --out "ablations/$1" "${@:2}" & }

# Studies run in the background, for a signal to this script to reach them: their arms save and end, and then they do.
stop() {
  for process in $(jobs -p); do kill -TERM "$process" 2>/dev/null || true; done
  wait
  exit "$1"
}
trap 'stop 143' TERM
trap 'stop 130' INT

at_once=false
case " $* " in
  *" --launcher slurm "* | *" --launcher=slurm "*) at_once=true ;;  # here they only submit and watch
esac
failed=()
started=()
finish() { wait "$2" || failed+=("$1"); }
for name in "${names[@]}"; do
  echo "== $name" >&2
  start "$name" "$@"
  started+=($!)
  if ! $at_once; then finish "$name" $!; fi
done
if $at_once; then
  for n in "${!names[@]}"; do finish "${names[n]}" "${started[n]}"; done
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi

"""What devices would send each other in a training step: the collectives of the compiled step and their bytes. Nothing runs.

    python benchmarks/collectives.py --devices 8 [--config configs/pretrain.py] [--fsdp 8] [--expert 4] [--rows 1]

The step is compiled for that many forced host devices, so the partitioner's choice of collectives is real, and what a GPU's
compiler would merge, split or overlap of them is not seen. A row is a kind of collective over groups of one size; bytes are
those of its results on one device.
"""

import argparse
import collections
import math
import os
import re
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--config", default="configs/pretrain.py")
parser.add_argument("--devices", type=int, default=8)
parser.add_argument("--rows", type=int, default=1, help="sequences on each device")
parser.add_argument("--layers", type=int, default=0, help="of the model; 0: the config's")
for axis in ("fsdp", "expert"):
    parser.add_argument(f"--{axis}", type=int, default=1)
args = parser.parse_args()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of the code for the CPU, which never runs

import jax  # noqa: E402
import numpy as np  # noqa: E402

from slimmoe_jax import config as config_lib  # noqa: E402
from slimmoe_jax import sharding, state, step  # noqa: E402
from slimmoe_jax.config import MeshConfig  # noqa: E402
from slimmoe_jax.progress import short  # noqa: E402

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1, "f64": 8, "s64": 8, "u64": 8}


def compiled_step() -> str:
    """The step's program, partitioned and optimised, as text."""
    config = config_lib.load(args.config)
    changes = {"mesh": MeshConfig(fsdp=args.fsdp, expert=args.expert), "data.batch_size": args.devices * args.rows}
    changes |= {"optim.accumulate": 1} | ({"model.layers": args.layers} if args.layers else {})
    # What `auto` is on a GPU. On a CPU, where this is compiled, it would be another dispatch.
    config = config_lib.override(config, changes | {"model.dispatch": "capacity"})
    mesh = sharding.make_mesh(config.mesh)
    like = state.abstract(config, mesh)
    shape = (config.data.batch_size, config.data.context + 1)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding.batch_sharding(mesh))}
    with sharding.use(mesh):
        return step.jit_train_step(config, mesh, end_token=0).lower(like, batch).compile().as_text()


def collectives(program: str) -> dict[tuple[str, int], list[int]]:
    """(kind, devices in a group) -> bytes of each one's results."""
    found = collections.defaultdict(list)
    for line in program.splitlines():
        match = re.search(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match[1])
            size = sum(SIZES.get(kind, 0) * int(np.prod([int(n) for n in dims.split(",") if n] or [1])) for kind, dims in shapes)
            found[match[2], group_size(line)].append(size)
    return found


def group_size(line: str) -> int:
    """Devices that take part in one group."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return listed[1].count(",") + 1
    # mesh['axis_0'=2,'axis_1'=4] {'axis_1'}
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\S+)? \{(.*?)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if counted:
        return int(counted[2])
    if "replica_groups=" in line and "replica_groups={}" not in line:
        raise ValueError(f"groups of an unknown form: {line}")
    return args.devices


def main() -> None:
    started = time.perf_counter()
    found = collectives(compiled_step())
    data = args.devices // (args.fsdp * args.expert)
    print(f"{args.config}, mesh data {data} x fsdp {args.fsdp} x expert {args.expert}, {args.rows} sequence(s) a device", end="")
    print(f"; jax {jax.__version__}; compiled in {time.perf_counter() - started:.0f} s\n")
    print("| collective | devices in a group | number | bytes a device and step |\n|---|---|---|---|")
    for (kind, group), sizes in sorted(found.items()):
        print(f"| {kind} | {group} | {len(sizes)} | {short(sum(sizes))} |")


if __name__ == "__main__":
    main()

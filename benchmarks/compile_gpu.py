"""What the compiler says of a training step for a GPU that is not here: memory and kernels. Nothing runs, nothing is timed.

    pip install -e ".[cuda12]"                                            # no GPU and no driver is needed
    python benchmarks/compile_gpu.py [--batches 32] [--attention cudnn xla] [--dispatch capacity grouped] [--dropout 0 0.1]

The 250M's step is compiled for one H100 (80 GB). Memory is what the compiler plans for the step's arguments, results
and temporaries; a running process also has what libraries and other programs keep. Kernels are not tuned, as that takes a GPU.
"""

import argparse
import itertools
import os
import re
import sys
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # else the plugin asks the driver for its version

import jax  # noqa: E402
import numpy as np  # noqa: E402
from common import header, machine, row  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402

from slimmoe_jax import attention, embedding, grouped, model, optim, sharding, state, step  # noqa: E402
from slimmoe_jax import config as config_lib  # noqa: E402
from slimmoe_jax.config import TrainConfig  # noqa: E402

ROOT = Path(__file__).parent.parent
# NVIDIA's figures for the H100 SXM, in the form that XLA takes.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 }  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def libraries_found() -> None:
    """Starts anew with the folders of NVIDIA's wheels where the loader looks: without a driver, the plugin does not add them."""
    folders = sorted({str(folder) for entry in sys.path for folder in Path(entry).glob("nvidia/*/lib")})
    if folders and folders[0] not in os.environ.get("LD_LIBRARY_PATH", ""):
        os.environ["LD_LIBRARY_PATH"] = ":".join([*folders, os.environ.get("LD_LIBRARY_PATH", "")])
        os.execv(sys.executable, [sys.executable, *sys.argv])


def target() -> Mesh:
    """A mesh of one H100."""
    try:
        topology = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
    except NotImplementedError as error:
        raise SystemExit(f"JAX's CUDA plugin is not here ({error}): pip install -e '.[cuda12]'") from None
    devices = np.array(topology.devices[:1]).reshape(1, 1, 1)
    return Mesh(devices, ("data", "fsdp", "expert"), axis_types=(AxisType.Auto,) * 3)


def compile_step(config: TrainConfig, kernel: attention.Kernel, mesh: Mesh):
    """The step as one H100 would have it."""
    like = state.abstract(config, mesh)
    shape = (config.data.batch_size, config.data.context + 1)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding.batch_sharding(mesh))}
    chosen = (  # what is chosen by the devices of this process
        mock.patch.object(attention, "resolve_kernel", lambda *_: kernel),
        mock.patch.object(model, "lookup", embedding.sorted_lookup),
        mock.patch.object(grouped, "_interpret", lambda: False),
    )
    with sharding.use(mesh), chosen[0], chosen[1], chosen[2]:
        run = step.make_train_step(config, state.build_model(config), optim.make(config), end_token=0)
        return jax.jit(run, donate_argnums=0).trace(like, batch).lower(lowering_platforms=("cuda",)).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[32], help="sequences of 2,048 tokens")
    parser.add_argument("--attention", nargs="+", default=["cudnn", "xla"], choices=("cudnn", "xla"))
    parser.add_argument("--dispatch", nargs="+", default=["capacity"])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0])
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"), help="float32 is for --attention xla")
    parser.add_argument("--layers", type=int, default=16)
    args = parser.parse_args()
    libraries_found()
    mesh = target()
    print(f"{machine('jax', 'jaxlib')}; compiled for {mesh.devices.flat[0].device_kind}, {args.layers} layers, {args.precision}\n")
    print(
        header(
            [
                "sequences",
                "attention",
                "dispatch",
                "dropout",
                "state, GiB",
                "temporaries, GiB",
                "in all, GiB",
                "kernels",
                "compile, s",
            ]
        )
    )
    base = config_lib.load(ROOT / "configs" / "pretrain.py")
    for batch, kernel, dispatch, dropout in itertools.product(args.batches, args.attention, args.dispatch, args.dropout):
        changes = {"data.batch_size": batch, "model.dispatch": dispatch, "model.dropout": dropout, "model.layers": args.layers}
        config = config_lib.override(base, changes | {"precision": args.precision, "optim.accumulate": 1})
        started = time.perf_counter()
        compiled = compile_step(config, kernel, mesh)
        seconds = time.perf_counter() - started
        plan = compiled.memory_analysis()
        kept, spare = plan.argument_size_in_bytes, plan.temp_size_in_bytes
        whole = kept + spare + plan.output_size_in_bytes - plan.alias_size_in_bytes
        kernels = len(re.findall(r"= \S+ (?:fusion|custom-call)\(", compiled.as_text()))
        sizes = [f"{size / 2**30:.1f}" for size in (kept, spare, whole)]
        print(row([batch, kernel, dispatch, f"{dropout:g}", *sizes, f"{kernels:,}", f"{seconds:.0f}"]), flush=True)


if __name__ == "__main__":
    main()

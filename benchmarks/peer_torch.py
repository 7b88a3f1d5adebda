"""A full training step against PyTorch: forward, backward, clipping and AdamW, on the same weights and tokens, taking turns.

    python benchmarks/peer_torch.py                                      # CPU: the quickstart's model, float32, some 6 minutes
    python benchmarks/peer_torch.py --form mixtral
    python benchmarks/peer_torch.py --size 250m --batches 8 16 32        # one GPU, bfloat16

Two forms of the model, both with top-2 routing and no dropout:
- slimmoe: as the config has it; the peer is `torch_slimmoe.py`, plain PyTorch, eager and compiled.
- mixtral: gated experts of two thirds the width, uniform kv heads, rotary positions everywhere, renormalised gates: about as many
  parameters and FLOPs, and what Hugging Face's MixtralForCausalLM computes, so it is a peer as well.

Each turn of a side is a fresh process. First each way to compute experts, and each micro-batch asked for, has one turn; the fastest
of each side then alternate. In bfloat16 PyTorch holds bfloat16 weights with float32 masters, which a fused AdamW updates. The first
loss of every turn must agree with that of our dense oracle, or there is no table. Ratios are of neighbouring turns.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from common import header, machine, mixtral_config, on_gpu, row, spread, zipf_tokens

from slimmoe_jax import config as config_lib
from slimmoe_jax import host
from slimmoe_jax.config import TrainConfig

ROOT = Path(__file__).parent.parent
CONFIGS = {"quickstart": "quickstart.py", "250m": "pretrain.py"}
FORMS = ("slimmoe", "mixtral")
SIDES = ("slimmoe_jax", "torch", "mixtral")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the first loss, relative
SPEC = "PEER_TORCH_SPEC"  # tells a process which side it is
BATCHES = 64  # different ones, gone through again and again


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to train the model."""

    name: str  # of SIDES
    compiled: bool = True
    experts: str = ""  # how they are computed; empty: the side's own choice
    batch: int = 8  # sequences a step
    keeps_memory: bool = False  # on a CPU: ours as our training command does, PyTorch on one heap, its best

    @property
    def label(self) -> str:
        if self.name == "slimmoe_jax":
            return f"slimmoe_jax, {self.experts}"
        kind = {"torch": "plain PyTorch", "mixtral": "HF Mixtral"}[self.name]
        kept = ", freed memory kept" if self.keeps_memory else ""
        return f"{kind}, {'torch.compile' if self.compiled else 'eager'}, {self.experts}{kept}"


def model_config(size: str, form: str, precision: str, batch: int, layers: int, context: int) -> TrainConfig:
    """The config that both sides train."""
    config = config_lib.load(ROOT / "configs" / CONFIGS[size])
    changes = {"model.router.kind": "top_k", "model.router.max_experts": 2, "model.dropout": 0.0, "data.batch_size": batch}
    changes |= {"precision": precision, "optim.accumulate": 1, "optim.skip_sigma": 0.0}
    changes |= {"optim.warmup_steps": 0, "optim.schedule": "wsd", "optim.schedule_steps": 1_000_000, "optim.learning_rate": 1e-4}
    changes |= {"model.layers": layers or config.model.layers, "data.context": context or config.data.context}
    if form == "mixtral":
        mean_kv = sum(config.model.layer_kv_heads) // config.model.layers
        changes |= {"model.gated": True, "model.expert_hidden": config.model.expert_hidden * 2 // 3 // 8 * 8}
        changes |= {"model.kv_heads": (mean_kv,), "model.rotary": (1.0,), "model.router.renormalize": True}
    return config_lib.override(config, changes)


# --- one side, in a process of its own -------------------------------------------------------------------------------


def train_jax(side: Side, config: TrainConfig, weights: Path) -> Callable[[int], float]:
    """Builds our side. The function trains so many steps and returns the first one's loss."""
    import jax

    from slimmoe_jax import sharding, state, step

    if side.experts:
        config = config_lib.override(config, {"model.dispatch": side.experts})
    sharding.cache_programs(config.compilation_cache)
    mesh = sharding.make_mesh(config.mesh)
    current = state.create(config, mesh)
    run = step.jit_train_step(config, mesh, end_token=0)
    feed = itertools.cycle({"tokens": tokens} for tokens in zipf_tokens(config, BATCHES))

    def train(steps: int) -> float:
        nonlocal current
        found = []
        with sharding.use(mesh):
            for _ in range(steps):
                current, metrics = run(current, sharding.put_batch(next(feed), mesh))
                found.append(metrics["loss"])
        jax.block_until_ready(current)
        return float(found[0])

    return train


def train_torch(side: Side, config: TrainConfig, weights: Path) -> Callable[[int], float]:
    """Builds a side of PyTorch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32, as JAX has it
    network = _mixtral(side, config) if side.name == "mixtral" else _plain(side, config)
    with np.load(weights) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    network.load(tensors)
    network = network.to(device=device, dtype=getattr(torch, config.precision))
    loss_of = torch.compile(network) if side.compiled else network
    update = _optimizer(network, config)
    feed = itertools.cycle(torch.from_numpy(tokens).long() for tokens in zipf_tokens(config, BATCHES))

    def train(steps: int) -> float:
        found = []
        for _ in range(steps):
            tokens = next(feed).to(device, non_blocking=True)
            loss, auxiliary = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            (loss + auxiliary).backward()
            update()
            found.append(loss.detach())
        if device == "cuda":
            torch.cuda.synchronize()
        return float(found[0])

    return train


def _plain(side: Side, config: TrainConfig):
    from torch_slimmoe import TorchSlimMoE

    return TorchSlimMoE(config.model, side.experts)


def _mixtral(side: Side, config: TrainConfig):
    """Hugging Face's Mixtral with the same losses: cross-entropy, and its own balance loss."""
    import torch.nn.functional as F
    import transformers
    from torch import nn
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = config.model
    hf_config = mixtral_config(
        model, config.data.context, experts_implementation=side.experts, output_router_logits=True, use_cache=False
    )

    class Mixtral(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = transformers.MixtralForCausalLM(hf_config)

        def load(self, tensors):
            kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("e_score_correction_bias")}
            self.inner.load_state_dict(kept, strict=True)

        def forward(self, tokens, targets):
            out = self.inner.model(tokens, output_router_logits=True)
            logits = self.inner.lm_head(out.last_hidden_state).float()
            balance = load_balancing_loss_func(out.router_logits, model.experts, model.router.max_experts)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            return loss, model.router.balance_weight * balance

    return Mixtral()


def _optimizer(network, config: TrainConfig) -> Callable[[], None]:
    """Clips, updates, and clears the gradients; bfloat16 weights follow float32 masters."""
    import torch

    weights = list(network.parameters())
    masters = weights if config.precision == "float32" else [w.detach().float().requires_grad_() for w in weights]
    decayed, rest = [w for w in masters if w.ndim > 1], [w for w in masters if w.ndim <= 1]
    optim = config.optim
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), eps=optim.epsilon, fused=True,
    )  # fmt: skip

    def update() -> None:
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                master.grad = weight.grad.float()
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, optim.clip_norm, foreach=True)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        if masters is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)

    return update


def work(side: Side, config: TrainConfig, weights: Path, steps: int, warmup: int) -> None:
    """Trains, and prints the first step's loss, the seconds to build and compile, seconds a step, and the peak of memory."""
    started = time.perf_counter()
    build = train_jax if side.name == "slimmoe_jax" else train_torch
    train = build(side, config, weights)
    loss = train(1)
    answer = {"loss": loss, "build_seconds": time.perf_counter() - started}
    train(warmup)
    started = time.perf_counter()
    train(steps)
    answer |= {"seconds": (time.perf_counter() - started) / steps, "peak": peak_bytes(side)}
    print(json.dumps(answer), flush=True)


def peak_bytes(side: Side) -> int:
    """The most memory that the device has held; 0 on a CPU, whose processes share their pages with the libraries'."""
    if side.name == "slimmoe_jax":
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def write_weights(config: TrainConfig, path: Path) -> None:
    """Initial weights by their exported names, and the first batch's loss by the dense oracle, as "loss"."""
    import jax

    from slimmoe_jax import sharding, state, step
    from slimmoe_jax.conversion import names

    mesh = sharding.make_mesh(config.mesh)
    fresh = state.create(config, mesh)
    with sharding.use(mesh):
        evaluate = jax.jit(step.make_eval_step(config, state.build_model(config), end_token=0))
        nats, targets = evaluate(fresh.params, fresh.router, sharding.put_batch({"tokens": zipf_tokens(config, 1)[0]}, mesh))
    router = {"threshold": fresh.router.threshold, "bias": fresh.router.bias}
    tensors = names.to_theirs(config.model, jax.device_get(fresh.params), jax.device_get(router))
    np.savez(path, **tensors)
    print(json.dumps({"loss": float(nats) / float(targets), "device": jax.devices()[0].device_kind}), flush=True)


# --- all sides -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What a side did, turn by turn."""

    side: Side
    rates: list[float]  # tokens/s
    build_seconds: list[float]
    peak: int  # bytes


def candidates(form: str, sizes: list[int], gpu: bool, sides: Sequence[str] = SIDES) -> list[list[Side]]:
    """Sides to try. Of each list the fastest is compared."""
    ours = ("capacity", "grouped") if gpu else ("ragged", "capacity", "dense")
    theirs = {"torch": ("grouped", "dense") if gpu else ("dense", "loop", "grouped")}
    if form == "mixtral":
        theirs["mixtral"] = ("grouped_mm",) if gpu else ("grouped_mm", "eager")
    theirs = {name: ways for name, ways in theirs.items() if name in sides}
    groups = [[Side("slimmoe_jax", True, experts, size, True) for experts in ours for size in sizes]]
    for (name, ways), compiled, keeps in itertools.product(theirs.items(), (False, True), (False,) if gpu else (False, True)):
        groups.append([Side(name, compiled, way, size, keeps) for way in ways for size in sizes])
    return groups


class Bench:
    """Runs sides, each turn in a fresh process, so that each has the machine's memory to itself."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self._args, self._folder, self._expected = args, folder, {}
        self.device = ""

    def turns(self, sides: list[Side], rounds: int) -> dict[Side, Result]:
        """The sides one after the other, so many times over. One that cannot run is named and left out."""
        results: dict[Side, Result] = {side: Result(side, [], [], 0) for side in sides}
        for _ in range(rounds):
            for side, result in list(results.items()):
                try:
                    answer = self._run({"side": dataclasses.asdict(side)}, side.batch)
                except SideError as error:
                    print(f"{side.label}, batch {side.batch}: does not run: {error}", file=sys.stderr, flush=True)
                    del results[side]
                    continue
                self._check(side, answer["loss"])
                result.rates.append(side.batch * self._args.context / answer["seconds"])
                result.build_seconds.append(answer["build_seconds"])
                result.peak = max(result.peak, answer["peak"])
        return results

    def expected(self, batch: int) -> float:
        """The first loss of a batch by the dense oracle; writes the initial weights the first time."""
        if batch not in self._expected:
            answer = self._run({"side": None}, batch)
            self.device, self._expected[batch] = answer["device"], answer["loss"]
        return self._expected[batch]

    def _check(self, side: Side, loss: float) -> None:
        """Stops where a side does not compute the model. Capacity may drop a few choices, which costs little at the start."""
        expected = self.expected(side.batch)
        allowed = max(TOLERANCE[self._args.precision], 1e-2 if side.experts == "capacity" else 0)
        if not abs(loss / expected - 1) <= allowed:
            raise SystemExit(f"{side.label}: the first loss is {loss:.5f}, the oracle's {expected:.5f}; there is no table")

    def _run(self, what: dict, batch: int) -> dict:
        args = self._args
        spec = what | {"size": args.size, "form": args.form, "precision": args.precision, "batch": batch, "layers": args.layers}
        spec |= {"weights": str(self._folder / "weights.npz"), "steps": args.steps, "warmup": args.warmup, "context": args.context}
        environment = os.environ | {SPEC: json.dumps(spec), "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "HF_HUB_OFFLINE": "1"}
        environment |= {"JAX_TRACEBACK_FILTERING": "off"}  # an error's last line is then its message
        done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SideError((done.stderr.strip().splitlines() or ["no message"])[-1])
        return json.loads(done.stdout.splitlines()[-1])


class SideError(Exception):
    """A side's process failed; the message is its last line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=CONFIGS, default="quickstart")
    parser.add_argument("--form", choices=FORMS, default="slimmoe")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="those to compare with ours (default: all)")
    parser.add_argument("--precision", choices=TOLERANCE, default="", help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[8], help="sequences a step to try (default: %(default)s)")
    parser.add_argument("--context", type=int, default=0, help="tokens a sequence; 0: the config's")
    parser.add_argument("--layers", type=int, default=0, help="0: the config's")
    for name, default in (("rounds", 5), ("steps", 20), ("warmup", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    args = parser.parse_args()
    gpu = on_gpu()
    args.precision = args.precision or ("bfloat16" if gpu else "float32")
    args.context = args.context or config_lib.load(ROOT / "configs" / CONFIGS[args.size]).data.context
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for batch in args.batches:
            bench.expected(batch)
        print(machine("jax", "torch", "transformers", device=bench.device if gpu else ""))
        print(
            f"{args.size}, {args.form} form, {args.precision}, context {args.context}; {args.rounds} turns of {args.steps} steps\n"
        )
        print("One turn of each, to choose:\n")
        print(header(["side", "batch", "tokens/s"]), flush=True)
        chosen = []
        for group in candidates(args.form, args.batches, gpu, args.sides):
            tried = bench.turns(group, 1)
            for side, result in tried.items():
                print(row([side.label, side.batch, f"{result.rates[0]:,.0f}"]), flush=True)
            chosen += sorted(tried, key=lambda side: -tried[side].rates[0])[:1]
        results = bench.turns(chosen, args.rounds)
    print("\nThe fastest of each, in turns:\n")
    print(table(list(results.values())))


def table(results: list[Result]) -> str:
    """Medians with lowest and highest, and our rate over each one's: the median of the turns' ratios."""
    lines = [header(["side", "batch", "tokens/s", "ours / this", "build and compile, s", "peak memory, GiB"])]
    ours = results[0].rates
    for result in results:
        ratios = [a / b for a, b in zip(ours, result.rates, strict=True)]
        memory = f"{result.peak / 2**30:.1f}" if result.peak else "-"
        build = f"{result.build_seconds[-1]:.0f}"
        lines.append(row([result.side.label, result.side.batch, spread(result.rates), spread(ratios, ".2f"), build, memory]))
    return "\n".join(lines)


def run_spec() -> None:
    """What a process of one side does."""
    spec = json.loads(os.environ[SPEC])
    config = model_config(spec["size"], spec["form"], spec["precision"], spec["batch"], spec["layers"], spec["context"])
    if spec["side"] is None:
        write_weights(config, Path(spec["weights"]))
    else:
        side = Side(**spec["side"])
        if side.keeps_memory and side.name == "slimmoe_jax":
            host.prepare()
        elif side.keeps_memory:
            host.keep_freed_memory(one_heap=True)
        work(side, config, Path(spec["weights"]), spec["steps"], spec["warmup"])


if __name__ == "__main__":
    run_spec() if SPEC in os.environ else main()

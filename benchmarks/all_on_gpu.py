"""All that the other benchmarks measure on one GPU, what tells most first, as far as the time goes.

    python benchmarks/all_on_gpu.py                                # about an hour, into ./gpu-results
    python benchmarks/all_on_gpu.py --minutes 9 --out DIR
    python benchmarks/all_on_gpu.py --only step peer

For a machine that is had by the hour. Each part is a command of its own and writes to DIR/PART.txt as it goes; one that fails or
outlasts its share is ended with all its processes, keeps the rows it had, and the next one starts. The last table, kept in
DIR/summary.txt, says what became of each. Ends with 1 if a part failed or none was begun.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import header, on_gpu, row

ROOT = Path(__file__).parent.parent
LEAST_SECONDS = 20  # too little to start anything
KERNEL_TESTS = [f"tests/test_{name}.py" for name in ("attention", "grouped", "experts")]
# The tests' tolerances are float32's, and their own default is a CPU.
PRECISE = {"JAX_PLATFORMS": "cuda", "JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    seconds: int  # its share: more than it should take
    arguments: tuple[str, ...]  # of Python
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # beside this process's

    @classmethod
    def benchmark(cls, name: str, seconds: int, command: str) -> "Part":
        script, *options = command.split()
        return cls(name, seconds, (str(ROOT / "benchmarks" / script), *options))


# First whether the kernels are right, then the aims: our step, Hugging Face's, dropout and a dense model beside it; then the rest.
PARTS = (
    Part("kernels", 150, ("-m", "pytest", "-n0", *KERNEL_TESTS), PRECISE),
    Part.benchmark("step", 300, "train_step.py --dispatch capacity grouped"),
    Part.benchmark("peer", 600, "peer_torch.py --size 250m --form mixtral --batches 16 --sides slimmoe_jax mixtral --rounds 3"),
    Part.benchmark("dropout_dense", 400, "train_step.py --dropout 0.1 --dense"),
    Part.benchmark("parts", 200, "train_step.py --breakdown"),
    Part.benchmark("attention", 120, "attention.py"),
    Part.benchmark("dispatch", 120, "dispatch.py"),
    Part.benchmark("batches", 600, "train_step.py --batches 8 16 64 --dispatch capacity grouped"),
    Part.benchmark("float32", 300, "train_step.py --precision float32 --batches 16"),
    Part.benchmark("decode", 300, "decode.py --variants"),
    Part.benchmark("generate", 300, "decode.py --device gpu --dtype bfloat16"),
    Part.benchmark("precision", 900, "precision.py --seeds 0 1"),
    Part.benchmark("growth", 900, "growth.py"),
    Part.benchmark("peers", 1800, "peer_torch.py --size 250m --batches 8 16 32"),
)


def main() -> None:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="in all (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="(default: %(default)s)")
    args = parser.parse_args()
    if not on_gpu():
        raise SystemExit("no NVIDIA GPU here (nvidia-smi is not found): run the benchmarks one by one, see benchmarks/")
    raise SystemExit(run([part for part in PARTS if part.name in args.only], 60 * args.minutes, args.out))


def run(parts: list[Part], seconds: float, out: Path) -> int:
    """Runs parts in order until the time is over; the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + seconds
    lines, outcomes = [header(["part", "seconds", "outcome"])], []
    for part in parts:
        started = time.monotonic()
        left = ends - started
        outcomes.append(_one(part, min(left, part.seconds), out / f"{part.name}.txt") if left >= LEAST_SECONDS else "not begun")
        lines.append(row([part.name, f"{time.monotonic() - started:.0f}", outcomes[-1]]))
        (out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    return int(any(outcome.startswith("failed") for outcome in outcomes) or set(outcomes) == {"not begun"})


def _one(part: Part, seconds: float, path: Path) -> str:
    """Runs a part, prints what it wrote, and says how it ended."""
    print(f"== {part.name}: python {' '.join(part.arguments)}", flush=True)
    with path.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *part.arguments], cwd=ROOT, env=os.environ | part.environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
            outcome = "done" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {seconds:.0f} s"
        finally:  # also what a part that ended left behind, and all of it at Ctrl-C
            _end(process)
    print(path.read_text(errors="replace"), flush=True)
    return outcome


def _end(process: subprocess.Popen) -> None:
    """Ends a process with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


if __name__ == "__main__":
    main()

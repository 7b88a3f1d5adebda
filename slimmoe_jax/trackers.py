"""What a run writes while it trains: `metrics.jsonl`, and what else it is followed with: TensorBoard, trackio, Weights & Biases.

`metrics.jsonl` is the record and always there. The others show the same rows. They come with the extra `track`, work without a
network, and may fail: one that does is left out with one line, and the training goes on.

Curves are named GROUP/NAME:
  train/          losses, gradient norm, learning rate
  validation/     loss, bits a byte
  performance/    tokens a second, MFU, memory
  routing/        what routing gives by layer, as the mean over layers
  layers/         the same by layer, layers/NAME/layer_00
  routing_map     a picture at each evaluation: load by layer and expert, tokens by their number of experts
  sample          the text that is generated at each evaluation
"""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import io
import json
import os
import secrets
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slimmoe_jax import config as config_lib
from slimmoe_jax import files, metrics
from slimmoe_jax.config import InputError, TrainConfig
from slimmoe_jax.progress import say
from slimmoe_jax.terminal import printable

PROJECT = "slimmoe_jax"  # under which trackio and Weights & Biases list the runs
GROUPS = {"validation_loss": "validation/loss", "validation_bits_per_byte": "validation/bits_per_byte"}
GROUPS |= {name: f"performance/{name}" for name in ("tokens_per_second", "mfu", "mfu_palm", "peak_memory_bytes")}
GROUPS |= {name: f"routing/{name}" for name in ("threshold", "l1_weight")}
Row = Mapping[str, Any]


class Tracker(Protocol):
    """Where rows go. A row holds "step", numbers, arrays by layer ([N], "load" [N, E]) and at an evaluation "sample", a text."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


def check(config: TrainConfig) -> None:
    """Raises InputError where the library of one of `config.trackers` is not installed."""
    for name in config.trackers:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as W&B leaves behind, is no library
            raise InputError(f'trackers = {name}: {name} is not installed: pip install "slimmoe_jax[track]", or leave it out')


class Recorder:
    """The tracker of a run: `metrics.jsonl`, then each of `config.trackers` that still works.

    Of several processes only the first has one.
    """

    def __init__(self, config: TrainConfig, workdir: Path, start: int):
        """`start` is the step that the run goes on from; 0 for one that begins."""
        self._jsonl = metrics.JsonlWriter(workdir / "metrics.jsonl", start)
        self._others: dict[str, Tracker] = {}
        for name in dict.fromkeys(config.trackers):
            self._guarded(name, "cannot start", self._start, name, config, workdir, start)

    def write(self, row: Row) -> None:
        self._jsonl.write(row)
        for name, tracker in list(self._others.items()):
            self._guarded(name, f"failed at step {row['step']}", tracker.write, row)

    def close(self) -> None:
        self._jsonl.close()
        for name, tracker in list(self._others.items()):
            self._guarded(name, "failed at its end", tracker.close)

    def _start(self, name: str, config: TrainConfig, workdir: Path, start: int) -> None:
        self._others[name] = TRACKERS[name](config, workdir, start)

    def _guarded(self, name: str, what: str, action: Callable[..., None], *arguments: Any) -> None:
        """Whatever a tool raises, it is left out from then on."""
        try:
            action(*arguments)
        except Exception as error:
            self._others.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"warning: tracker {name} {what} ({reason}) and is left out; metrics.jsonl goes on")


# --- the tools -------------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in WORKDIR/tensorboard, by TensorBoard's own writer.

    That writer raises what its thread meets, such as a full disk; tensorboardX's (2.6) waits for ever on a thread that has died.
    """

    def __init__(self, config: TrainConfig, workdir: Path, start: int):
        import matplotlib.image
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._text, self._encode = Event, Summary, text_pb, matplotlib.image.imsave
        self._writer = EventFileWriter(str(workdir / "tensorboard"), flush_secs=10)
        # Readers then forget what an earlier start wrote past its checkpoint.
        self._writer.add_event(Event(wall_time=time.time(), step=start + 1, session_log=SessionLog(status=SessionLog.START)))
        self._add(start, hparams_pb(flat(config), trial_id=str(workdir)))

    def write(self, row: Row) -> None:
        summary = self._summary()
        for tag, value in scalars(row).items():
            summary.value.add(tag=tag, simple_value=value)
        if (pixels := routing_map(row)) is not None:
            png = io.BytesIO()
            self._encode(png, pixels, format="png")
            height, width, channels = pixels.shape
            image = self._summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue())
            summary.value.add(tag="routing_map", image=image)
        self._add(row["step"], summary)
        if "sample" in row:
            self._add(row["step"], self._text("sample", verbatim(row["sample"])))

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, summary: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))


class Trackio:
    """A run of trackio, in its own database on this machine unless its environment variables say otherwise."""

    def __init__(self, config: TrainConfig, workdir: Path, start: int):
        import trackio

        self._library, self._mark = trackio, Mark.of(workdir, "trackio", start)
        with redirect_stdout(io.StringIO()):  # it advertises its commands
            name = f"{workdir.absolute().name}-{self._mark.run}"
            self._run = trackio.init(PROJECT, name=name, config=flat(config), resume="allow", embed=False)
        say(f'trackio run {name}: trackio show --project "{PROJECT}"')

    def write(self, row: Row) -> None:
        if not self._mark.passes(row["step"]):
            return
        self._run.log(shown(row, self._library, self._text), step=row["step"])

    def _text(self, text: str) -> Any:
        return self._library.Markdown(verbatim(text))

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._library.finish()


class Wandb:
    """A run of Weights & Biases, in WORKDIR/wandb. Without an account, or a way to it, it is kept there for `wandb sync`."""

    def __init__(self, config: TrainConfig, workdir: Path, start: int):
        import wandb

        self._library, self._mark = wandb, Mark.of(workdir, "wandb", start)
        settings = wandb.setup(wandb.Settings(silent=True)).settings  # as its environment variables and files have it
        mode: Any = settings.mode
        why = f"its mode is {settings.mode}"
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode, why = "offline", "no key is set: wandb login"
        start_run: dict[str, Any] = {
            "project": settings.project or PROJECT,
            "name": settings.run_name or workdir.absolute().name,
            "id": self._mark.run,
            "resume": "allow",
            "dir": os.environ.get("WANDB_DIR") or str(workdir),
            "config": config_lib.to_json(config),
            "settings": wandb.Settings(silent=True, console="off"),  # the progress line is no log
        }
        try:
            self._run = wandb.init(mode=mode, **start_run)
        except wandb.errors.CommError as error:
            why = f"it cannot be reached: {config_lib.reason(error)}"
            wandb.teardown()  # which still holds the run's name
            self._run = wandb.init(mode="offline", **start_run)
        if self._run.offline:
            say(f"wandb records offline ({why}); to send it: wandb sync {shlex.quote(str(Path(self._run.dir).parent))}")
        else:
            say(f"wandb run {self._run.url}")

    def write(self, row: Row) -> None:
        if not self._mark.passes(row["step"]):
            return
        self._run.log(shown(row, self._library, self._text), step=row["step"], commit=True)

    def _text(self, text: str) -> Any:
        return self._library.Html(f"<pre>{html.escape(text)}</pre>")

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrainConfig, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


@dataclasses.dataclass
class Mark:
    """Which run of a tool a workdir is, and the last step that the tool has got. Kept in WORKDIR/trackers/TOOL.json.

    These tools take nothing back. A run that goes on from a checkpoint repeats the steps after it, exactly, and those that the tool
    has are not sent again.
    """

    path: Path
    run: str  # drawn once; a folder's name may be used again, on this machine or another
    step: int

    @classmethod
    def of(cls, workdir: Path, tool: str, start: int) -> Mark:
        """The one that is kept; a new one where there is none, and for a run that begins."""
        path = workdir / "trackers" / f"{tool}.json"
        if start and path.exists():
            try:
                kept = files.read_json(path)
                return cls(path, str(kept["run"]), int(kept["step"]))
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                say(f"warning: {path} is damaged ({config_lib.reason(error)}): {tool} gets the rest as another run")
        path.parent.mkdir(exist_ok=True)
        return cls(path, secrets.token_hex(4), 0)

    def passes(self, step: int) -> bool:
        """Whether the tool has yet to get this step; it counts as sent from then on."""
        if step <= self.step:
            return False
        self.step = step
        files.write_json(self.path, {"run": self.run, "step": step})
        return True


# --- what they show --------------------------------------------------------------------------------------------------


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row by GROUP/NAME. A value that is unknown is left out; one that is not finite stays so."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if name == "step" or value is None or isinstance(value, str):
            continue
        values = np.asarray(value, dtype=float)
        if values.ndim == 0:
            found[GROUPS.get(name, f"train/{name}")] = float(values)
        elif values.ndim == 1:  # by layer
            found[f"routing/{name}"] = float(values.mean())
            found |= {f"layers/{name}/layer_{layer:02}": float(number) for layer, number in enumerate(values)}
    return found


def routing_map(row: Row) -> np.ndarray | None:
    """A picture of the row's routing, [height, width, 4] uint8. None where the row has no evaluation, or the model no routers."""
    if not {"validation_loss", "load", "experts_histogram"} <= row.keys():
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, since few commands draw
    from matplotlib.figure import Figure

    load = np.asarray(row["load"], dtype=float)  # [N, E]
    histogram = np.asarray(row["experts_histogram"], dtype=float)  # [N, K + 1]
    layers, experts = load.shape
    figure = Figure(figsize=(7.5, 1.3 + 0.22 * layers), layout="constrained", dpi=100)
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _map(left, load, 2 / experts, f"share of the choices (even: {1 / experts:.3g})", "expert")
    _map(right, histogram, 1.0, "share of the tokens", "experts a token")
    canvas.draw()
    return np.array(canvas.buffer_rgba())


def shown(row: Row, library: Any, as_text: Callable[[str], Any]) -> dict[str, Any]:
    """What `library`, trackio or wandb, gets of a row: its numbers, its routing map and, in the form of `as_text`, its sample."""
    values: dict[str, Any] = dict(scalars(row))
    if (pixels := routing_map(row)) is not None:
        values["routing_map"] = library.Image(pixels, caption=f"step {row['step']}")
    if "sample" in row:
        values["sample"] = as_text(row["sample"])
    return values


def _map(axes: Any, values: np.ndarray, most: float, title: str, x: str) -> None:
    """Rows are layers. The scale is fixed, so that pictures of different steps can be compared."""
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0, vmax=most)
    axes.set_title(title, fontsize=9)
    axes.set(xlabel=x, ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(image, ax=axes, extend="max" if most < 1 else "neither")


def flat(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """The config by dotted name; a list as JSON."""

    def leaves(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in tree.items():
            if isinstance(value, Mapping):
                found |= leaves(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = json.dumps(value) if isinstance(value, list) else value
        return found

    return leaves(config_lib.to_json(config), "")


def verbatim(text: str) -> str:
    """Text as Markdown that shows it as it is: a block of code. Control characters, some of which end lines, are escapes."""
    return "\n".join("    " + line for line in printable(text).split("\n"))

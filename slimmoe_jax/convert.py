"""Converts a run to a Hugging Face folder, and such a folder to a run.

    python -m slimmoe_jax.convert --checkpoint RUN[/STEP|/best] --out DIR [--dtype bfloat16] [--format pt] [--push-to-hub NAME]
    python -m slimmoe_jax.convert --from-hf DIR --out RUN

DIR is written beside its place, checked by loading it in a fresh process, and only then given its name. Weights that are not
finite, or that --dtype makes infinite, are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from slimmoe_jax import checkpoint, cli, decoding, files, locking, sharding, state, validation
from slimmoe_jax import config as config_lib
from slimmoe_jax.checkpoint import Run
from slimmoe_jax.config import InputError, MeshConfig, ModelConfig, TrainConfig
from slimmoe_jax.conversion import card, configs, names, parity
from slimmoe_jax.conversion import tokenizer as tokenizer_files
from slimmoe_jax.data import records, stdlib, tokenizers
from slimmoe_jax.data.tokenizers import Tokenizer
from slimmoe_jax.progress import say, short, waiting
from slimmoe_jax.routing import RouterState
from slimmoe_jax.sampling import Sampling

SHIPPED = Path(__file__).with_name("hf")
# What of a run transformers has no place for: the training config and the controllers. With it a folder comes back as it went.
TRAINING_FILE = "slimmoe_jax.json"
_KEPT_OF_ROUTER = ("integral", "l1_weight")  # the rest is among the tensors
SUMS_FILE = "SHA256SUMS"  # as `sha256sum --check` reads it


@dataclasses.dataclass(frozen=True)
class ConvertArgs:
    checkpoint: str = ""  # folder of a run (its newest weights), RUN/STEP or RUN/best
    from_hf: str = ""  # folder to convert to a run, instead of --checkpoint
    out: str = ""  # folder to write
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the tensors; routers stay in float32
    format: Literal["safetensors", "pt"] = "safetensors"  # pt: a plain state_dict, pytorch_model.bin, beside the safetensors
    native: bool = False  # write transformers' own Mixtral, where the model is one (True may be left out)
    uniform_kv: bool = False  # repeat kv heads to one number in all layers (True may be left out)
    max_shard_size: str = "5GB"  # largest file of tensors
    overwrite: bool = False  # replace what is at --out (True may be left out)
    verify: bool = True  # load what was written in a fresh process and compare it with JAX
    push_to_hub: str = ""  # repository NAME on the Hugging Face hub to upload to, made private if it is new


BARE = {"--native": "True", "--uniform-kv": "True", "--overwrite": "True", "--verify": "True"}


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    if args.from_hf:
        to_run(Path(args.from_hf).expanduser(), args)
    else:
        to_folder(args)


def parse(argv: Sequence[str]) -> ConvertArgs:
    """The checked arguments.

    Raises:
      InputError: names the flag.
    """
    description = "Converts a run to a Hugging Face folder (--checkpoint RUN --out DIR), or one to a run (--from-hf DIR --out RUN)."
    args = cli.parse(ConvertArgs, cli.with_values(argv, BARE), prog="convert", description=description, default=ConvertArgs())
    if bool(args.checkpoint) == bool(args.from_hf):
        raise InputError("give either --checkpoint RUN, to write a Hugging Face folder, or --from-hf DIR, to write a run")
    if not args.out:
        raise InputError("--out is missing: name the folder to write")
    for name in ("dtype", "format", "native", "uniform_kv", "max_shard_size", "push_to_hub"):
        if args.from_hf and getattr(args, name) != getattr(ConvertArgs, name):
            raise InputError(f"--{name.replace('_', '-')} goes with --checkpoint, not with --from-hf: leave it out")
    _check_out(args)
    needed = ["safetensors", "tokenizers"]
    needed += ["torch"] if args.format == "pt" else []
    needed += ["torch", "transformers"] if args.checkpoint and args.verify else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        skip = ", or give --verify False" if set(missing) <= {"torch", "transformers"} and args.format != "pt" else ""
        raise InputError(f"this conversion needs {', '.join(missing)}: pip install 'slimmoe_jax[hf]'{skip}")
    return args


def _check_out(args: ConvertArgs) -> None:
    """Raises InputError where --out cannot be written, or must not be."""
    out, source = Path(args.out).expanduser(), Path(args.checkpoint or args.from_hf).expanduser()
    try:
        args.out.encode()
        if out.exists() and not (args.overwrite or (out.is_dir() and not any(out.iterdir()))):
            raise InputError(f"--out {args.out} exists already: name another folder, or add --overwrite to replace it")
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise InputError(f"--out {args.out} is or holds {source}, which is to be converted: name another folder")
        place = out.resolve().parent
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise InputError(f"--out {args.out}: {place} is a file: name a folder elsewhere")
        files.check_writable(place)
    except UnicodeEncodeError as error:
        raise InputError(
            f"--out {args.out}: the name is not UTF-8, which Orbax and safetensors need: name another folder"
        ) from error
    except OSError as error:
        raise InputError(f"--out {args.out} cannot be written ({error.strerror}): name another folder") from error


@contextlib.contextmanager
def whole(out: Path, size: int = 0) -> Iterator[Path]:
    """A folder to fill, which takes the name `out` when all has gone well and is gone otherwise; what was there stays so long.

    Args:
      size: bytes that will go into it, as far as is known.
    Raises:
      InputError: there is not so much room, the system refuses a write, or a training writes there.
    """
    out = out.resolve()  # where `out` is a link, it stays one
    with contextlib.ExitStack() as held:
        if (out / locking.LOCK_FILE).exists() or (out / "checkpoints").is_dir():
            held.enter_context(locking.one_writer(out, "convert", "name another --out"))
        with _whole(out, size) as scratch:
            yield scratch


@contextlib.contextmanager
def _whole(out: Path, size: int) -> Iterator[Path]:
    scratch = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < size:
            raise InputError(
                f"{out} takes {short(size)}B, and its disk has {short(free)}B free: make room, or name a folder on another disk"
            )
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        scratch.chmod(0o755)
        yield scratch
        if out.is_dir():
            replaced = scratch.with_name(scratch.name + "-replaced")
            out.rename(replaced)
            scratch.rename(out)
            shutil.rmtree(replaced)
        else:
            out.unlink(missing_ok=True)
            scratch.rename(out)
    except InputError:
        raise
    except Exception as error:  # each library has its own kind for what the system refuses
        number = files.refused_write(error)
        if number is None and not isinstance(error, OSError):
            raise
        why = os.strerror(number) if number else config_lib.reason(error)
        advice = f"{files.ADVICE[number]}, or " if number else ""
        raise InputError(f"{out} could not be written ({why}): {advice}name another place") from error
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


# --- to a Hugging Face folder ----------------------------------------------------------------------------------------


def to_folder(args: ConvertArgs) -> None:
    """Writes, verifies and, if asked to, uploads the folder."""
    out = Path(args.out).expanduser()
    run = checkpoint.load_run(args.checkpoint, sharding.make_mesh(MeshConfig()))
    sharding.cache_programs(run.config.compilation_cache)
    tokenizer = tokenizers.saved(run.directory, run.config.model.vocab_size)
    params = jax.device_get(run.params)
    router = dataclasses.asdict(jax.device_get(run.router))
    model = run.config.model
    if args.uniform_kv:
        model, params = names.uniform_kv(model, params)
    if args.native and (wrong := configs.not_mixtral(model, router["bias"])):
        raise InputError(f"--native: this model is no Mixtral, which would take: {'; '.join(wrong)}")
    config = dataclasses.replace(run.config, model=model)
    tensors = names.to_theirs(model, params, router)
    if args.native:
        tensors = names.to_mixtral(model, tensors)
    tensors = as_dtype(tensors, args.dtype)
    size = sum(tensor.nbytes for tensor in tensors.values())

    with whole(out, 2 * size if args.format == "pt" else size) as folder:
        weights = sum(leaf.size for leaf in jax.tree.leaves(params))
        rest = sum(tensor.size for tensor in tensors.values()) - weights
        also = f" and {rest} values of router state" if rest else ""
        say(f"{run.directory}, step {run.step}: {weights:,} parameters{also} to {args.dtype}")
        write_tensors(tensors, args, folder)
        write_configs(config, run, tokenizer, router, args, folder)
        tokenizer_files.write(tokenizer, config.data.context, folder)
        shutil.copyfile(SHIPPED / "chat_template.jinja", folder / "chat_template.jinja")
        figures = None
        if args.verify:
            say("comparing with JAX, in a fresh process")
            with waiting("comparing"):
                figures = parity.check(folder, expected_answers(run, tokenizer), args.dtype)
            files.write_json(folder / "parity.json", figures)
        card.write(run, model, tokenizer, figures, args.dtype, args.native, folder)
        write_sums(folder)
    if figures:
        say(f"logits differ by {figures['max_difference']:.2e} at most over {figures['positions']:,} positions")
    say(f"written to {out}")
    if args.push_to_hub:
        push(out, args.push_to_hub)


def as_dtype(tensors: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The tensors in the type that they are written in; those of routers stay as they are.

    Raises:
      InputError: one has values beyond what the type can hold.
    """
    with np.errstate(over="ignore"):
        cast = {name: tensor if _stays_float32(name) else tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if wrong := _not_finite(tensor):
            most = float(np.abs(tensors[name]).max())
            other = "bfloat16 or float32" if dtype == "float16" else "float32"
            raise InputError(
                f"--dtype {dtype} makes {wrong:,} values of {name} infinite (the largest is {most:.3g}): give --dtype {other}"
            )
    return cast


def _not_finite(tensor: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    return tensor.size - int(np.count_nonzero(np.isfinite(tensor)))


def write_tensors(tensors: dict[str, np.ndarray], args: ConvertArgs, folder: Path) -> None:
    """`model.safetensors`, or its shards and their index; with `--format pt`, `pytorch_model.bin` as well."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    try:
        split = split_state_dict_into_shards_factory(
            tensors, get_storage_size=lambda tensor: tensor.nbytes, max_shard_size=args.max_shard_size,
            filename_pattern="model{suffix}.safetensors",
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"--max-shard-size {args.max_shard_size}: give a size such as 5GB or 200MB") from error
    for file, names_held in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names_held}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        total = {"total_size": sum(t.nbytes for t in tensors.values())}
        index = {"metadata": total, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        files.write_json(folder / "model.safetensors.index.json", index)
    if args.format == "pt":
        import torch
        from safetensors.torch import load_file

        state_dict = {name: t for file in split.filename_to_tensors for name, t in load_file(folder / file).items()}
        with (folder / "pytorch_model.bin").open("wb") as binary:  # torch's own writer does not say what the system refuses
            torch.save(state_dict, binary)


def _stays_float32(name: str) -> bool:
    return ".mlp.gate." in name  # as `_keep_in_fp32_modules_strict` of modeling_slimmoe.py


def write_configs(
    config: TrainConfig, run: Run, tokenizer: Tokenizer, router: dict[str, Any], args: ConvertArgs, folder: Path
) -> None:  # fmt: skip
    """`config.json`, `generation_config.json`, and what goes with a model that transformers does not have."""
    if args.native:
        tree = configs.to_mixtral(config, tokenizer, args.dtype)
    else:
        tree = configs.to_hf(config, tokenizer, router, args.dtype)
        for name in ("configuration_slimmoe.py", "modeling_slimmoe.py"):
            shutil.copyfile(SHIPPED / name, folder / name)
        kept = {
            "config": config_lib.to_json(configs.public(config)),
            "step": run.step,
            "router": {name: float(router[name]) for name in _KEPT_OF_ROUTER},
            "tokenizer": tokenizers.describe(tokenizer),
        }
        files.write_json(folder / TRAINING_FILE, kept)
    pad = tokenizer_files.pad_token(tokenizer)
    # PyTorch never trains the embedding of the padding token that the config names: the end token's must be trained.
    tree["pad_token_id"] = None if pad == tokenizer.end_token else pad
    files.write_json(folder / "config.json", tree)
    generation = {"eos_token_id": tokenizer.end_token, "pad_token_id": pad}
    files.write_json(folder / "generation_config.json", generation)


def expected_answers(run: Run, tokenizer: Tokenizer) -> parity.Expected:
    """JAX's logits and greedy tokens on real text, the standard library's documentation; float32 whatever the run's precision."""
    model = state.build_model(dataclasses.replace(run.config, precision="float32", remat=False))
    length = min(run.config.data.context, parity.POSITIONS)
    rows = -(-parity.POSITIONS // length)
    text: list[int] = []
    for document in stdlib.texts(with_sources=False):
        text += [*tokenizer.encode(document), tokenizer.end_token]
        if len(text) >= rows * length:
            break
    tokens = np.array(text[: rows * length], np.int32).reshape(rows, length)
    apply = jax.jit(lambda params, router, row: model.apply({"params": params}, row[None], router).logits()[0])
    with jax.default_matmul_precision("highest"):
        logits = np.stack([jax.device_get(apply(run.params, run.router, row)) for row in tokens])
        weights = decoding.Weights(model, run.params, run.router, end_token=-1)
        prompt = tokens[0, : parity.PROMPT].tolist()
        (generated,) = decoding.generate_tokens(weights, [prompt], Sampling(temperature=0.0), new_tokens=parity.NEW_TOKENS, seed=0)
    return parity.Expected(tokens, logits, generated[0])


def write_sums(folder: Path) -> None:
    """The sha256 of each file but this one."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    for path in paths:
        path.chmod(0o644)  # some writers leave files that nobody else may read
    sums = [f"{records.sha256(path)}  {path.name}\n" for path in paths]
    (folder / SUMS_FILE).write_text("".join(sums))


def push(folder: Path, name: str) -> None:
    """Uploads a folder to the hub, with the token that `hf auth login` or HF_TOKEN gives."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=name, commit_message="Convert from slimmoe_jax")
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError, OSError, ValueError) as error:
        why = config_lib.reason(error)
        raise InputError(
            f"{folder} is written, but not uploaded to {name} ({why}): log in by `hf auth login` and upload it"
        ) from error
    say(f"uploaded to {name}")


# --- to a run --------------------------------------------------------------------------------------------------------


def to_run(folder: Path, args: ConvertArgs) -> None:
    """Writes a run whose one checkpoint holds the folder's weights: others start from it by --init-from."""
    model, context = configs.from_hf(_json(folder / "config.json"), str(folder / "config.json"))
    tokenizer = tokenizer_files.read(folder)
    kept = _json(folder / TRAINING_FILE) if (folder / TRAINING_FILE).is_file() else None
    out = Path(args.out).expanduser()
    config, step = training_config(model, context, tokenizer, kept, folder, out)
    validation.validate(config)
    if tokenizer.vocab_size != model.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} tokens and the model {model.vocab_size:,}: copy both from one"
        )
    mesh = sharding.make_mesh(MeshConfig())
    like = state.abstract(config, mesh).params
    params, steering = names.to_ours(model, read_tensors(folder), like)
    size = sum(value.nbytes for value in jax.tree.leaves(params))
    params = jax.tree.map(lambda wanted, value: jax.device_put(value, wanted.sharding), like, params)
    router = router_state(model, steering, kept)
    with whole(out, size) as run:
        config_lib.save(config, run / "config.json")
        tokenizers.save(tokenizer, run)
        try:
            checkpoints = checkpoint.Checkpoints(run, config)
            checkpoints.save_weights(step, params, router, config)
            checkpoints.close()
        except InputError as error:
            if number := files.refused_write(error):  # `whole` says so, of the folder that was asked for
                raise OSError(number, os.strerror(number)) from error
            raise
    say(f"written to {out}. Next:")
    place = shlex.quote(str(out))
    say(f"  python -m slimmoe_jax.generate --checkpoint {place} {'--chat' if config.data.format == 'chat' else '--prompt The'}")
    say(f"  python -m slimmoe_jax.train --config CONFIG.py --init-from {place} --data.tokenizer inherit")


def training_config(
    model: ModelConfig, context: int, tokenizer: Tokenizer, kept: dict[str, Any] | None, folder: Path, out: Path
) -> tuple[TrainConfig, int]:
    """The config of the run, and its step: those that were kept, with the architecture that config.json says now."""
    name = "gpt2" if tokenizer.path is None else str(out / "tokenizer.model")
    if kept is None:
        base, step = TrainConfig(), 0
    else:
        try:
            base, step = config_lib.from_json(kept["config"], str(folder / TRAINING_FILE)), int(kept["step"])
            if not all(abs(kept["router"][name]) <= float(np.finfo(np.float32).max) for name in _KEPT_OF_ROUTER):
                raise ValueError("the router's state is not finite")
            if kept["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
                raise InputError(
                    f"{folder} has another tokenizer than {TRAINING_FILE} records: restore tokenizer.json and tokenizer.model"
                )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{folder / TRAINING_FILE} is incomplete ({error}): restore it, or remove it to use defaults"
            ) from error
        # What transformers' config cannot say stays as it was: balancing, controllers, dispatch.
        shaping = {field: getattr(model, field) for field in (*configs.SAME.values(), "kv_heads", "rotary", "rope_theta")}
        router = {field: getattr(model.router, field) for field in configs.ROUTER_SAME.values()}
        model = dataclasses.replace(base.model, **shaping, router=dataclasses.replace(base.model.router, **router))
    data = dataclasses.replace(base.data, context=context, tokenizer=name, train_tokenizer=0)
    return dataclasses.replace(base, model=model, data=data, name=base.name if kept else out.name), step


def router_state(model: ModelConfig, steering: dict[str, np.ndarray], kept: dict[str, Any] | None) -> RouterState:
    """The router state of the tensors; controllers go on where they were kept, and start afresh otherwise."""
    router = RouterState.initial(model)
    router = router.replace(**{name: jnp.asarray(value, jnp.float32) for name, value in steering.items()})
    return router.replace(**{name: jnp.float32(kept["router"][name]) for name in _KEPT_OF_ROUTER}) if kept else router


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, as float32.

    Raises:
      InputError: files are missing or damaged, or hold values that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    index = folder / "model.safetensors.index.json"
    tensors: dict[str, np.ndarray] = {}
    for file in _shards(index) if index.is_file() else ["model.safetensors"]:
        try:
            with np.errstate(over="ignore"):
                held = {name: tensor.astype(np.float32) for name, tensor in load_file(folder / file).items()}
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{folder / file} is missing or damaged ({error}): copy it again") from error
        for name, tensor in held.items():
            if wrong := _not_finite(tensor):
                raise InputError(
                    f"{folder / file}: {wrong:,} of {tensor.size:,} values of {name} are not finite in float32: this is no model"
                    " that can be used; copy it again, or convert another"
                )
        tensors |= held
    return tensors


def _shards(index: Path) -> list[str]:
    """The files that an index names, all in its own folder."""
    held = _json(index).get("weight_map")
    shards = sorted({str(file) for file in held.values()}) if isinstance(held, dict) else []
    if not shards or any(Path(file).name != file for file in shards):
        raise InputError(f"{index} names no files, or files outside its folder: copy it again")
    return shards


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = files.read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or no JSON ({error}): give a folder that holds a model of transformers") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no object: give a folder that holds a model of transformers")
    if wrong := files.not_finite(tree):
        raise InputError(f"{path}: {wrong[0]} is not a finite number: restore the file")
    return tree


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(main)

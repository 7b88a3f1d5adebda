"""The model card of a Hugging Face folder: what the model is, what it was trained on, and how far the folder can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import slimmoe_jax
from slimmoe_jax import contamination, files, metrics
from slimmoe_jax.checkpoint import Run
from slimmoe_jax.config import ModelConfig
from slimmoe_jax.contamination import Stage
from slimmoe_jax.conversion.configs import run_name, without_folders
from slimmoe_jax.conversion.tokenizer import pad_token
from slimmoe_jax.data.tokenizers import Tokenizer
from slimmoe_jax.progress import short

PADDED_BY_END = """\
GPT-2's vocabulary has no spare token, so the end token also pads batches. The `DataCollatorForLanguageModeling` of transformers
leaves padding tokens out of the loss, and here the end of each text with them: a model fine-tuned that way never learns to stop.
Give `Trainer` this `data_collator` instead, which goes by the attention mask:

```python
def collate(rows):
    batch = tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch
```

End each text with `tokenizer.eos_token`."""


def write(
    run: Run, model: ModelConfig, tokenizer: Tokenizer, parity: dict[str, Any] | None, dtype: str, native: bool, directory: Path
) -> None:
    """Writes `README.md`.

    Args:
      model: as written, which may have other kv heads than the run's.
      parity: the figures of `parity.check`; None where it was skipped.
    """
    behind, lost = contamination.stages(run.directory, run.config)
    sections = [
        _metadata(behind, native),
        f"# {run.config.name}",
        f"A mixture-of-experts language model with variable grouped-query attention, trained with slimmoe_jax"
        f" {slimmoe_jax.__version__} and converted from step {run.step:,} of its last stage.",
        _usage(run, native),
        "## Properties\n\n" + _table(_properties(run, model, tokenizer, dtype)),
        *(["## Padding\n\n" + PADDED_BY_END] if pad_token(tokenizer) == tokenizer.end_token else []),
        "## Training\n\n" + _training(behind, lost),
        "## Contamination\n\n" + _contamination(behind, lost),
        "## Parity with JAX\n\n" + _parity(parity),
        "## Limits\n\nNo alignment, no filtering of answers: a research model. The converter does not know the licences of the"
        " training data; state one before you publish.",
    ]
    text = "\n\n".join(sections) + "\n"
    places = {stage.run: run_name(stage.run) for stage in behind} | ({lost: run_name(lost)} if lost else {})
    places |= {source: without_folders(source) for stage in behind for source in stage.sources}
    for place in sorted(places, key=len, reverse=True):  # one may begin with another
        text = text.replace(place, places[place])
    (directory / "README.md").write_text(text)


def _metadata(behind: Sequence[Stage], native: bool) -> str:
    names = {source.split(":")[1] for stage in behind for source in stage.sources if source.startswith("hub:")}
    datasets = ["datasets:", *(f"- {name}" for name in sorted(names))] if names else []
    tags = ["tags:", "- moe", "- jax", *(["- mixtral"] if native else ["- slimmoe", "- custom_code"])]
    return "\n".join(["---", "library_name: transformers", "pipeline_tag: text-generation", *tags, *datasets, "---"])


def _usage(run: Run, native: bool) -> str:
    trust = "" if native else ", trust_remote_code=True"
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})',
    ]
    if run.config.data.format == "chat":
        lines += [
            'messages = [{"role": "user", "content": "Hello"}]',
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        ]
    else:
        lines += ['inputs = tokenizer("The", return_tensors="pt")']
    lines += ["print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))", "```", ""]
    lines += [
        "transformers 5.16 or newer. The chat template breaks an end or padding token that a message spells; other text from"
        " strangers is safe as `tokenizer(text, split_special_tokens=True)`."
    ]
    return "\n".join(lines)


def _properties(run: Run, model: ModelConfig, tokenizer: Tokenizer, dtype: str) -> list[tuple[str, str]]:
    config, row = run.config, _measured(run)
    total = sum(metrics.parameter_counts(model).values())
    cache = metrics.kv_cache_bytes_per_token(model)
    router = model.router
    used = row.get("experts_per_token")
    mean = sum(used) / len(used) if isinstance(used, list) and used and all(map(files.is_number, used)) else None
    experts = f"{model.experts} of hidden width {model.expert_hidden:,}{', gated' if model.gated else ''}"
    rows = [
        ("parameters", f"{total:,}"),
        ("active matrix parameters a token", f"{short(metrics.active_parameters(model, mean))}"),
        ("layers, width", f"{model.layers}, {model.width}"),
        ("query heads", f"{model.heads} of {model.head_dim}"),
        ("key/value heads by layer", _listed(model.layer_kv_heads)),
        ("rotary fraction by layer", _listed(model.layer_rotary)),
        ("KV cache, bytes a token in float32", f"{cache['vgqa']:,} (multi-head attention: {cache['mha']:,})"),
        ("experts a layer", experts if model.is_moe else "none: dense"),
    ]
    if model.is_moe:
        at_most = f"{router.kind}, at most {router.max_experts} experts a token"
        rows.append(("router", at_most + (f", threshold {float(run.router.threshold):.4f}" if router.kind == "top_p" else "")))
    if mean is not None:
        rows.append(("experts a token, measured in training at this step", f"{mean:.2f}"))
    rows += [
        ("context", f"{config.data.context:,} tokens"),
        ("vocabulary", f"{model.vocab_size:,} ({tokenizer.name}, sha256 {tokenizer.fingerprint[:12]})"),
        ("dropout in training", f"{model.dropout:g}"),
        ("precision in training; of this folder", f"{config.precision}; {dtype}"),
        ("steps, tokens of the last stage", f"{run.step:,}, {run.step * config.data.batch_size * config.data.context:,}"),
    ]
    loss, bits = row.get("validation_loss"), row.get("validation_bits_per_byte")
    if files.is_number(loss) and files.is_number(bits):
        rows.append(("validation loss at this step", f"{loss:.4f} nats a token, {bits:.4f} bits a byte"))
    return rows


def _measured(run: Run) -> dict[str, Any]:
    """The run's line of metrics for the step; empty where there is none."""
    path = run.directory / "metrics.jsonl"
    rows = metrics.read_jsonl(path) if path.is_file() else []
    return next((row for row in reversed(rows) if row["step"] == run.step), {})


def _training(behind: Sequence[Stage], lost: str) -> str:
    rows = [(Path(stage.run).name, ", ".join(stage.sources)) for stage in reversed(behind)]
    text = _table(rows, ("stage", "data"))
    return text + (
        f"\n\nThe first of these started from {lost}, which was not there at conversion: its data are unknown." if lost else ""
    )


def _contamination(behind: Sequence[Stage], lost: str) -> str:
    found = contamination.known(behind)
    lines = [f"- {sentence}. Scores on their evaluations are no measure of generalisation." for sentence in found]
    lines += [] if found else ["None is known from the names of the training data; they were not searched for evaluations."]
    return "\n".join(lines + (["What came before is unknown."] if lost else []))


def _parity(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "Not checked."
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    tied = figures["near_tie_positions"]
    agrees = "identical with and without the cache" if figures["generation_agrees"] else "not all identical"
    rows = [
        ("positions compared, on real text", f"{figures['positions']:,}, all {figures['vocabulary']:,} logits of each"),
        ("largest difference of logits", f"{figures['max_difference']:.2e}"),
        ("mean and largest KL divergence", f"{figures['mean_kl']:.2e}, {figures['max_kl']:.2e} nats"),
        ("likeliest token agrees", f"{figures['greedy_agreement']:.2%}"),
        (f"{figures['generated_tokens']} greedy tokens", agrees),
    ]
    if tied:
        rows.insert(2, (f"  but for {tied:,} positions after a near tie of experts", f"{figures['max_difference_compared']:.2e}"))
    return f"This folder in PyTorch ({figures['dtype']}) against JAX in float32, on a CPU ({versions}).\n\n" + _table(rows)


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _table(rows: Sequence[tuple[str, str]], head: tuple[str, str] = ("", "")) -> str:
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])

"""Does a Hugging Face folder hold the model that it was made from? It is loaded in a fresh process and compared with JAX.

Axes: R rows, S positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from slimmoe_jax import files
from slimmoe_jax.config import InputError

POSITIONS = 2_048  # compared, in rows of the model's context
NEW_TOKENS = 32  # generated greedily, from PROMPT tokens
PROMPT = 32
# Largest difference of logits that rounding explains in float32, and the distance from another choice of experts below which
# rounding may flip it: then the logits are another function's from that token on, and neither side is wrong.
TOLERANCE = 1e-4
NEAR_TIE = 2e-5


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the folder's model must answer."""

    tokens: np.ndarray  # [R, S] int32
    logits: np.ndarray  # [R, S, V] float32
    generated: np.ndarray  # [NEW_TOKENS] int32, greedily after the first row's first PROMPT tokens


def check(folder: Path, expected: Expected, dtype: str) -> dict[str, Any]:
    """Compares in a fresh process, and returns the figures.

    Raises:
      InputError: the folder does not load whole, or in float32 its model is another one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for field in dataclasses.fields(expected):
                np.save(Path(scratch) / f"{field.name}.npy", getattr(expected, field.name))
        except OSError as error:
            raise InputError(
                f"the temporary folder {scratch} could not be written ({error.strerror or error}): make room, or set TMPDIR"
            ) from error
        # Code from the folder is copied to a cache before it runs: to one of this check's own.
        environment = os.environ | {
            "HF_MODULES_CACHE": f"{scratch}/modules",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        command = [sys.executable, "-m", "slimmoe_jax.conversion.parity", str(folder), scratch]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(
            f"what was written does not load in transformers ({reason}): please report this; --verify False skips the check"
        )
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    wrong = [
        f"{kind} {', '.join(figures[kind][:3])}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if figures[kind]
    ]
    if files.not_finite(figures):
        raise InputError(
            f"what was written in {dtype} answers real text with logits that are not finite: its activations are too large for the"
            " type; give --dtype float32, or convert an older step"
        )
    if dtype == "float32" and figures["max_difference_compared"] >= TOLERANCE:
        wrong.append(f"logits differ by up to {figures['max_difference_compared']:.2g}, not below {TOLERANCE:g}")
    if dtype == "float32" and not figures["near_tie_positions"] and not figures["generation_agrees"]:
        wrong.append("greedy tokens differ")
    if wrong:
        raise InputError(
            f"what was written is not the model ({'; '.join(wrong)}): please report this; --verify False skips the check"
        )
    return figures


# --- in the fresh process --------------------------------------------------------------------------------------------


def compare(folder: str, scratch: str) -> dict[str, Any]:
    """Loads the folder's model and compares it with what was expected of it."""
    import torch
    from transformers import AutoModelForCausalLM

    expected = Expected(
        **{field.name: np.load(f"{scratch}/{field.name}.npy", mmap_mode="r") for field in dataclasses.fields(Expected)}
    )
    load: Any = AutoModelForCausalLM.from_pretrained  # which gives a pair here
    model, loading = load(folder, trust_remote_code=True, dtype="auto", output_loading_info=True)
    model.eval()
    worst, divergence, agree, near = [], [], [], []
    with torch.no_grad():
        for tokens, logits in zip(expected.tokens, expected.logits, strict=True):
            out = model(torch.tensor(tokens[None].astype(np.int64)), output_router_logits=_has_router(model))
            theirs, ours = out.logits[0].float(), torch.tensor(np.array(logits))
            worst.append((theirs - ours).abs().amax(-1))
            log_p, log_q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
            divergence.append((log_p.exp() * (log_p - log_q)).sum(-1))
            agree.append(theirs.argmax(-1) == ours.argmax(-1))
            near.append(_after_near_tie(model, out, tokens.size))
    difference, kl, tied = torch.stack(worst), torch.stack(divergence), torch.stack(near)
    # Near ties are only looked at where there is something to explain.
    tied = tied if difference.max() >= TOLERANCE else torch.zeros_like(tied)
    prompt = torch.tensor(expected.tokens[:1, :PROMPT].astype(np.int64))
    generated = [_generate(model, prompt, use_cache) for use_cache in (True, False)]
    return {
        "positions": difference.numel(),
        "vocabulary": expected.logits.shape[-1],
        "max_difference": difference.max().item(),
        "max_difference_compared": difference[~tied].max().item() if (~tied).any() else 0.0,
        "near_tie_positions": int(tied.sum()),
        "mean_kl": kl.mean().item(),
        "max_kl": kl.max().item(),
        "greedy_agreement": torch.stack(agree).float().mean().item(),
        "generated_tokens": int(expected.generated.size),
        "generation_agrees": all(np.array_equal(tokens, expected.generated) for tokens in generated),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "jax")},
        **{kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")},
    }


def _has_router(model: Any) -> bool:
    return getattr(model.config, "num_local_experts", 1) > 1


def _after_near_tie(model: Any, out: Any, positions: int) -> Any:
    """Positions [S] of a row at or after a token for which a choice of experts was closer than NEAR_TIE in any layer."""
    import torch

    near = torch.zeros(positions, dtype=torch.bool)
    routers = [layer.mlp.gate for layer in model.model.layers] if _has_router(model) else []
    for router, logits in zip(routers, out.router_logits or (), strict=True):
        most = model.config.num_experts_per_tok
        kind = getattr(router, "kind", "top_k")
        order = logits.float() if kind == "relu" else logits.float().softmax(-1) + getattr(router, "e_score_correction_bias", 0.0)
        ranked = order.sort(dim=-1, descending=True).values
        if most < ranked.shape[-1]:
            near |= (ranked[:, most - 1] - ranked[:, most]) < NEAR_TIE
        if kind == "top_p":
            best = logits.float().softmax(-1).gather(-1, order.topk(most, dim=-1).indices)
            better = (best.cumsum(-1) - best)[:, 1:]
            near |= ((better - router.threshold).abs() < NEAR_TIE).any(-1)
    return near.cumsum(0) > 0


def _generate(model: Any, prompt: Any, use_cache: bool) -> np.ndarray:
    import torch

    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        use_cache=use_cache, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, prompt.shape[1] :].numpy()


if __name__ == "__main__":
    print(json.dumps(compare(*sys.argv[1:])))

"""Sampling: filters against those of transformers, distributions, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import sampling
from slimmoe_jax.config import InputError
from slimmoe_jax.sampling import Sampling

FILTERS = [
    dict(top_k=5),
    dict(top_k=1),
    dict(top_k=1_000),
    dict(top_p=0.9),
    dict(top_p=0.3),
    dict(top_p=1e-4),
    dict(min_p=0.1),
    dict(min_p=1.0),
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.8),
    dict(temperature=0.5, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.5),
    dict(temperature=2.0, top_k=50, top_p=0.6, min_p=0.3, repetition_penalty=1.1),
]


def theirs(logits, seen_ids, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """The logits after transformers' own processors, in the order in which its `generate` applies them."""
    torch, process = pytest.importorskip("torch"), pytest.importorskip("transformers.generation.logits_process")
    processors = [process.RepetitionPenaltyLogitsProcessor(repetition_penalty), process.TemperatureLogitsWarper(temperature)]
    processors += [process.TopKLogitsWarper(top_k)] if top_k else []
    processors += [process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    processors += [process.MinPLogitsWarper(min_p)] if min_p else []
    scores = torch.tensor(logits)
    for processor in processors:
        scores = processor(torch.tensor(seen_ids), scores)
    return scores.numpy()


@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_filters_are_those_of_transformers(values):
    rng = np.random.default_rng(0)
    logits, seen_ids = 3 * rng.standard_normal((6, 200)).astype(np.float32), rng.integers(0, 200, (6, 40))
    seen = np.zeros((6, 200), bool)
    np.put_along_axis(seen, seen_ids, True, axis=1)
    settings = Sampling(**{"temperature": 1.0} | values)

    @jax.jit
    def ours(settings):
        return sampling.keep_likely(sampling.penalise(logits, seen, settings.repetition_penalty) / settings.temperature, settings)

    expected = theirs(logits, seen_ids, **values)
    np.testing.assert_array_equal(np.isinf(ours(settings)), np.isinf(expected))
    np.testing.assert_allclose(ours(settings), expected, rtol=1e-5)


def test_samples_have_the_distribution_that_the_filters_leave():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    many = jnp.broadcast_to(logits, (20_000, 4))
    keys, seen = jax.random.split(jax.random.key(0), 20_000), jnp.zeros(many.shape, bool)
    tokens = jax.jit(sampling.choose)(many, seen, Sampling(temperature=1.0, top_p=0.75), keys)
    shares = np.bincount(tokens, minlength=4) / 20_000
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.015)  # 0.5 and 0.3, rescaled to sum to 1


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        (dict(temperature=-0.1), "--temperature"),
        (dict(temperature=float("nan")), "--temperature"),
        (dict(top_k=-1), "--top-k"),
        (dict(top_p=0.0), "--top-p"),
        (dict(top_p=1.1), "--top-p"),
        (dict(min_p=-0.1), "--min-p"),
        (dict(min_p=1.5), "--min-p"),
        (dict(repetition_penalty=0.0), "--repetition-penalty"),
        (dict(top_k=100_000_000_000), "--top-k = 100000000000: give at most 2,147,483,647"),
        (dict(top_k=float("nan")), "--top-k = nan: give a whole number"),
        (dict(top_k=2.0), "--top-k = 2.0: give a whole number"),
        (dict(top_k=True), "--top-k = True"),
        *((dict(temperature=value), "--temperature") for value in (float("inf"), 1e39, 10**400, "1", None)),
        *((dict(top_p=value), "--top-p") for value in (float("nan"), 1e-50, "1")),
        *((dict(min_p=value), "--min-p") for value in (float("nan"), "0")),
        *((dict(repetition_penalty=value), "--repetition-penalty") for value in (float("nan"), 1e39, 1e-50)),
    ],
)
def test_settings_without_meaning_are_refused(values, flag):
    with pytest.raises(InputError, match=flag):
        sampling.check(Sampling(**values))


def test_the_largest_settings_work():
    """In int32 and float32, in which they are traced."""
    settings = Sampling(3e38, 2**31 - 1, 1.2e-38, 1.0, 3e38)
    sampling.check(settings)
    keys, logits = jax.random.split(jax.random.key(0), 2), jnp.array([[3.0, -1.0, 0.0], [0.0, 0.0, 2.0]])
    assert jax.jit(sampling.choose)(logits, logits > 2, settings, keys).shape == (2,)


@pytest.mark.parametrize("value", [0, -1, 1_000_001, 2.0, float("nan"), True, "8", None])
def test_lengths_are_whole_numbers(value):
    with pytest.raises(InputError, match="^--tokens = "):
        sampling.check_length("--tokens", value)
    sampling.check_length("--tokens", np.int32(8))


@pytest.mark.parametrize("value", [-1, 2**32, 0.0, None])
def test_seeds_are_what_fits_32_bits(value):
    with pytest.raises(InputError, match="^--seed = "):
        sampling.check_seed("--seed", value)
    sampling.check_seed("--seed", 2**32 - 1)

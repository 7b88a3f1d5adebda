"""What a study's report says of figures that are made up here."""

from pathlib import Path

import numpy as np

from slimmoe_jax.study import design, pages

STUDY = design.load(Path(__file__).parent.parent / "configs" / "ablations" / "precision.py")


def said(float32, bfloat16):
    losses = {"float32": dict(enumerate(float32)), "bfloat16": dict(enumerate(bfloat16))}
    return "\n".join(pages._claims(STUDY, losses, "float32"))


def test_a_difference_is_claimed_beyond_the_floor_and_not_within():
    rng = np.random.default_rng(0)
    base, noise = rng.normal(3.7, 0.01, 6), rng.normal(0, 0.01, 6)
    assert "**bfloat16** is worse than float32 by 0.2" in said(base, base + 0.25 + noise)
    assert "**bfloat16** is better than float32 by 0.2" in said(base, base - 0.25 + noise)
    assert "Not told apart from float32: bfloat16." in said(base, base + 0.001 + noise)


def test_arms_that_scatter_differently_are_warned_of():
    noise = np.random.default_rng(0).normal(0, 1, (2, 6))
    alike = said(*(3.7 + 0.01 * noise))
    unlike = said(3.7 + 0.001 * noise[0], 3.7 + 0.1 * noise[1])
    assert "do not scatter alike" not in alike
    assert "do not scatter alike" in unlike and "float32, to 0." in unlike and ", bfloat16;" in unlike

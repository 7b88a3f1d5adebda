"""Every test runs on the CPU with 8 forced host devices, a compilation cache, and hidden rank promotion as an error."""

import contextlib
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most of the tests' time is compilation of tiny programs, which this more than halves. Commands that tests start inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402

jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/slimmoe_jax/xla-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_rank_promotion", "raise")

with contextlib.suppress(ImportError):
    import hypothesis

    hypothesis.settings.register_profile("long")  # see test_fuzz.py


def pytest_collection_modifyitems(items):
    """The longest file first: whole files are dealt out to the processes, and it would otherwise be the last to end."""
    items.sort(key=lambda item: item.path.name != "test_train.py")

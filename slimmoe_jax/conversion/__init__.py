"""Between a run of this package and a Hugging Face folder: names, configs, tokenizers, model card, parity."""

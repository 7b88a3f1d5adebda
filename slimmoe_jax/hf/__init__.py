"""The model for Hugging Face `transformers`: files that each export carries, and that know nothing of this package."""

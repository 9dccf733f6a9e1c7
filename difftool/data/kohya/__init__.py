"""kohya's conventions: folders named REPEATS_WORDS and regularisation pictures (repeats), JSON
metadata (metadata), TOML dataset files (toml). Torch-free."""

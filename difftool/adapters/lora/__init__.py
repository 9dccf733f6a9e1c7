"""LoRA and its kin: files of every dialect, their algebra, and training them."""

"""What changes a model's weights or words: LoRAs (lora/), averages over a run (averages), learned
words (words)."""

"""What changes a model: LoRAs (lora/) and learned words (words)."""

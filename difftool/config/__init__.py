"""What a model is and how it is trained and sampled, as plain values: presets, layers, options."""

"""What makes a network fast, or small, on a device."""

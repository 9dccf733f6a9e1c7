"""Files of a run: prompts that come in, pictures that go out and pictures that are there."""

"""From prompts to pictures: requests, batches, names, and what a picture says about itself."""

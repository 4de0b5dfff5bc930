"""What experiments share: models, contenders, steps, timing, results."""

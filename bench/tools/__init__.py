"""What is made of results: the page, the baselines; and what a result is held to."""

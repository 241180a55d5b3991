"""What an optax optimizer needs to work on stacked models, and the learning rate of a step."""

"""What is learned: settings, data, models, local training, evaluation. Knows nothing of Flower."""

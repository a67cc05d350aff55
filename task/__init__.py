"""What is learned: settings, data, models, local training, evaluation. Independent of Flower."""

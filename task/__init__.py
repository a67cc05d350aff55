"""What is learned: settings, data, models, local training and evaluation; nothing here knows of Flower."""

"""What fine-tuning needs of Keras: an engine that trains, and what calibration, hooks and figures look at."""

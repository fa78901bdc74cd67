"""What fine-tuning needs of PyTorch: an engine that trains, and what calibration, hooks and figures look at."""

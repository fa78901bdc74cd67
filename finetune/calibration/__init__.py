"""Calibration: layers solved again on unlabelled inputs."""

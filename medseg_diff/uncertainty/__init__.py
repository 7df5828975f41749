"""Whether what is said of uncertainty is true: calibration of probabilities, sampled masks and volumes."""

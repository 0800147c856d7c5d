"""What calibration and evaluation share: text, second moments of what attention sees, and the error of decoding."""

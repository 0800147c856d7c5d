"""Text, second moments of latents and queries, and the error of decoding, for calibration and evaluation."""

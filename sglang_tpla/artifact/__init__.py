"""The calibration artifact: the contract between calibrate and host."""

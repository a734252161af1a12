"""Models of random weights in known shapes, quantized as a stage of a sweep does it."""

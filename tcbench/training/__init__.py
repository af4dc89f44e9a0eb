"""Training: the embedded suite's base models here; what methods declare trainable in their own modules."""

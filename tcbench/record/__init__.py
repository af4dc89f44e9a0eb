"""What is written down and what vouches for it: files, scores, executed plans, provenance, source digests."""

"""Numbers that claims are about: statistics of what training logs of the predictor's scores, and of diagnostics."""

from typing import Any

import numpy as np

Log = dict[str, Any]


def share_of_low_scores(scores: Log, below: float = 0.1) -> float:
    """Share of all scores that lie below a number, an edge of their histogram."""
    counts, edges = np.array(scores["histogram"]["counts"]), np.array(scores["histogram"]["edges"])
    return float(counts[edges[1:] <= below + 1e-9].sum() / counts.sum())


def spread_over_samples(scores: Log) -> float:
    """Spread of the scores over samples, over their spread over steps."""
    return float(scores["std_over_samples"] / scores["std_over_steps"])


def blocks_own_movement(scores: Log) -> float:
    """How much of the scores' spread over steps is not shared by the blocks: 0 if all blocks move as one."""
    alpha_SL = np.array(scores["per_block"])
    own_SL = alpha_SL - alpha_SL.mean(1, keepdims=True)
    return float((own_SL - own_SL.mean(0)).std() / (alpha_SL - alpha_SL.mean(0)).std())


def share_of_change_in_top_tenth(diagnostics: Log) -> float:
    """Share of all change that the tenth of the tokens which change most has (Fig. 3a, b)."""
    return float(diagnostics["share_of_change_in_top_tenth"])


def rank_correlation(diagnostics: Log) -> float:
    """Of a token's score and how much its update changes, mean over blocks."""
    return float(np.mean(diagnostics["rank_correlation_per_block"]))


def busiest_block(diagnostics: Log) -> float:
    """Tokens kept in the busiest block over the mean of blocks, at r = 0.7 (Fig. 8a)."""
    kept = [len(tokens) for tokens in diagnostics["alpha"]["kept_at_0.7"]["tokens"]]
    return max(kept) * len(kept) / sum(kept)


def similarity_of_neighbours(diagnostics: Log) -> float:
    """Cosine similarity of a block's updates at consecutive steps, the median over blocks and steps (Fig. 3c, d)."""
    return float(np.median(diagnostics["updates"]["similarity"]))


def unevenness_over_steps(diagnostics: Log) -> float:
    """The largest change between neighbouring steps over the mean one, blocks pooled."""
    change_S = 1 - np.array(diagnostics["updates"]["similarity"]).mean(1)
    return float(change_S.max() / change_S.mean())

"""Which figures a suite has, by name: what the workflow promises and the gallery draws. Imports nothing heavy."""

from tcbench.config import Suite


def figure_names(suite: Suite) -> list[str]:
    """Names of the suite's figures; those that stand beside one of the paper's begin with its number."""
    nfes = {suite.rows[row].nfe for row in suite.predictor_rows}
    ratios = suite.ablations["cache_ratio"].rows if "cache_ratio" in suite.ablations else {}
    conditions = {
        "fig1b_quality": True,
        "fig3_updates": suite.figure.nfe in nfes,
        "fig5_samples": True,
        "fig8_predictor": suite.figure.nfe in nfes,
        "fig8e_scores": bool(nfes),
        "fig9a_cache_ratio": len(ratios) > 1,
        "fig9b_allocation": "r0.7" in ratios,
        "fig10_deviation": suite.traced > 0,
        "fig11_steps": suite.traced > 0,
        "guidance": "guidance" in suite.ablations,
    }
    return [name for name, applies in conditions.items() if applies]

"""The paper's checkable claims as data: under each heading where the paper says what, and the test that decides it.

An entry reads: place in the paper, its words in short, the test with its arguments (`claim_tests`), and whose rows a
suite must have to test it. Methods and metrics are called as in configs; `fid`, `is` and so on are in
`tcbench.metrics.catalogue`.
"""

from dataclasses import dataclass

from tcbench.config.fields import PaperModel
from tcbench.report import log_statistics as statistics
from tcbench.report.claim_tests import (
    Test,
    at_least,
    at_most,
    best_at_matched_macs,
    best_schedule,
    best_variant,
    better_than_uncached,
    better_with_lora,
    diagnosed,
    fewer_steps_degrade,
    highest_speedup,
    not_testable,
    papers_speedups,
    predicted,
    reused_blocks,
    selects_better,
    shows_what_was_asked,
    small_drop,
    smaller_deviation_than_toca,
    without_loss,
    without_loss_at_ratios,
    worse_than_fewer_steps,
)


@dataclass(frozen=True)
class Rows:
    """Rows of the paper that a suite's rows stand beside: those of a model, and resolution; None: of any."""

    model: str | None = None
    resolution: int | None = None

    def include(self, stands_for: PaperModel | None) -> bool:
        """Whether what a suite stands for, if it stands for any of the paper's models, is among them."""
        return (
            stands_for is not None
            and self.model in (None, stands_for.name)
            and self.resolution in (None, stands_for.resolution)
        )

    def __str__(self) -> str:
        size = f" at {self.resolution}×{self.resolution}" if self.resolution else ""
        return f"{self.model or 'a model of the paper'}{size}"


@dataclass(frozen=True)
class Claim:
    """Something the paper says that results can bear out or not.

    Attributes:
        place: where in the paper.
        words: what it says.
        test: says what it finds in a suite's results.
        of: only suites whose rows stand beside these can test it.
    """

    place: str
    words: str
    test: Test
    of: Rows = Rows()


DIT_256, DIT_512 = Rows("DiT-XL/2", 256), Rows("DiT-XL/2", 512)
PIXART, PIXART_256, PIXART_1024 = Rows("PixArt-alpha"), Rows("PixArt-alpha", 256), Rows("PixArt-alpha", 1024)
OPEN_SORA_PLAN = Rows("Open-Sora-Plan")

CLIP = ("clip_score", "digits_clip_score", "alignment")
"""Agreement of image and caption: the paper's metric, and what stands in for it on suites of digits."""

QUALITY = ("fid", "sfid", "is", "precision", "recall")
"""The columns of Table II, for claims that name no metric."""

TABLE_II = ("fewer_steps", "fora", "learning_to_cache", "toca")
TABLES_III_TO_V = ("fewer_steps", "fora", "toca")
"""The methods that "all other methods" means: those of the tables."""

CLAIMS: dict[str, tuple[Claim, ...]] = {
    "Class-conditional images (Table II)": (
        Claim(
            "Sec. IV-C, Table II, 256×256",
            "At matched acceleration TokenCache has the best FID and a higher IS than all compared methods.",
            best_at_matched_macs(nfes=(250, 50, 20, 10), metrics=("fid", "is", "mae"), rivals=TABLE_II),
            DIT_256,
        ),
        Claim(
            "Sec. IV-C, Table II",
            "With 20 and 10 steps it beats fewer steps and all other methods at equal acceleration.",
            best_at_matched_macs(nfes=(20, 10), metrics=("fid", "mae"), rivals=TABLE_II),
            DIT_256,
        ),
        Claim(
            "Sec. IV-C, Table II",
            "3× acceleration at 250 steps without a reduction in performance.",
            without_loss(nfe=250, metrics=QUALITY),
            DIT_256,
        ),
        Claim(
            "Sec. IV-C, Table II",
            "At 250 steps it surpasses both FORA and ToCa at the same acceleration.",
            best_at_matched_macs(nfes=(250,), metrics=("fid", "is", "mae"), rivals=("fora", "toca")),
            DIT_256,
        ),
        Claim(
            "Table II",
            "2.4× acceleration at 50 steps at hardly any loss (FID 2.33 for 2.25).",
            without_loss(nfe=50, metrics=("fid", "is", "precision", "recall")),
            DIT_256,
        ),
        Claim(
            "Table II",
            "At 20 steps TokenCache is better than the uncached model itself (FID 3.41 for 3.51, IS 232 for 223).",
            better_than_uncached(nfe=20, metrics=("fid", "is")),
            DIT_256,
        ),
        Claim(
            "Sec. IV-C, Table II",
            "FORA deteriorates with fewer sampling steps: at 50 it is far worse than taking fewer steps.",
            worse_than_fewer_steps("fora", nfe=50),
            DIT_256,
        ),
        Claim(
            "Sec. IV-C, Table II",
            "ToCa degrades with few steps: at 10 it is far worse than taking fewer steps.",
            worse_than_fewer_steps("toca", nfe=10),
            DIT_256,
        ),
        Claim(
            "Sec. IV-C, Table II",
            "The same holds at 512×512.",
            best_at_matched_macs(nfes=(50, 20), metrics=("fid", "is", "mae"), rivals=TABLE_II),
            DIT_512,
        ),
    ),
    "Acceleration": (
        Claim(
            "Table II",
            "Speedups of Table II: 3.01, 2.40, 1.73 and 1.45 at 250, 50, 20 and 10 steps.",
            papers_speedups,
            DIT_256,
        ),
        Claim(
            "Sec. IV-C, Tables III and IV",
            "Speedups of Tables III and IV: 1.95 at 256×256 and 20 steps, 1.97 at 1024×1024 and 50.",
            papers_speedups,
            PIXART,
        ),
        Claim("Sec. IV-C, Table V", "Speedup of Table V: 2.31.", papers_speedups, OPEN_SORA_PLAN),
    ),
    "Text-to-image and text-to-video": (
        Claim(
            "Sec. IV-C, Table III",
            "Best FID and CLIP score of all methods on PixArt-α at 256×256.",
            best_at_matched_macs(nfes=(20,), metrics=("fid", *CLIP, "mae"), rivals=TABLES_III_TO_V),
            PIXART_256,
        ),
        Claim(
            "Sec. IV-C, Table III",
            "Taking fewer steps degrades PixArt-α at 256×256 (12 of 20 steps: FID 43.67 for 40.00).",
            fewer_steps_degrade(nfe=20, metrics=("fid", *CLIP)),
            PIXART_256,
        ),
        Claim(
            "Sec. IV-C, Table IV",
            "Highest ImageReward and CLIP score of all methods on PixArt-α at 1024×1024.",
            best_at_matched_macs(nfes=(50,), metrics=("image_reward", *CLIP, "mae"), rivals=TABLES_III_TO_V),
            PIXART_1024,
        ),
        Claim(
            "Sec. IV-C, Table V",
            "Higher VBench score than FORA and ToCa on Open-Sora-Plan.",
            best_at_matched_macs(nfes=(50,), metrics=("vbench", *CLIP, "mae"), rivals=("fora", "toca")),
            OPEN_SORA_PLAN,
        ),
        Claim(
            "Sec. IV-C, Table V",
            "The highest speedup of all methods on Open-Sora-Plan.",
            highest_speedup,
            OPEN_SORA_PLAN,
        ),
    ),
    "Which tokens": (
        Claim(
            "Sec. IV-D.1, Table VI (PixArt-α)",
            "The Cache Predictor selects better than random tokens, ToCa's score and ToMe at similar cost.",
            selects_better,
        ),
        Claim(
            "Sec. IV-D.1",
            "ToMe without a cache, merging tokens, leads to poor quality.",
            # The paper names neither a metric nor a setting: all of Table II's, and both that the ablation has.
            best_variant("merging", "reused", ("merged", "merged-attention"), metrics=(*QUALITY, *CLIP, "mae")),
        ),
        Claim(
            "Sec. IV-D.1",
            "Quality stays stable without semantic collapse.",
            shows_what_was_asked(metrics=("accuracy", *CLIP)),
        ),
        Claim(
            "Sec. III-B, Fig. 3(a, b)",
            "Tokens differ in how much their updates change.",
            diagnosed(
                statistics.share_of_change_in_top_tenth,
                at_least(0.2),
                form=".0%",
                rule="the tenth of all tokens that change most holds at least twice its even share of the change",
            ),
        ),
        Claim(
            "Sec. III-C, Eq. (11)",
            "The score reflects how much a token's update changes between steps.",
            diagnosed(
                statistics.rank_correlation,
                at_least(0.5),
                form=".2f",
                rule="rank correlation of score and change over tokens, mean over blocks, at least .5",
            ),
        ),
        Claim(
            "Sec. IV-D.1, Fig. 8(b, c)",
            "Scores are sparse.",
            predicted(
                statistics.share_of_low_scores,
                at_least(0.5),
                form=".0%",
                rule="at least half of all scores below .1",
            ),
        ),
        Claim(
            "Sec. IV-D.1, Fig. 8(d)",
            "Scores follow the same trend in different batches at the same timestep.",
            predicted(
                statistics.spread_over_samples,
                at_most(0.25),
                form=".2f",
                rule="spread over samples at most a quarter of the spread over steps",
            ),
        ),
    ),
    "Which blocks": (
        Claim(
            "Sec. IV-D.1, Fig. 8(e)",
            "Each block follows a distinct trend over timesteps.",
            predicted(
                statistics.blocks_own_movement,
                at_least(0.25),
                form=".2f",
                rule="blocks' own movement at least a quarter of all movement over steps",
            ),
        ),
        Claim(
            "Sec. IV-D.1, Fig. 8(a)",
            "Certain blocks cache more tokens than others.",
            diagnosed(
                statistics.busiest_block,
                at_least(1.5),
                form=".2f",
                rule="tokens recomputed in the busiest block over the mean of blocks at r = 0.7, at least 1.5",
            ),
        ),
        Claim(
            "Sec. IV-D.2, Fig. 9(b)",
            "Some blocks are reused almost wholly throughout denoising.",
            reused_blocks,
        ),
        Claim(
            "Sec. III-D, Eq. (12)",
            "Adaptive allocation of tokens to blocks beats the same number for every block.",
            best_variant("allocation", "batch", ("uniform",), metrics=("fid", "mae")),
        ),
    ),
    "Which timesteps": (
        Claim(
            "Sec. III-B, Fig. 3(c, d)",
            "Token updates are similar at neighbouring timesteps.",
            diagnosed(
                statistics.similarity_of_neighbours,
                at_least(0.9),
                form=".2f",
                rule="median cosine similarity of a block's updates at consecutive steps at least .9",
            ),
        ),
        Claim(
            "Sec. III-B, Fig. 3(a, b)",
            "Token updates change unevenly over timesteps.",
            diagnosed(
                statistics.unevenness_over_steps,
                at_least(2),
                form=".2f",
                rule="largest change between neighbouring steps over the mean one, at least 2",
            ),
        ),
        Claim(
            "Sec. III-D",
            "I-steps chosen by the scores beat I-steps chosen by local errors.",
            not_testable(needs="a schedule from local errors, which no method here has"),
        ),
        Claim(
            "Sec. IV-D.3, Table VIII",
            "The adaptive schedule beats uniform and reversed ones.",
            best_schedule(metrics=("fid", "sfid", "is", "mae")),
        ),
    ),
    "Cache ratio": (
        Claim(
            "Sec. IV-D.2, Table VII, Fig. 9(a)",
            "r = 0.8 has the lowest FID and sFID of r = 0.5 to 0.9.",
            best_variant("cache_ratio", "r0.8", ("r0.9", "r0.7", "r0.6", "r0.5"), metrics=("fid", "sfid")),
        ),
        Claim(
            "Sec. IV-D.2, Table VII",
            "r = 0.9 has the highest Precision.",
            best_variant("cache_ratio", "r0.9", ("r0.8", "r0.7", "r0.6", "r0.5"), metrics=("precision",)),
        ),
        Claim(
            "Sec. IV-D.2, Table VII",
            "r = 0.9 is only a small drop from r = 0.8.",
            small_drop("cache_ratio", "r0.9", "r0.8", metrics=("fid", "sfid")),
        ),
        Claim(
            "Sec. IV-D.2, Table VII",
            "Ratios below 0.8 degrade IS and Precision.",
            best_variant("cache_ratio", "r0.8", ("r0.7", "r0.6", "r0.5"), metrics=("is", "precision")),
        ),
        Claim(
            "Sec. IV-D.2",
            "Generation quality is maintained at all tested ratios.",
            without_loss_at_ratios((0.9, 0.8, 0.7, 0.6, 0.5), metrics=("fid", "is")),
        ),
        Claim(
            "Sec. IV-D.2, Fig. 9(a)",
            "Reusing less than r = 0.8 does not help: FID and sFID do not improve with more recomputed tokens.",
            best_variant("cache_ratio", "r0.8", ("r0.5",), metrics=("fid", "sfid", "is", "mae")),
        ),
    ),
    "Refiners": (
        Claim(
            "Sec. IV-D.4, Table IX",
            "Quality rises with the number K of refiner blocks; K = 4 is best.",
            best_variant("refiner_blocks", "K4", ("K1", "K2", "K3"), metrics=("fid", "is", "mae")),
        ),
        Claim("Sec. III-C, IV-D.4", "LoRA on the refiner blocks improves quality.", better_with_lora),
    ),
    "Deviation": (
        Claim(
            "Sec. IV-E, Fig. 10",
            "Smaller deviation from the uncached run than ToCa, in predicted x0 and in x_t.",
            smaller_deviation_than_toca,
        ),
    ),
}
"""By the heading that reports show them under."""

MECHANISM = ("Which tokens", "Which blocks", "Which timesteps", "Cache ratio", "Refiners", "Deviation")
"""Headings of the claims that say why or how the method works; the others say what comes out: quality and speed. Counts
keep the two apart, because a mechanism may be borne out where the result is not."""

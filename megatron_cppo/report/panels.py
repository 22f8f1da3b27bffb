"""Which curves the report shows, in which section and with which words. Owns no drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log

from megatron_cppo.report.charts import NUM_COLORS


@dataclass(frozen=True, slots=True)
class Series:
    """A panel that a recipe adds: lines over numbers, or groups of bars over words.

    >>> Series("Precision", ["occlusion", "zoom_crop"], {"mask": [0.54, 0.38], "base rate": [0.27, 0.27]}, "").title
    'Precision'
    """

    title: str
    x: Sequence[float] | Sequence[str]
    lines: dict[str, list[float]]
    caption: str

    def __post_init__(self) -> None:
        if not self.x or not 1 <= len(self.lines) <= NUM_COLORS:
            raise ValueError(
                f"series '{self.title}': {len(self.lines)} lines over {len(self.x)} x; fix: 1 to {NUM_COLORS} lines, "
                "and at least one x"
            )
        for name, values in self.lines.items():
            if len(values) != len(self.x):
                raise ValueError(
                    f"series '{self.title}': line '{name}' has {len(values)} values for {len(self.x)} x; fix: one each"
                )


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: lines as (name, metric). `dots` are metrics drawn as points; a panel without data is left out."""

    title: str
    caption: str
    lines: tuple[tuple[str, str], ...]
    dots: tuple[str, ...] = ()
    from_zero: bool = False
    reference: tuple[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """Panels under one heading."""

    title: str
    lead: str
    panels: tuple[Panel, ...] = field(default=())


SECTIONS = (
    Section(
        "Learning",
        "",
        (
            Panel("Reward", "Mean over the step's samples.", (("reward", "reward/mean"),)),
            Panel(
                "Accuracy",
                "Share of right answers: the samples trained on, and rows that are never trained on.",
                (("training", "reward/accuracy"), ("evaluation", "evaluation/accuracy")),
                dots=("evaluation/accuracy",),
            ),
            Panel(
                "Response length",
                "Tokens of an answer, mean.",
                (("training", "response/length"), ("evaluation", "evaluation/length")),
                dots=("evaluation/length",),
            ),
            Panel(
                "Form",
                "Share of answers in the asked-for form, and of those cut by the length limit.",
                (("format", "reward/format"), ("truncated", "response/truncated_share")),
                from_zero=True,
            ),
            Panel(
                "Signal",
                "Groups whose rewards differ, and samples whose gate is open (positive advantage, an image).",
                (("informative groups", "groups/informative_share"), ("gated samples", "samples/gated_share")),
                from_zero=True,
            ),
            Panel("Loss", "Of the policy: clipped surrogate, or minus log-likelihood.", (("loss", "policy/loss"),)),
        ),
    ),
    Section(
        "Policy",
        "",
        (
            Panel("Entropy", "Per response token, in nats.", (("entropy", "policy/entropy"),)),
            Panel("KL to the reference", "Per response token, in nats.", (("kl", "policy/kl"),), from_zero=True),
            Panel("Gradient norm", "Before clipping.", (("norm", "optim/grad_norm"),), from_zero=True),
            Panel(
                "Clipped tokens",
                "Share whose ratio was clipped, from below and from above.",
                (("low", "policy/clip_low_share"), ("high", "policy/clip_high_share")),
                from_zero=True,
            ),
            Panel(
                "Engine against policy",
                "Mean |log-prob of the engine − log-prob of the policy| of the sampled tokens, in nats: during the "
                "updates; at checks, before them, of the tokens that the current weights sampled.",
                (
                    ("updates", "policy/logp_gap"),
                    ("check, image prompts", "rollout/logp_gap_image"),
                    ("check, text prompts", "rollout/logp_gap_text"),
                ),
                dots=("rollout/logp_gap_image", "rollout/logp_gap_text"),
                from_zero=True,
            ),
            Panel(
                "Staleness",
                "Versions between the weights that sampled a token and those that train on it; the share of answers "
                "that a swap of weights cut.",
                (
                    ("mean", "rollout/staleness_mean"),
                    ("largest", "rollout/staleness_max"),
                    ("cut answers", "rollout/cut_share"),
                ),
                from_zero=True,
            ),
            Panel(
                "Correction of the engine",
                "Mean weight of a token's policy loss, and the share of tokens whose weight was truncated or masked.",
                (("weight", "policy/correction_weight"), ("cut", "policy/correction_hit_share")),
                from_zero=True,
            ),
            Panel("Learning rate", "After warm-up and decay.", (("rate", "optim/learning_rate"),), from_zero=True),
        ),
    ),
    Section(
        "Perception",
        "The same answer is scored under three versions of its images: original, preserving and removing.",
        (
            Panel(
                "Contrastive perception loss",
                "Falls below ln 2 when answers diverge more on the removing view than on the preserving one.",
                (("cpl", "perception/cpl"),),
                reference=("ln 2", log(2)),
            ),
            Panel(
                "Masked tokens",
                "Share of the gated samples' response tokens that the mask picks; of those, the share whose clamp "
                "stops the gradient.",
                (("masked", "perception/masked_share"), ("clamped", "perception/clamped_share")),
                from_zero=True,
            ),
            Panel(
                "Entropy shift",
                "Removing minus original, per token of the gated samples, in nats.",
                (("shift", "perception/entropy_shift"),),
                reference=("0", 0.0),
            ),
        ),
    ),
)
TOKENS = Panel(
    "Tokens per step",
    "Of the answers; of all segments that an update ran (answers, prompts, views); of the images among them.",
    (("response", "tokens/response"), ("segments", "tokens/segments"), ("vision", "tokens/vision")),
    from_zero=True,
)

"""avg@k on held-out rows: sample k answers of each, grade them, average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_cppo.types import Group, Prompt

Generate = Callable[[Sequence[Prompt]], list[Group]]
Grade = Callable[[Sequence[Group]], list[Group]]
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is evaluated: the prompts, in portions of `portion` (progress is shown after each)."""

    prompts: tuple[Prompt, ...]
    generate: Generate
    grade: Grade
    portion: int

    def __call__(self, advance: Advance) -> dict[str, float]:
        """Mean accuracy, reward and length over all samples; `by_source` splits the accuracy by data source."""
        groups: list[Group] = []
        for start in range(0, len(self.prompts), self.portion):
            part = self.prompts[start : start + self.portion]
            groups += self.grade(self.generate(part))
            advance(len(part))
        return summarise(groups)


def summarise(groups: Sequence[Group]) -> dict[str, float]:
    """avg@k of graded groups: "accuracy" is the first reward's mean, the reward that the recipe names first."""
    samples = [sample for group in groups for sample in group.samples]
    values = {
        "reward": fmean(sample.reward for sample in samples),
        "length": fmean(len(sample.token_ids) for sample in samples),
        "truncated_share": fmean(sample.truncated for sample in samples),
    }
    for position, (name, _) in enumerate(samples[0].rewards):
        values[name] = fmean(sample.rewards[position][1] for sample in samples)
    sources = sorted({group.prompt.data_source for group in groups})
    for source in sources if len(sources) > 1 else ():
        chosen = [s.rewards[0][1] for group in groups if group.prompt.data_source == source for s in group.samples]
        values[f"{samples[0].rewards[0][0]}/{source}"] = fmean(chosen)
    return values

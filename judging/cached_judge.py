"""Ask a judge nothing twice and nothing beyond a price; all judgements of a run go through this module.

Judgements stand in a journal, keyed by the judge's settings and the judging prompt, whichever phase asks.
Failures are not kept; the next run asks again.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import fmean

from judging.judge_answers import Judge, Judgement
from support.artifacts import fingerprint
from support.journal import Journal
from support.progress import Bar

logger = logging.getLogger(__name__)

TOKENS_PER_JUDGEMENT = 200  # with an answer of one token, where the server does not count them
N_REPEATED = 20  # texts that are judged twice


@dataclass(frozen=True)
class CachedJudge(Judge):
    """A judge with a memory and a price limit."""

    model: Judge
    open_journal: Callable[[], Journal]
    key: str  # what a judgement depends on besides its prompt, such as the judge's model and settings
    usd_per_million_tokens: float = 0.0
    # What all judgements of this key may cost, in this run and earlier ones; those beyond it are missing and
    # say so. At most `max_workers` requests exceed it.
    max_usd: float | None = None

    def judge_each(self, prompts: Sequence[str], draw: int = 0) -> Iterator[tuple[int, Judgement]]:
        """Yield the index of a prompt and its judgement: first the known ones, then as they come.

        draw: number of the judgement of the same prompt; another number is asked for anew.
        """
        indices: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            indices.setdefault(fingerprint(self.key, prompt, draw), []).append(index)
        with self.open_journal() as journal:
            known = {key: Judgement(journal.rows[key]["score"]) for key in indices if key in journal.rows}
            for key, judgement in known.items():
                yield from ((index, judgement) for index in indices.pop(key))
            spent = sum(row["tokens"] for row in journal.rows.values() if row["judge"] == self.key)
            if indices and not self._is_over(spent):
                asked = list(indices)
                texts = [prompts[indices[key][0]] for key in asked]
                with (
                    Bar(len(texts), "judging", "text", leave=False) as progress,
                    closing(self.model.judge_each(texts)) as judged,
                ):
                    for number, judgement in judged:
                        tokens = TOKENS_PER_JUDGEMENT if judgement.tokens is None else judgement.tokens
                        spent += tokens
                        progress.update()
                        if not judgement.failure:
                            row = {"key": asked[number], "judge": self.key}
                            journal.append([{**row, "score": judgement.score, "tokens": tokens}])
                        yield from ((index, judgement) for index in indices.pop(asked[number]))
                        if self._is_over(spent):
                            break
        if indices:
            reason = f"judge.max_usd of {self.max_usd:g} USD is spent; raise it and run again"
            logger.warning("%d texts are not judged: %s", len(indices), reason)
            missing = Judgement(None, reason)
            yield from ((index, missing) for of_text in indices.values() for index in of_text)

    def repeat_noise(self, prompts: Sequence[str]) -> float | None:
        """Return the mean absolute difference of second judgements of 20 prompts; None if all failed."""
        prompts = list(dict.fromkeys(prompts))[:N_REPEATED]
        draws = [dict(self.judge_each(prompts, draw)) for draw in (0, 1)]
        pairs = [[found[index].score for found in draws] for index in range(len(prompts))]
        differences = [abs(one - other) for one, other in pairs if None not in (one, other)]
        return fmean(differences) if differences else None

    def _is_over(self, n_tokens: int) -> bool:
        return self.max_usd is not None and n_tokens * self.usd_per_million_tokens / 1e6 >= self.max_usd

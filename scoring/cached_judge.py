"""Ask a judge nothing twice and nothing beyond a price: all judgements of a run go through here.

Judgements stand in a journal, keyed by the text of the judging prompt, whichever phase asks: what is judged
in an validation is not paid again in the evaluation, and a changed classifier costs no judgement. Failures
are not kept, and are asked for again by the next run.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from statistics import fmean
from typing import Any

from scoring.judge_answers import Judgement
from support.artifacts import fingerprint
from support.journal import Journal

logger = logging.getLogger(__name__)

TOKENS_PER_JUDGEMENT = 200  # with an answer of one token, where the server does not count them
N_REPEATED = 20  # judgements that are asked for twice


class CachedJudge:
    """A judge with a memory and a purse; `judge_each` as a `GPTJudge` has it.

    judge: a GPTJudge or LocalJudge. open_journal: opens the journal of this judge's judgements.
    usd_per_million_tokens: its price, 0 for what runs here. max_usd: what all judgements in the journal may
    cost; those beyond are missing, with that reason. At most `max_workers` requests are over it.
    """

    def __init__(
        self,
        judge: Any,
        open_journal: Callable[[], Journal],
        usd_per_million_tokens: float = 0.0,
        max_usd: float | None = None,
    ) -> None:
        self.judge_itself = judge
        self._open_journal = open_journal
        self._usd_per_token = usd_per_million_tokens / 1e6
        self._max_usd = max_usd

    def judge(self, prompts: Sequence[str]) -> list[Judgement]:
        """Return a judgement for each complete judging prompt, in order."""
        found = dict(self.judge_each(prompts))
        return [found[index] for index in range(len(prompts))]

    def judge_each(self, prompts: Sequence[str], draw: int = 0) -> Iterator[tuple[int, Judgement]]:
        """Yield the index of a prompt and its judgement: first those that are known, then as they come.

        draw: of the same question; another one is asked for anew.
        """
        indices: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            key = fingerprint(prompt, draw) if draw else fingerprint(prompt)
            indices.setdefault(key, []).append(index)
        with self._open_journal() as journal:
            spent = sum(row["tokens"] for row in journal.rows.values()) * self._usd_per_token
            for key in [key for key in indices if key in journal.rows]:
                yield from ((index, Judgement(journal.rows[key]["score"])) for index in indices[key])
            asked = [key for key in indices if key not in journal.rows]
            waiting = set(asked)
            if asked and not self._is_over(spent):
                texts = [prompts[indices[key][0]] for key in asked]
                with closing(self.judge_itself.judge_each(texts)) as answers:
                    for number, judgement in answers:
                        key = asked[number]
                        waiting.discard(key)
                        tokens = judgement.tokens or TOKENS_PER_JUDGEMENT
                        spent += tokens * self._usd_per_token
                        if not judgement.failure:
                            journal.append([{"key": key, "score": judgement.score, "tokens": tokens}])
                        yield from ((index, judgement) for index in indices[key])
                        if self._is_over(spent):
                            break
            if waiting:
                reason = f"judge.max_usd of {self._max_usd:g} USD is spent; raise it and run again"
                logger.warning("%d texts are not judged: %s", len(waiting), reason)
                for key in [key for key in asked if key in waiting]:
                    yield from ((index, Judgement(None, reason)) for index in indices[key])

    def repeat_noise(self, prompts: Sequence[str]) -> float | None:
        """Return by how much a second judgement of the same text differs, on average; None if all failed.

        On the scale of 1 to 5, over the first 20 prompts.
        """
        prompts = list(dict.fromkeys(prompts))[:N_REPEATED]
        draws = [dict(self.judge_each(prompts, draw)) for draw in (0, 1)]
        pairs = [[found[index].score for found in draws] for index in range(len(prompts))]
        differences = [abs(one - other) for one, other in pairs if None not in (one, other)]
        return fmean(differences) if differences else None

    def _is_over(self, spent: float) -> bool:
        return self._max_usd is not None and spent >= self._max_usd


def main() -> None:
    """Check that a judge is asked once for a text, and no more when its money is spent."""
    import tempfile
    from pathlib import Path

    from support.run_folder import RunFolder

    asked = []

    class Counting:
        def judge_each(self, prompts: Sequence[str]) -> Iterator[tuple[int, Judgement]]:
            for index, prompt in enumerate(prompts):
                asked.append(prompt)
                yield index, Judgement(4.0, tokens=100_000)

    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        judge = CachedJudge(Counting(), lambda: folder.journal("judgements", "check"), 1.0, 0.15)
        found = judge.judge(["a", "b", "a", "c"])
    assert [judgement.score for judgement in found] == [4.0, 4.0, 4.0, None]
    assert asked == ["a", "b"]
    print("cached_judge OK:", found[-1].failure)


if __name__ == "__main__":
    main()

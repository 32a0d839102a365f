"""Metrics of answers: how near what was written is to what is right. The figures are those of the named libraries."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

from veneer.core.errors import ConfigError, UsageError, nearest
from veneer.tasks.task import Goals

Judge = Callable[[Sequence[str], Sequence[str]], float]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    return _share(answer.strip() == right.strip() for answer, right in zip(answers, references, strict=True))


def _final_number(answers: Sequence[str], references: Sequence[str]) -> float:
    return _share(
        last is not None and last == _last_number(right)
        for last, right in zip(map(_last_number, answers), references, strict=True)
    )


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _rouge(kind: str) -> Judge:
    def judge(answers: Sequence[str], references: Sequence[str]) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=True)
        scores = [scorer.score(right, answer)[kind].fmeasure for answer, right in zip(answers, references, strict=True)]
        return float(sum(scores) / len(scores))

    return judge


def _sacrebleu(kind: str) -> Judge:
    def judge(answers: Sequence[str], references: Sequence[str]) -> float:
        import sacrebleu

        score: Any = getattr(sacrebleu, f"corpus_{kind}")(list(answers), [list(references)])
        return float(score.score)

    return judge


def _errors(kind: str) -> Judge:
    def judge(answers: Sequence[str], references: Sequence[str]) -> float:
        import jiwer

        kept = [(_words(answer), _words(right)) for answer, right in zip(answers, references, strict=True)]
        if not any(right for _, right in kept):
            return float("nan")
        return float(getattr(jiwer, kind)([right for _, right in kept], [answer for answer, _ in kept]))

    return judge


def _words(text: str) -> str:
    """A transcript as it is compared: lower case, without punctuation, one space between words."""
    return " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split())


def _share(hits: Any) -> float:
    found = list(hits)
    return sum(found) / len(found)


_JUDGES: dict[str, tuple[Judge, str, str | None]] = {
    "exact_match": (_exact_match, "max", None),
    "final_number": (_final_number, "max", None),
    "rouge1": (_rouge("rouge1"), "max", "rouge_score"),
    "rouge2": (_rouge("rouge2"), "max", "rouge_score"),
    "rougeL": (_rouge("rougeL"), "max", "rouge_score"),
    "bleu": (_sacrebleu("bleu"), "max", "sacrebleu"),
    "chrf": (_sacrebleu("chrf"), "max", "sacrebleu"),
    "wer": (_errors("wer"), "min", "jiwer"),
    "cer": (_errors("cer"), "min", "jiwer"),
}
"""Each metric with whether it is to be small or large, and the package that it is from.

``exact_match`` and ``final_number`` (the last number in each, as in worked answers of arithmetic) are shares of
answers, ``rouge*`` mean F-measures with stemming, ``bleu`` and ``chrf`` sacrebleu's of the corpus, from 0 to 100, and
``wer`` and ``cer`` jiwer's errors a word and a character, case and punctuation left out.
"""


def named(text: str | None, customary: Sequence[str]) -> tuple[str, ...]:
    """The metrics that a run asks for, or the customary ones.

    >>> named("bleu,chrf", ())
    ('bleu', 'chrf')

    Raises:
        ConfigError: an unknown one.
        UsageError: one whose package is missing.
    """
    names = tuple(name.strip() for name in text.split(",")) if text is not None else tuple(customary)
    for name in names:
        if name not in _JUDGES:
            raise ConfigError(f"judge_by has {name!r}; expected any of {', '.join(_JUDGES)}.{nearest(name, _JUDGES)}")
        package = _JUDGES[name][2]
        if package is not None and importlib.util.find_spec(package) is None:
            raise UsageError(f"{name} needs {package}; install it: pip install 'veneer[metrics]'.")
    return names


def goals(names: Sequence[str]) -> Goals:
    """Whether each metric is to be small or large."""
    return {name: "min" if _JUDGES[name][1] == "min" else "max" for name in names}


def judged(names: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The metrics of at least one answer."""
    return {name: _JUDGES[name][0](answers, references) for name in names}

"""Metrics of answers: how near what was written is to what is right. The figures are those of the named libraries."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, final

from veneer.core.errors import ConfigError, UsageError, nearest
from veneer.tasks.options import TaskOptions
from veneer.tasks.sql import check_database, parses, same_rows
from veneer.tasks.task import Goals

References = Sequence[Sequence[str]]
"""What is right, for each answer: at least one text, any of which will do."""

Judge = Callable[[Sequence[str], References], float]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _exact_match(answers: Sequence[str], references: References) -> float:
    return _share(
        answer.strip() in [one.strip() for one in right] for answer, right in zip(answers, references, strict=True)
    )


def _final_number(answers: Sequence[str], references: References) -> float:
    return _share(
        last is not None and last in map(_last_number, right)
        for last, right in zip(map(_last_number, answers), references, strict=True)
    )


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _sql_parse(answers: Sequence[str], references: References) -> float:
    return _share(parses(answer) for answer in answers)


def _rouge(kind: str) -> Judge:
    def judge(answers: Sequence[str], references: References) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=True)
        scores = [
            scorer.score_multi(right, answer)[kind].fmeasure for answer, right in zip(answers, references, strict=True)
        ]
        return float(sum(scores) / len(scores))

    return judge


def _sacrebleu(kind: str) -> Judge:
    def judge(answers: Sequence[str], references: References) -> float:
        import sacrebleu

        # It takes the first reference of every answer, then the second of every answer, None where there is none.
        turned = [list(nth) for nth in zip_longest(*references)]
        score: Any = getattr(sacrebleu, f"corpus_{kind}")(list(answers), turned)
        return float(score.score)

    return judge


def _errors(kind: str) -> Judge:
    def judge(answers: Sequence[str], references: References) -> float:
        import jiwer

        errors: Callable[..., float] = getattr(jiwer, kind)
        heard, meant = [], []
        for answer, right in zip(map(_words, answers), references, strict=True):
            heard.append(answer)
            texts = [_words(one) for one in right]
            # jiwer has no errors of a text without a word.
            spoken = [one for one in texts if one]
            meant.append(min(spoken, key=lambda one: errors(one, heard[-1])) if len(spoken) > 1 else max(texts))
        return float(errors(meant, heard)) if any(meant) else float("nan")

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
    "sql_parse": (_sql_parse, "max", "sqlglot"),
}
"""Each metric with whether it is to be small or large, and the package that it is from.

``exact_match`` and ``final_number`` (the last number in each, as in worked answers of arithmetic) are shares of
answers, ``rouge*`` mean F-measures with stemming, ``bleu`` and ``chrf`` sacrebleu's of the corpus, from 0 to 100, and
``wer`` and ``cer`` jiwer's errors a word and a character, case and punctuation left out. ``sql_parse`` is the share of
answers that sqlglot parses as a statement of SQLite's dialect, whatever the references are. Of several references the
nearest counts, for ``bleu`` the n-grams of all, as it is defined.
"""

_EXECUTION = "sql_execution"
"""The share of answers that find in a database what the references find."""


def named(text: str | None, customary: Sequence[str]) -> tuple[str, ...]:
    """The metrics that a run asks for, or the customary ones.

    >>> named("bleu,chrf", ())
    ('bleu', 'chrf')

    Raises:
        ConfigError: an unknown one.
        UsageError: one whose package is missing.
    """
    names = tuple(name.strip() for name in text.split(",")) if text is not None else tuple(customary)
    known = (*_JUDGES, _EXECUTION)
    for name in names:
        if name not in known:
            raise ConfigError(f"judge_by has {name!r}; expected any of {', '.join(known)}.{nearest(name, known)}")
        package = _JUDGES[name][2] if name in _JUDGES else None
        if package is not None and importlib.util.find_spec(package) is None:
            raise UsageError(f"{name} needs {package}; install it: pip install 'veneer[metrics]'.")
    return names


def judged(
    names: Sequence[str], answers: Sequence[str], references: References, database: str | None = None
) -> dict[str, float]:
    """The metrics of at least one answer.

    Args:
        names: of the metrics.
        answers: what was written.
        references: what is right, for each: one text or more, any of which will do.
        database: the file that ``sql_execution`` executes them on.

    Raises:
        UsageError: there is no such database.
        DataError: a reference that cannot be executed.
    """
    found = {}
    for name in names:
        if name != _EXECUTION:
            found[name] = _JUDGES[name][0](answers, references)
        elif database is None:
            raise UsageError(f"{_EXECUTION} executes answers on a database; name its file: --database file.sqlite.")
        else:
            found[name] = _share(same_rows(database, answers, references))
    return found


@final
@dataclass(frozen=True)
class Judges:
    """What answers of a task are judged by."""

    names: tuple[str, ...]
    """The metrics."""
    database: str | None = None
    """The file of SQLite that queries are executed on."""

    def asked(self, options: TaskOptions) -> Judges:
        """Those that a run asks for, else these customary ones.

        Raises:
            ConfigError: an unknown metric, or a database without a metric for it, or the other way round.
            UsageError: a package is missing, or the database.
        """
        found = Judges(named(options.judge_by, self.names))
        if options.database is None and _EXECUTION in found.names:
            raise ConfigError(f"judge_by has {_EXECUTION}, which needs a database; give database, a file of SQLite.")
        return found.on(options.database) if options.database is not None else found

    def on(self, database: str) -> Judges:
        """The same on another database.

        Raises:
            ConfigError: none of them asks one.
            UsageError: it is no database.
        """
        if _EXECUTION not in self.names:
            raise ConfigError(
                f"database is what {_EXECUTION} executes queries on, and answers are judged by "
                f"{', '.join(self.names)}; add {_EXECUTION} to judge_by, or leave database out."
            )
        check_database(database)
        return replace(self, database=database)

    def ready(self) -> None:
        """Raise a UsageError when the database is not there."""
        if self.database is not None:
            check_database(self.database)

    @property
    def goals(self) -> Goals:
        """Whether each metric is to be small or large."""
        return {name: "min" if name in _JUDGES and _JUDGES[name][1] == "min" else "max" for name in self.names}

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"judge_by": list(self.names), **({"database": self.database} if self.database is not None else {})}

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> Judges:
        """What ``to_dict`` gave; the database may be elsewhere by now."""
        return cls(named(",".join(values["judge_by"]), ()), values.get("database"))

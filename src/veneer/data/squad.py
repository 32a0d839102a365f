"""SQuAD's own JSON: articles of paragraphs of questions, as one row a question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_PARAGRAPHS = "paragraphs"


def is_squad(values: Any) -> bool:
    """Whether a JSON document has SQuAD's outer form: ``{"data": [{"paragraphs": ...}, ...]}``."""
    articles = values.get("data") if isinstance(values, Mapping) else None
    return (
        isinstance(articles, list)
        and bool(articles)
        and all(isinstance(article, Mapping) and _PARAGRAPHS in article for article in articles)
    )


def questions(document: Mapping[str, Any]) -> Iterator[dict[str, Any] | str]:
    """Each question of a document with its context and answers; in the place of what is none, what is wrong with it.

    >>> list(questions({"data": [{"paragraphs": [{"context": "In Rome.", "qas": [{"question": "Where?"}]}]}]}))
    [{'context': 'In Rome.', 'question': 'Where?'}]
    """
    for number, article in enumerate(document["data"]):
        for at, paragraph in enumerate(_list(article, _PARAGRAPHS)):
            where = f"data[{number}].paragraphs[{at}]"
            if not isinstance(paragraph, Mapping) or "context" not in paragraph or "qas" not in paragraph:
                yield f"{where} has no context with qas, as SQuAD's files do"
                continue
            for which, question in enumerate(_list(paragraph, "qas")):
                if isinstance(question, Mapping):
                    yield {"context": paragraph["context"], **question}
                else:
                    yield f"{where}.qas[{which}] is no object with a question"


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    found = values[name]
    return found if isinstance(found, list) else [found]

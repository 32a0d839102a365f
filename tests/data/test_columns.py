from __future__ import annotations

import pytest

from veneer.core.errors import ConfigError, DataError
from veneer.data.columns import parsed, renamed
from veneer.data.sources import rows_of


def test_columns_get_the_names_that_are_understood() -> None:
    (given,) = rows_of([{"question": "what", "answer": "that", "id": 3}])
    row = renamed(given, parsed("instruction=question, output=answer"))
    assert row.values == {"instruction": "what", "output": "that", "id": 3}
    assert row.origin == given.origin


def test_two_columns_may_change_places() -> None:
    (given,) = rows_of([{"prompt": "b", "completion": "a"}])
    row = renamed(given, parsed("prompt=completion,completion=prompt"))
    assert row.values == {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question", "expected pairs as in instruction=question,output=answer"),
        ("output=", "expected pairs"),
        ("outptu=answer", "columns has 'outptu'.*Did you mean 'output'"),
    ],
)
def test_what_is_no_mapping(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parsed(text)


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(
        DataError, match=r"example 1 has no column 'anser'; it has question, answer\. Did you mean 'answer'"
    ):
        renamed(rows_of([{"question": "a", "answer": "b"}])[0], {"output": "anser"})

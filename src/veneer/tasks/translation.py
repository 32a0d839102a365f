"""Translation, by an encoder-decoder, or by a language model that is told what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor, nn

from veneer.core.errors import ConfigError, DataError, listed
from veneer.core.task_type import TaskType
from veneer.data.encode import Encoded, EncodedSet, Truncation
from veneer.data.pairs import pair
from veneer.data.rows import Row
from veneer.data.texts import text_of
from veneer.tasks import causal_lm, seq2seq_lm
from veneer.tasks.judges import Judges
from veneer.tasks.options import TaskOptions
from veneer.tasks.task import BatchLoss, Goals, Piece, Prediction, Tally
from veneer.tasks.writing import AbstractWriter

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CUSTOMARY = Judges(("bleu", "chrf"))
_TRANSLATION = "translation"


@final
@dataclass(frozen=True)
class Task(AbstractWriter):
    """What a row says in one language is the source, in the other the target; the rest is the inner task's."""

    inner: seq2seq_lm.Task | causal_lm.Task = field(default_factory=seq2seq_lm.Task)
    prefix: str = ""
    languages: tuple[str, str] | None = None

    columns: ClassVar[tuple[str, ...]] = (_TRANSLATION, "source", "target")

    @property
    def task_type(self) -> TaskType:  # type: ignore[override]
        # By its type an adapter finds the class of its base again.
        return TaskType.CAUSAL_LM if isinstance(self.inner, causal_lm.Task) else TaskType.TRANSLATION

    @property
    def auto_class(self) -> str:  # type: ignore[override]
        return self.inner.auto_class

    @property
    def packs(self) -> bool:  # type: ignore[override]
        return self.inner.packs

    @property
    def goals(self) -> Goals:
        return self.inner.goals

    @property
    def judges(self) -> Judges:
        return self.inner.judges

    def judged_by(self, judges: Judges) -> Task:
        return replace(self, inner=replace(self.inner, judges=judges))

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("translation", "prefix", "languages", "judge_by", "database")
        languages = _languages(options.languages) if options.languages is not None else None
        prefix = options.prefix
        encoder_decoder = config is None or bool(config.is_encoder_decoder)
        if prefix is None and not encoder_decoder:
            if languages is None:
                raise ConfigError(
                    "A language model has to be told what to translate into; give --languages en-de, or --prefix with "
                    "the words that stand before every source."
                )
            prefix = f"Translate from {languages[0]} to {languages[1]}:\n\n"
        return Task(_inner(encoder_decoder, _CUSTOMARY.asked(options)), prefix or "", languages)

    def to_dict(self) -> dict[str, Any]:
        return {
            "encoder_decoder": isinstance(self.inner, seq2seq_lm.Task),
            "prefix": self.prefix,
            "languages": list(self.languages) if self.languages else None,
            **self.judges.to_dict(),
        }

    def restored(self, values: Mapping[str, Any]) -> Task:
        languages = values["languages"]
        return Task(
            _inner(bool(values["encoder_decoder"]), Judges.restored(values)),
            str(values["prefix"]),
            (str(languages[0]), str(languages[1])) if languages else None,
        )

    def described(self, config: PretrainedConfig) -> Task:
        return Task(_inner(bool(config.is_encoder_decoder), _CUSTOMARY))

    def model_options(self) -> dict[str, Any]:
        return self.inner.model_options()

    def check(self, row: Row, *, labelled: bool = True) -> None:
        self._pair(row, labelled=labelled)

    def prepare(self, rows: Iterable[Row], processor: Any) -> tuple[Any, list[str]]:
        if self.languages is not None and hasattr(processor, "src_lang"):
            # mBART, M2M100 and NLLB mark both texts with their language.
            processor.src_lang, processor.tgt_lang = self.languages
        return self.inner.prepare(self._good(rows), processor)

    def encode(
        self,
        rows: Sequence[Row],
        processor: Any,
        *,
        max_length: int,
        train_on: str,
        truncate: Truncation = "end",
        labelled: bool = True,
    ) -> EncodedSet:
        plain = self._rows(rows, labelled=labelled)
        return self.inner.encode(plain, processor, max_length=max_length, train_on=train_on, truncate=truncate)

    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        return self.inner.collate(examples, processor, packed=packed)

    def units(self, batch: dict[str, Tensor]) -> int:
        return self.inner.units(batch)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        return self.inner.loss(model, batch)

    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        return self.inner.metrics(tally, predictions, examples)

    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        return self.inner.preview(example, processor)

    def ask(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[Encoded]:
        return self.inner.ask(self._rows(rows, labelled=False), processor, max_length=max_length)

    def given(self, examples: Sequence[Encoded], processor: Any) -> dict[str, Tensor]:
        return self.inner.given(examples, processor)

    def generation(self, processor: Any) -> dict[str, Any]:
        if self.languages is not None and hasattr(processor, "tgt_lang"):
            return {"forced_bos_token_id": processor.convert_tokens_to_ids(self.languages[1])}
        return {}

    def _good(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            with contextlib.suppress(DataError):
                yield from self._rows([row], labelled=False)

    def _rows(self, rows: Sequence[Row], *, labelled: bool) -> list[Row]:
        """Rows as the inner task reads them."""
        found = []
        for row in rows:
            source, target = self._pair(row, labelled=labelled)
            values = {"prompt": f"{self.prefix}{source}", "completion": target}
            found.append(Row(row.origin, {key: value for key, value in values.items() if value is not None}))
        return found

    def _pair(self, row: Row, *, labelled: bool) -> tuple[str, str | None]:
        given = row.values.get(_TRANSLATION)
        if given is None:
            return pair(row, labelled=labelled)
        if not isinstance(given, Mapping) or len(given) < 1 + labelled:
            raise DataError(f"{row.origin} has no texts by language in {_TRANSLATION}; expected two, as en and de.")
        source, target = self.languages or tuple(map(str, [*given, ""][:2]))
        for language in (source, target) if labelled else (source,):
            if language not in given:
                raise DataError(f"{row.origin} has the languages {listed(map(str, given))}; expected {language} too.")
        texts = Row(row.origin, given)
        return text_of(texts, source), text_of(texts, target) if given.get(target) is not None else None


def _inner(encoder_decoder: bool, judges: Judges) -> seq2seq_lm.Task | causal_lm.Task:
    return seq2seq_lm.Task(judges=judges) if encoder_decoder else causal_lm.Task(judges)


def _languages(text: str) -> tuple[str, str]:
    source, sign, target = (part.strip() for part in text.partition("-"))
    if not (source and sign and target):
        raise ConfigError(f"languages is {text!r}; expected from which to which, as in en-de.")
    return source, target

"""Speech to text by an encoder-decoder, as Whisper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor, nn

from veneer.core.errors import ConfigError, DataError, nearest
from veneer.core.task_type import TaskType
from veneer.data import audio, media
from veneer.data.encode import IGNORED, Encoded, EncodedSet, Truncation
from veneer.data.pairs import cut_target
from veneer.data.rows import Row
from veneer.data.texts import report, text_of
from veneer.tasks import decoding
from veneer.tasks.judges import Judges
from veneer.tasks.options import TaskOptions
from veneer.tasks.task import BatchLoss, Goals, Piece, Prediction, Tally
from veneer.tasks.writing import AbstractWriter

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CUSTOMARY = Judges(("wer", "cer"))
_TEXTS = ("text", "transcription")
_ENGLISH_VOCABULARY = 51864
"""Tokens of a Whisper that knows no other language."""


@final
@dataclass(frozen=True)
class Task(AbstractWriter):
    """The decoder writes what the encoder has heard; a unit is a token of a transcript.

    A transcript's tokens are those of the model's tokenizer, Whisper's prompt of language and task included.
    """

    language: str | None = None
    """That of the speech, for a model of several."""
    translates: bool = False
    """Whether the text is English, whatever the speech."""
    start: int | None = None
    """The token that the model puts before every text by itself."""
    most: int | None = None
    """The most tokens that the decoder writes."""
    judges: Judges = _CUSTOMARY

    auto_class: ClassVar[str] = "AutoModelForSpeechSeq2Seq"
    task_type: ClassVar[TaskType] = TaskType.SPEECH_SEQ_2_SEQ
    packs: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = (*audio.COLUMNS, *_TEXTS)
    keeps: ClassVar[bool] = False

    @property
    def goals(self) -> Goals:
        return decoding.GOALS

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("speech_seq2seq", "languages", "judge_by", "database")
        audio.check_installed()
        language, translates = _languages(options.languages, config)
        start, most = _decoder(config)
        return Task(language, translates, start, most, self.judges.asked(options))

    def judged_by(self, judges: Judges) -> Task:
        return replace(self, judges=judges)

    def to_dict(self) -> dict[str, Any]:
        spoken = {"language": self.language, "translates": self.translates}
        return {**spoken, "start": self.start, "most": self.most, **self.judges.to_dict()}

    def restored(self, values: Mapping[str, Any]) -> Task:
        numbers = [None if values[name] is None else int(values[name]) for name in ("start", "most")]
        language = None if values["language"] is None else str(values["language"])
        return Task(language, bool(values["translates"]), *numbers, Judges.restored(values))

    def described(self, config: PretrainedConfig) -> Task:
        start, most = _decoder(config)
        return Task(start=start, most=most)

    def model_options(self) -> dict[str, Any]:
        return {}

    def check(self, row: Row, *, labelled: bool = True) -> None:
        audio.sound_file(row)
        if labelled:
            _transcript(row)

    def prepare(self, rows: Iterable[Row], processor: Any) -> tuple[Any, list[str]]:
        audio.check_installed()
        if self.language is not None:
            processor.tokenizer.set_prefix_tokens(language=self.language, task=self._whispers_task)
        return processor, audio.remarks(rows, processor.feature_extractor)

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
        most = min(max_length, self.most or max_length)
        found: list[Encoded] = []
        cut: list[int] = []
        for row in rows:
            kept, length = audio.heard(row, processor.feature_extractor)
            labels = self._tokens(_transcript(row), processor)
            too_long = _too_long(row.origin, length, processor.feature_extractor)
            over = len(labels) - most
            if over > 0:
                too_long = f"{row.origin} has {len(labels):,} tokens to write, and at most {most:,} are taken"
            if too_long and truncate == "fail":
                raise DataError(f"{too_long}; cut it, or let truncate be end, start or drop.")
            if too_long and truncate == "drop":
                continue
            if too_long:
                cut.append(max(0, over))
                kept["cut"] = truncate
            found.append(Encoded(row.origin, [], cut_target(labels, most, truncate), kept))
        counts = report(rows, found, cut=cut, dropped=len(rows) - len(found))
        # Nothing is read as tokens: those that are written are all there are.
        return EncodedSet(tuple(found), replace(counts, tokens=counts.trained_tokens))

    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        return {**self.given(examples, processor), "labels": decoding.targets(examples)}

    def units(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return decoding.loss(model, inputs, batch["labels"])

    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        return decoding.metrics(tally)

    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        written = processor.tokenizer.decode(example.labels, skip_special_tokens=False)
        return [Piece(f"{media.named(example.more['file'])}\n", trained=False), Piece(written, trained=True)]

    def ask(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[Encoded]:
        found = []
        for row in rows:
            kept, length = audio.heard(row, processor.feature_extractor)
            too_long = _too_long(row.origin, length, processor.feature_extractor)
            if too_long:
                raise DataError(f"{too_long}; cut it into shorter clips.")
            right = _transcript(row) if any(row.values.get(name) is not None for name in _TEXTS) else None
            found.append(Encoded(row.origin, [], [], {**kept, "asked": media.named(kept["file"]), "reference": right}))
        return found

    def given(self, examples: Sequence[Encoded], processor: Any) -> dict[str, Tensor]:
        return audio.features(examples, processor.feature_extractor)

    def generation(self, processor: Any) -> dict[str, Any]:
        return {} if self.language is None else {"language": self.language, "task": self._whispers_task}

    @property
    def _whispers_task(self) -> str:
        return "translate" if self.translates else "transcribe"

    def _tokens(self, text: str, processor: Any) -> list[int]:
        ids = list(processor.tokenizer(text)["input_ids"])
        # The model begins every text with it by itself.
        return ids[1:] if ids and ids[0] == self.start else ids


def _transcript(row: Row) -> str:
    column = next((name for name in _TEXTS if row.values.get(name) is not None), _TEXTS[0])
    text = text_of(row, column)
    if not text.strip():
        raise DataError(f"{row.origin} has an empty {column}; expected what is said.")
    return text


def _too_long(origin: str, length: int, extractor: Any) -> str | None:
    most = audio.longest(extractor)
    if most is None or length <= most:
        return None
    seconds = [samples / audio.rate(extractor) for samples in (length, most)]
    return f"{origin} is {seconds[0]:.1f} s long, and at most {seconds[1]:g} s are taken"


def _decoder(config: PretrainedConfig | None) -> tuple[int | None, int | None]:
    """The token that begins every text, and the most tokens of one.

    Raises:
        ConfigError: the model has no decoder of its own.
    """
    if config is None:
        return None, None
    if not config.is_encoder_decoder:
        raise ConfigError(
            f"A {config.model_type} writes no text from an encoder's sound; expected an encoder-decoder, as Whisper."
        )
    most = getattr(config, "max_target_positions", None)
    return config.decoder_start_token_id, most if isinstance(most, int) else None


def _languages(text: str | None, config: PretrainedConfig | None) -> tuple[str | None, bool]:
    """The language of the speech, and whether it is translated.

    Raises:
        ConfigError: the model needs one, or knows no other than English, or it is unknown.
    """
    several = config is None or (config.model_type == "whisper" and config.vocab_size > _ENGLISH_VOCABULARY)
    if text is None and several and config is not None:
        raise ConfigError(
            "This Whisper knows many languages; give the one that is spoken, as in --languages de, or --languages "
            "de-en for texts that translate it into English."
        )
    if text is None:
        return None, False
    if not several:
        raise ConfigError("languages has a meaning for a Whisper of several languages alone; leave it out.")
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    spoken, _, written = (word.strip() for word in text.partition("-"))
    if spoken not in LANGUAGES or written not in ("", "en", spoken):
        raise ConfigError(
            f"languages is {text!r}; expected a language of Whisper, as in de, or de-en to translate it into English."
            f"{nearest(spoken, LANGUAGES)}"
        )
    return spoken, written == "en" != spoken

"""The kinds of task an adapter can be for, in veneer's names and PEFT's."""

from __future__ import annotations

from enum import StrEnum

from veneer.core.errors import ConfigError, nearest


class TaskType(StrEnum):
    """What the adapted model is for. Classification tasks also train and save the model's head.

    PEFT's spellings are accepted: ``TaskType("QUESTION_ANS") is TaskType.QUESTION_ANSWERING``.
    """

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    MULTIPLE_CHOICE = "MULTIPLE_CHOICE"
    SPEECH_SEQ_2_SEQ = "SPEECH_SEQ_2_SEQ"
    IMAGE_CLASSIFICATION = "IMAGE_CLASSIFICATION"
    QUESTION_ANSWERING = "QUESTION_ANSWERING"
    QUESTION_ANS = "QUESTION_ANSWERING"
    TRANSLATION = "TRANSLATION"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
    OTHER = "OTHER"

    @classmethod
    def _missing_(cls, value: object) -> TaskType:
        key = str(value).upper()
        if key in cls.__members__:
            return cls.__members__[key]
        raise ConfigError(
            f"task_type is {value!r}; expected one of {', '.join(member.value for member in cls)}."
            f"{nearest(key, cls.__members__)}"
        )

    @property
    def has_head(self) -> bool:
        """Whether the task's head is new for each data set, so that it is trained and saved by default."""
        return self in _WITH_HEAD

    @property
    def peft_name(self) -> str | None:
        """PEFT's name for it; None where PEFT has none and refuses others."""
        return _PEFT_NAMES.get(self)


_WITH_HEAD = frozenset(
    {
        TaskType.SEQ_CLS,
        TaskType.TOKEN_CLS,
        TaskType.MULTIPLE_CHOICE,
        TaskType.IMAGE_CLASSIFICATION,
        TaskType.QUESTION_ANSWERING,
    }
)

_PEFT_NAMES = {
    TaskType.CAUSAL_LM: "CAUSAL_LM",
    TaskType.SEQ_2_SEQ_LM: "SEQ_2_SEQ_LM",
    TaskType.SEQ_CLS: "SEQ_CLS",
    TaskType.TOKEN_CLS: "TOKEN_CLS",
    TaskType.QUESTION_ANSWERING: "QUESTION_ANS",
    TaskType.FEATURE_EXTRACTION: "FEATURE_EXTRACTION",
}

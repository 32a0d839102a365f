"""``veneer chat``: many turns, adapters switched on the way, commands, and what a full context does."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import chat
from veneer import LoraConfig, UsageError, get_peft_model
from veneer.cli.main import main
from veneer.evaluate.conversation import Conversation
from veneer.evaluate.generation import answer, encode_messages
from veneer.tasks.loading import load_model
from veneer.tasks.sampling import Sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat.saved(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for seed, name in enumerate(("red", "blue")):
        torch.manual_seed(seed)
        adapted = get_peft_model(load_model(model), LoraConfig(r=4, init_lora_weights=False, lora_alpha=64))
        folders.append(tmp_path_factory.mktemp("adapters") / name)
        adapted.save_pretrained(folders[-1])
    return folders


def talked(
    model: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[dict[str, Any], str]:
    """The transcript, and what was said beside it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", "--model", str(model), "--max-new-tokens", "5", "--json", *more]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def alone(model: Path, messages: list[tuple[str, str]], adapter: Path | None = None) -> str:
    """The answer to a whole conversation at once, by a model of its own."""
    from veneer import PeftModel

    loaded: Any = load_model(model)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    tokenizer = chat.tokenizer()
    encoded = encode_messages(tokenizer, [{"role": role, "content": text} for role, text in messages])
    return answer(loaded, tokenizer, encoded, Sampling(max_new_tokens=5)).text


def test_each_answer_is_to_all_that_was_said_and_by_the_adapter_in_use(
    model: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [flag for folder in adapters for flag in ("--adapter", str(folder))]
    lines = ["the stone", "/use blue", "the river", "/use base", "", "the cloud", "/quit", "never said"]
    document, err = talked(model, lines, monkeypatch, capsys, *given, "--system", "it was so")
    assert document["adapters"] == ["base", "red", "blue"]
    assert [turn["adapter"] for turn in document["turns"]] == ["red", "blue", "base"]
    assert "Answers come from red." in err
    assert "Answers come from blue." in err
    said = [("system", "it was so")]
    for turn, folder in zip(document["turns"], (*adapters, None), strict=True):
        said.append(("user", turn["message"]))
        assert turn["text"] == alone(model, said, folder)
        said.append(("assistant", turn["text"]))
    assert len({turn["text"] for turn in document["turns"]}) == 3


def test_answers_are_streamed_to_stdout(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the stone"))
    assert main(["chat", "--model", str(model), "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == f"{alone(model, [('user', 'the stone')])}\n"


def test_commands(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["one", "/system two three", "/reset", "one", "/system", "/reset", "one", "/help", "/sue base", "/use bse"]
    document, err = talked(model, lines, monkeypatch, capsys)
    first, second, third = document["turns"]
    assert [turn["system"] for turn in document["turns"]] == [None, "two three", None]
    assert second["text"] == alone(model, [("system", "two three"), ("user", "one")])
    assert first["text"] == third["text"] == alone(model, [("user", "one")])
    for expected in ("/use NAME", "/system TEXT", "adapters: base", "There is no command /sue", "no adapter 'bse'"):
        assert expected in err
    assert "Did you mean" in err


def test_a_full_context_leaves_the_oldest_out_and_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{number} " * 8 for number in ("one", "two", "three", "four", "red", "blue")]
    document, err = talked(model, lines, monkeypatch, capsys)
    left_out = [turn["left_out"] for turn in document["turns"]]
    assert left_out[0] == 0
    assert max(left_out) >= 2
    assert "The context is full: the oldest 2 messages were left out." in err
    # What is left is answered as if it were all.
    at = next(at for at, count in enumerate(left_out) if count)
    kept = [
        (role, turn[part])
        for turn in document["turns"][:at]
        for role, part in (("user", "message"), ("assistant", "text"))
    ]
    turn = document["turns"][at]
    assert turn["text"] == alone(model, [*kept[left_out[at] :], ("user", turn["message"])])


def test_a_message_that_is_too_long_is_not_said(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document, err = talked(model, ["stone " * 200, "the stone"], monkeypatch, capsys)
    assert "the model's context holds 128" in err
    (turn,) = document["turns"]
    assert turn["text"] == alone(model, [("user", "the stone")])


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is(model: Path) -> None:
    talk = Conversation(load_model(model), chat.tokenizer(), Sampling(max_new_tokens=40), [])
    heard: list[str] = []

    def stop(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            raise KeyboardInterrupt

    turn = talk.say("the stone", on_text=stop)
    assert turn.interrupted
    assert not turn.stopped
    assert turn.text == "".join(heard)
    assert talk.messages[-1] == {"role": "assistant", "content": turn.text}
    assert not talk.say("and then").interrupted


def test_a_conversation_needs_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = chat.saved(tmp_path / "plain", template=None)
    monkeypatch.setattr("sys.stdin", io.StringIO("one"))
    assert main(["chat", "--model", str(folder)]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_a_message_that_the_template_refuses_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    folder = chat.saved(tmp_path / "strict", template=template + chat.CHAT_TEMPLATE)
    lines = ["/system be good", "one", "/system", "one"]
    document, err = talked(folder, lines, monkeypatch, capsys)
    assert "no system here" in err
    assert len(document["turns"]) == 1


class Typed(io.StringIO):
    """Lines from a terminal."""

    def isatty(self) -> bool:
        return True


def test_at_a_terminal_the_prompt_names_who_answers(
    model: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts: list[str] = []
    lines: list[Any] = ["/use base", KeyboardInterrupt, "one", EOFError]

    def typed(prompt: str) -> str:
        prompts.append(prompt)
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("sys.stdin", Typed())
    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", "--model", str(model), "--adapter", str(adapters[0]), "--max-new-tokens", "2"]) == 0
    assert prompts == ["red> ", "base> ", "base> ", "base> "]
    assert "Ctrl-D ends" in capsys.readouterr().err


def test_names_are_checked(model: Path) -> None:
    talk = Conversation(load_model(model), chat.tokenizer(), Sampling(), [])
    with pytest.raises(UsageError, match="There is no adapter 'red'; expected base"):
        talk.use("red")

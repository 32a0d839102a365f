"""Models, tokenizers and adapters by name, and one sentence for each thing that can be wrong with one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests import chat
from veneer import LoraConfig, UsageError, get_peft_model
from veneer.core.task_type import TaskType
from veneer.tasks.loading import (
    AUTO_CLASSES,
    DTYPES,
    adapter_folder,
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    tokenizer_for,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat.saved(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the model to break."""
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_loads_in_every_dtype(tiny: Path, dtype: str) -> None:
    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert load_model(tiny, dtype=dtype).dtype == expected


def test_loads_text_and_path_alike(tiny: Path) -> None:
    assert load_config(str(tiny)).model_type == load_config(tiny).model_type == "llama"
    assert load_tokenizer(tiny).chat_template == chat.CHAT_TEMPLATE


def test_a_missing_folder_names_the_nearest(tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no folder .*tinny.*Did you mean 'tiny'\?"):
        load_model(tiny.with_name("tinny"))


@pytest.mark.parametrize("name", ["someone/model", "model", "not a name!"])
def test_a_hub_name_when_offline(name: str) -> None:
    with pytest.raises(UsageError, match=r"There is no folder .*HF_HUB_OFFLINE") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_an_empty_name() -> None:
    with pytest.raises(UsageError, match="name is empty"):
        load_model(" ")


def test_a_file_and_a_folder_without_a_model(tiny: Path) -> None:
    with pytest.raises(UsageError, match="is a file"):
        load_model(tiny / "config.json")
    with pytest.raises(UsageError, match=r"has no config\.json"):
        load_model(tiny.parent)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not readable as JSON"),
        ("[]", "names no model_type"),
        ('{"model_type": "llamma"}', "Did you mean 'llama'"),
        ('{"model_type": "own", "auto_map": {}}', "code of its own, which is never run"),
        ('{"model_type": "llama", "hidden_size": "x"}', "hidden_size"),
    ],
)
def test_a_broken_config(broken: Path, text: str, expected: str) -> None:
    (broken / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=expected) as caught:
        load_model(broken)
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_weights(broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(UsageError, match="could not be loaded"):
        load_model(broken)
    weights.unlink()
    with pytest.raises(UsageError, match=r"no file named model\.safetensors"):
        load_model(broken)


def test_weights_of_another_size(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"does not fit its own config: .*in all 6 differ"):
        load_model(broken)


def test_incomplete_weights_are_refused_and_odd_ones_told(broken: Path) -> None:
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    safetensors.torch.save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"no weights for lm_head\.weight"):
        load_model(broken)
    tensors |= {"lm_head.weight": head, "extra.weight": head.clone()}
    safetensors.torch.save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"no place for extra\.weight"):
        load_model(broken)


def test_a_new_head_is_told(tiny: Path) -> None:
    with (
        pytest.warns(UserWarning, match=r"score\.weight.*start at random"),
        pytest.warns(UserWarning, match=r"no place for lm_head\.weight"),
    ):
        load_model(tiny, auto_class=AUTO_CLASSES[TaskType.SEQ_CLS], num_labels=3)


def test_the_wrong_kind_of_model(tiny: Path) -> None:
    with pytest.raises(UsageError, match="could not be loaded with AutoModelForSeq2SeqLM"):
        load_model(tiny, auto_class="AutoModelForSeq2SeqLM")
    with pytest.raises(UsageError, match="Did you mean 'float16'"):
        load_model(tiny, dtype="flaot16")


def test_a_model_without_tokenizer(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match="no tokenizer files"):
        load_tokenizer(broken)


def test_an_empty_model_needs_no_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    model = empty_model(broken)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(parameter.is_meta for parameter in model.parameters())
    assert type(empty_model(broken, auto_class="AutoModelForSequenceClassification")).__name__ == (
        "LlamaForSequenceClassification"
    )
    with pytest.raises(UsageError, match="cannot be built as AutoModelForSeq2SeqLM"):
        empty_model(broken, auto_class="AutoModelForSeq2SeqLM")


def test_every_task_type_has_a_class() -> None:
    assert set(AUTO_CLASSES) == set(TaskType)


class TestAdapterFolder:
    """From what the user names to the folder with the adapter in it."""

    @pytest.fixture
    def adapter(self, tiny: Path, tmp_path: Path) -> Path:
        model = get_peft_model(load_model(tiny), LoraConfig(r=2))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_a_run_and_an_adapter(self, adapter: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        shutil.copytree(adapter, run / "last")
        assert adapter_folder(adapter) == adapter
        assert adapter_folder(run) == run / "last"
        shutil.copytree(adapter, run / "best")
        assert adapter_folder(str(run)) == run / "best"

    def test_an_adapter_is_no_model(self, adapter: Path, tiny: Path) -> None:
        with pytest.raises(UsageError, match=rf"holds an adapter, not a model; give its base .*{tiny.name}"):
            load_model(adapter)

    def test_what_is_no_adapter(self, tiny: Path, adapter: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="holds a whole model"):
            adapter_folder(tiny)
        with pytest.raises(UsageError, match="Did you mean 'adapter'"):
            adapter_folder(tmp_path / "adaptor")
        with pytest.raises(UsageError, match="holds several adapters: adapter"):
            adapter_folder(tmp_path)
        (tmp_path / "empty").mkdir()
        with pytest.raises(UsageError, match="neither a run folder nor an adapter folder"):
            adapter_folder(tmp_path / "empty")


def test_the_tokenizer_of_the_adapter_comes_first(tiny: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "bare"]
    for number, folder in enumerate(folders[:2]):
        tokenizer = load_tokenizer(tiny)
        tokenizer.chat_template = f"{{{{ messages[0]['content'] }}}} {number}"
        tokenizer.save_pretrained(folder)
    folders[2].mkdir()
    assert tokenizer_for(tiny, []).chat_template == load_tokenizer(tiny).chat_template
    assert tokenizer_for(tiny, [folders[2]]).chat_template == load_tokenizer(tiny).chat_template
    assert tokenizer_for(tiny, [folders[2], folders[0]]).chat_template.endswith(" 0")
    with pytest.warns(UserWarning, match="another chat template"):
        assert tokenizer_for(tiny, folders).chat_template.endswith(" 0")

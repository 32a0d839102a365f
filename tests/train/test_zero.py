"""ZeRO-2 and ZeRO-3 on two gloo processes, where DeepSpeed is installed; and whose numbers count, without it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests import chat
from tests.train.test_processes import runs
from tests.train.test_shards import same
from veneer.core.config import LoraConfig
from veneer.core.errors import ConfigError, UsageError
from veneer.train import zero
from veneer.train.config import RunConfig

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed, which compiles when it is installed, is not here"
)

CASES: dict[str, dict[str, Any]] = {
    "lora": {"r": 1, "lora_alpha": 1, "accumulation": 2, "save_every": 1, "keep": 9},
    "everywhere": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"], "samples": 1},
    "checkpointed": {"checkpoint": "on", "kernels": "off", "use_dora": True},
    "full": {"target_modules": None, "method": "full", "tied": True, "learning_rate": 1e-3},
    "head": {"target_modules": None, "method": "head", "optimizer": "sgd", "learning_rate": 0.1},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, and one that it stopped."""
    place = tmp_path_factory.mktemp("whole")
    each = [{"output": str(place / case), **own, "batch_size": 4} for case, own in CASES.items()]
    codes, said = runs([*each, {**each[0], "output": str(place / "stopped"), "stop_at": 3}], 1)
    assert codes == {143}, said
    return place


@pytest.fixture(scope="module", params=[2, 3])
def split(request: pytest.FixtureRequest, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two processes, and both going on where the other stopped."""
    place = tmp_path_factory.mktemp("split")
    shutil.copytree(whole / "stopped", place / "1 to 2")
    each = [{"output": str(place / case), **own, "batch_size": 2} for case, own in CASES.items()]
    # No parameter is so small that every process keeps it whole.
    config = {"zero_optimization": {"stage": request.param, "stage3_param_persistence_threshold": 0}}
    (place / "zero.json").write_text(json.dumps(config))
    more = [
        {"output": str(place / "1 to 2"), "resume": True, "batch_size": 2},
        {**each[0], "output": str(place / "2 to 1"), "stop_at": 3},
    ]
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(place / "zero.json")}
    codes, said = runs([*each, *more], 2, variables)
    assert codes == {143}, said
    codes, said = runs([{"output": str(place / "2 to 1"), "resume": True, "batch_size": 4}], 1)
    assert codes == {0}, said
    notes = json.loads((place / "lora" / "log.jsonl").read_text().splitlines()[0])["notes"]
    assert any(note.startswith(f"ZeRO-{request.param}: ") for note in notes)
    return place


@needs_deepspeed
@pytest.mark.parametrize("case", [*CASES, "1 to 2", "2 to 1"])
def test_it_learns_what_one_process_does(case: str, whole: Path, split: Path) -> None:
    same(split / case, whole / (case if case in CASES else "lora"))


def configured(given: dict[str, Any], **values: Any) -> dict[str, Any]:
    settings = {"zero_optimization": {"stage": 2}, **given}
    zero._configure(settings, RunConfig(output="run", batch_size=2, accumulation=3, **values), processes=4)
    return settings


def test_deepspeed_gets_the_numbers_of_the_run() -> None:
    found = configured({"train_batch_size": "auto", "gradient_accumulation_steps": 1, "gradient_clipping": "auto"})
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_clipping"]) == (2, 1.0)
    # It counts each micro-batch as one, since the run tells it which is the last of a step.
    assert (found["gradient_accumulation_steps"], found["train_batch_size"]) == (1, 8)
    assert configured({}, clip=None)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, "has train_micro_batch_size_per_gpu=8, and the run 2"),
        ({"train_batch_size": 8}, "has train_batch_size=8, and the run 24"),
        ({"gradient_accumulation_steps": 2}, "has gradient_accumulation_steps=2, and the run 3"),
        ({"gradient_clipping": 0.5}, "has gradient_clipping=0.5, and the run 1.0"),
        ({"fp16": {"enabled": True}}, "has fp16="),
        ({"zero_optimization": {"stage": 1}}, "has ZeRO stage 1; expected 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer is not for"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param is not for"),
        ({"optimizer": {"type": "Adam"}}, "has an optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "has a scheduler"),
    ],
)
def test_other_numbers_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(given)


def test_zero_3_trains_no_adapter_of_the_embeddings() -> None:
    from veneer import get_peft_model

    model = get_peft_model(chat.model(), LoraConfig(target_modules=["embed_tokens"]))
    zero.check_model(model, 2)
    with pytest.raises(ConfigError, match="token ids have none"):
        zero.check_model(model, 3)
    zero.check_model(get_peft_model(chat.model(), LoraConfig(target_modules=["q_proj"])), 3)
    saved = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    zero.check_model(get_peft_model(chat.model(), saved), 3)
    zero.check_model(nn.Linear(2, 2), 3)


def test_deepspeed_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs DeepSpeed, which is not installed: pip install deepspeed"):
        zero.check_installed()

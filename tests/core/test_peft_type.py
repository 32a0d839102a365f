"""Types of adapters by PEFT's names."""

import peft
import pytest

from veneer import AdaLoraConfig, ConfigError, LoraConfig, PeftType, get_peft_config


def test_every_type_is_one_of_pefts() -> None:
    assert {"LORA", "ADALORA", "VERA"} <= {member.value for member in PeftType}
    for member in PeftType:
        assert peft.PeftType(member.value) == member.name == member


def test_a_config_says_its_type() -> None:
    assert LoraConfig().peft_type == PeftType.LORA


@pytest.mark.parametrize(
    ("values", "cls"),
    [({"peft_type": "LORA", "r": 3}, LoraConfig), ({"peft_type": "ADALORA", "total_step": 9}, AdaLoraConfig)],
)
def test_configs_from_plain_values(values: dict, cls: type) -> None:
    config = get_peft_config(values)
    assert type(config) is cls
    assert {key: getattr(config, key) for key in values} == values
    with pytest.raises(ConfigError, match="LOHA"):
        get_peft_config({"peft_type": "LOHA"})

"""Flags made from LoraConfig's fields: every field has one, and each reads what a user would type."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from veneer.cli.fields import adapter_config, adapter_options, adapter_values
from veneer.core.config import LoraConfig, field_docs
from veneer.core.errors import ConfigError
from veneer.train.families import adapter_fields


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        ("r", "16", 16),
        ("lora_alpha", "32", 32),
        ("lora_alpha", "0.5", 0.5),
        ("lora_dropout", "0.05", 0.05),
        ("bias", "lora_only", "lora_only"),
        ("use_rslora", True, True),
        ("lora_bias", False, False),
        ("fan_in_fan_out", True, True),
        ("target_modules", ["q_proj,v_proj"], ["q_proj", "v_proj"]),
        ("target_modules", ["q_proj", " v_proj "], ["q_proj", "v_proj"]),
        ("target_modules", ["all-linear"], "all-linear"),
        ("target_modules", [r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        ("exclude_modules", ["lm_head"], ["lm_head"]),
        ("modules_to_save", ["classifier,score"], ["classifier", "score"]),
        ("init_lora_weights", "true", True),
        ("init_lora_weights", "False", False),
        ("init_lora_weights", "gaussian", "gaussian"),
        ("layers_to_transform", ["0,2", "5"], [0, 2, 5]),
        ("layers_pattern", ["layers"], ["layers"]),
        ("alora_invocation_tokens", ["5,9"], [5, 9]),
        ("layer_replication", ["0-4,2-5", "1-2"], [[0, 4], [2, 5], [1, 2]]),
        ("trainable_token_indices", ["7,9", "11"], [7, 9, 11]),
        ("trainable_token_indices", ['{"embed_tokens": [7]}'], {"embed_tokens": [7]}),
        ("rank_pattern", ["q_proj=4,layer.1.*value=8"], {"q_proj": 4, "layer.1.*value": 8}),
        ("rank_pattern", ['{"q_proj": 4, "a,b=c": 8}'], {"q_proj": 4, "a,b=c": 8}),
        ("alpha_pattern", ["q_proj=4.5"], {"q_proj": 4.5}),
        ("alpha_pattern", ["match"], "match"),
        ("family", "vera", "vera"),
        ("bias", "vera_only", "vera_only"),
        ("init_lora_weights", "pissa_niter_4", "pissa_niter_4"),
        ("loftq_config", ["loftq_bits=8,loftq_iter=5"], {"loftq_bits": 8, "loftq_iter": 5}),
        ("eva_config", ["rho=1.5", "whiten=true"], {"rho": 1.5, "whiten": True}),
        ("corda_config", ["corda_method=kpm,cache_file=null"], {"corda_method": "kpm", "cache_file": None}),
        ("lora_ga_config", ['{"direction": "ArBr", "stable_gamma": 8}'], {"direction": "ArBr", "stable_gamma": 8}),
    ],
)
def test_values(field: str, given: Any, expected: Any) -> None:
    assert adapter_values({field: given}) == {field: expected}


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        ("r", "eight", "--r is 'eight'; expected a whole number"),
        ("lora_alpha", "x", "--lora-alpha is 'x'; expected a number"),
        ("layers_to_transform", ["1,b"], "--layers-to-transform is 'b'"),
        *[("layer_replication", [bad], f"--layer-replication has '{bad}'") for bad in ("3", "a-b", "1-", "1-2-3")],
        ("rank_pattern", ["q_proj"], "--rank-pattern has 'q_proj'; expected name=number"),
        ("rank_pattern", ["q_proj=many"], "--rank-pattern is 'many'"),
        ("rank_pattern", ["{"], "not readable as JSON"),
    ],
)
def test_bad_values(field: str, given: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        adapter_values({field: given})


def test_absent_flags_leave_the_defaults() -> None:
    texts = dict.fromkeys(adapter_fields())
    assert adapter_values({**texts, "target_modules": []}) == {}
    assert adapter_config({}) == LoraConfig()
    assert adapter_config({"r": 2}, lora_alpha=3) == LoraConfig(r=2, lora_alpha=3)


def test_every_field_has_a_flag_with_its_docstring() -> None:
    app = typer.Typer(add_completion=False)

    @app.command()
    @adapter_options
    def verb(name: str = "x", *, adapter_values: dict[str, Any]) -> dict[str, Any]:
        """A verb."""
        return {"name": name, **adapter_values}

    options = {parameter.name: parameter for parameter in typer.main.get_command(app).params}
    assert [name for name in options if name != "name"] == list(adapter_fields())
    for name in adapter_fields():
        assert options[name].help.replace("\\", "").startswith(adapter_fields()[name].docs)
    assert adapter_fields()["use_rslora"].docs == field_docs(LoraConfig)["use_rslora"]
    assert "[default: 8, 256 for vera]" in options["r"].help.replace("\\", "")
    assert "[default: 12]" in options["init_r"].help.replace("\\", "")
    given = ["--name", "y", "--r", "4", "--no-use-rslora", "--target-modules", "a,b", "--target-modules", "c"]
    assert app(args=given, standalone_mode=False) == {
        "name": "y",
        "r": 4,
        "use_rslora": False,
        "target_modules": ["a", "b", "c"],
    }

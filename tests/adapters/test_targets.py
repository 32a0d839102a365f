"""Targeting against a brute-force oracle, and never silent: whatever matches nothing is named."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests import models
from veneer import ConfigError, LoraConfig, TargetError, TaskType, get_peft_model
from veneer.adapters.index import ModuleIndex
from veneer.adapters.targets import Selection, select

INDEXES = {kind: ModuleIndex(models.make(kind)) for kind in ("llama", "bert", "t5", "gpt2", "whisper")}


def chosen(selection: Selection) -> list[str]:
    return [target.slot.path for target in selection.targets]


def named(index: ModuleIndex, pattern: str) -> list[str]:
    """PEFT's rule, written out: the path itself, or its end after a dot."""
    return [path for path in index.slots if path == pattern or path.endswith("." + pattern)]


def adaptable(index: ModuleIndex) -> list[str]:
    return [path for path, slot in index.slots.items() if slot.kind]


@st.composite
def names(draw: st.DrawFn, index: ModuleIndex, least: int = 1) -> list[str]:
    """Endings of adaptable paths, of any length, sometimes cut to something that may not match."""
    found = []
    for path in draw(st.lists(st.sampled_from(adaptable(index)), min_size=least, max_size=3)):
        parts = path.split(".")
        ending = ".".join(parts[draw(st.integers(0, len(parts) - 1)) :])
        found.append(ending[1:] if draw(st.integers(0, 9)) == 0 and len(ending) > 1 else ending)
    return found


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_names_and_excludes(data: st.DataObject) -> None:
    index = INDEXES[data.draw(st.sampled_from(sorted(INDEXES)))]
    targets = data.draw(names(index))
    excluded = data.draw(names(index, least=0)) or None
    matched = {path for name in targets for path in named(index, name)}
    left_out = {path for name in excluded or [] for path in named(index, name)}
    silent = [n for n in [*targets, *(excluded or [])] if not named(index, n)]
    impossible = [path for path in matched - left_out if index.slots[path].kind is None]
    config = LoraConfig(target_modules=targets, exclude_modules=excluded)
    if silent or impossible or not matched - left_out:
        with pytest.raises(TargetError) as caught:
            select(index, config)
        if silent:
            assert any(repr(name) in str(caught.value) for name in silent)
        return
    selection = quietly(index, config)
    assert chosen(selection) == [path for path in index.slots if path in matched - left_out]
    for match in selection.report.patterns:
        assert list(match.paths) == named(index, match.pattern)


def quietly(index: ModuleIndex, config: LoraConfig) -> Selection:
    with warnings.catch_warnings():
        # Tied embeddings among the targets are announced; see test_merge.py.
        warnings.filterwarnings("ignore", message="The adapter on .* does not reach")
        return select(index, config)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_regular_expressions(data: st.DataObject) -> None:
    index = INDEXES[data.draw(st.sampled_from(sorted(INDEXES)))]
    path = data.draw(st.sampled_from(adaptable(index)))
    parts = [data.draw(st.sampled_from([re.escape(part), r"[^.]+", r"\w+"])) for part in path.split(".")]
    start = data.draw(st.integers(0, len(parts) - 1))
    pattern = data.draw(st.sampled_from([".*", r"(.*\.)?", ""])) + r"\.".join(parts[start:])
    excluded = data.draw(st.sampled_from([None, r".*\.0\..*", ".*1.*"]))
    matched = [p for p in index.slots if re.fullmatch(pattern, p)]
    left_out = {p for p in index.slots if excluded and re.fullmatch(excluded, p)}
    wanted = [p for p in matched if p not in left_out]
    config = LoraConfig(target_modules=pattern, exclude_modules=excluded)
    if not wanted or any(index.slots[p].kind is None for p in wanted) or (excluded and not left_out):
        with pytest.raises(TargetError):
            select(index, config)
    else:
        assert chosen(quietly(index, config)) == wanted


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_layers(data: st.DataObject) -> None:
    kind, layers_name, target = data.draw(
        st.sampled_from(
            [("llama", "layers", "q_proj"), ("bert", "layer", "query"), ("t5", "block", "wi"), ("gpt2", "h", "c_fc")]
        )
    )
    index = INDEXES[kind]
    layers = data.draw(st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=3))
    pattern = data.draw(st.sampled_from([None, layers_name, [layers_name], ["nothing", layers_name]]))
    wanted = [layers] if isinstance(layers, int) else layers
    if wanted == [] and pattern:
        return
    config = LoraConfig(target_modules=[target], layers_to_transform=layers, layers_pattern=pattern)
    if any(number >= models.LAYERS for number in wanted):
        with pytest.raises(TargetError, match=r"layers_to_transform has 2, .* layers 0, 1"):
            select(index, config)
        return
    of = {path: int(re.search(rf"\.{layers_name}\.(\d+)\.", path)[1]) for path in named(index, target)}
    assert chosen(select(index, config)) == [path for path in of if not wanted or of[path] in wanted]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rank_and_alpha_patterns(data: st.DataObject) -> None:
    index = INDEXES["llama"]
    keys = st.sampled_from(["q_proj", "self_attn.q_proj", "layers.1.self_attn.v_proj", r"layers\.0.*", "proj", ".*"])
    ranks = data.draw(st.dictionaries(keys, st.integers(1, 9), max_size=3))
    alphas = data.draw(st.dictionaries(keys, st.integers(1, 9), max_size=3))
    rslora = data.draw(st.booleans())
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], rank_pattern=ranks, alpha_pattern=alphas, r=16, use_rslora=rslora
    )
    paths = [*named(index, "q_proj"), *named(index, "v_proj")]

    def first(patterns: dict[str, int], path: str) -> str | None:
        return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)

    used = [{first(patterns, path) for path in paths} for patterns in (ranks, alphas)]
    if set(ranks) - used[0] or set(alphas) - used[1]:
        with pytest.raises(TargetError, match="_pattern has"):
            select(index, config)
        return
    for target in select(index, config).targets:
        key, alpha_key = first(ranks, target.slot.path), first(alphas, target.slot.path)
        r, alpha = ranks[key] if key else 16, alphas[alpha_key] if alpha_key else 8
        assert (target.r, target.lora_alpha) == (r, alpha)
        assert target.scaling == pytest.approx(alpha / (r**0.5 if rslora else r), rel=1e-15)


@pytest.mark.parametrize("kind", models.MODELS)
def test_all_linear(kind: str) -> None:
    """Every linear layer but the output head, and the names that are saved resolve to the same modules."""
    model = models.make(kind)
    index = ModuleIndex(model)
    heads = ["classifier", "pre_classifier"] if kind in ("bert", "distilbert", "vit") else []
    config = LoraConfig(target_modules="all-linear", modules_to_save=[h for h in heads if h in index.slots] or None)
    selection = select(index, config)
    output = model.get_output_embeddings() if hasattr(model, "lm_head") or kind == "whisper" else None
    expected = [
        path
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not output
        and path not in heads
    ]
    assert chosen(selection) == expected
    saved = selection.config.target_modules
    assert isinstance(saved, list)
    assert chosen(select(index, LoraConfig(target_modules=saved, modules_to_save=config.modules_to_save))) == expected
    # The names are minimal: each is one word, but where a head or another module has that name too.
    assert len(saved) < len(expected)


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-LINEAR"])
def test_all_linear_in_any_case(spelling: str) -> None:
    assert len(chosen(select(INDEXES["llama"], LoraConfig(target_modules=spelling)))) == 14


def test_all_linear_with_layers_excludes_and_reload() -> None:
    index = INDEXES["llama"]
    config = LoraConfig(target_modules="all-linear", layers_to_transform=[1], exclude_modules=["gate_proj"])
    selection = select(index, config)
    assert len(selection.targets) == 6
    assert all(".1." in path and "gate" not in path for path in chosen(selection))
    assert chosen(select(index, selection.config)) == chosen(selection)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"target_modules has 'q_porj'.*'q_proj'"),
        ({"target_modules": ["q_proj", "v_porj"]}, r"'v_porj'.*'v_proj'"),
        ({"target_modules": ["proj"]}, r"'proj', which matches no module"),
        ({"target_modules": ["q_proj", "all-linear"]}, r"it stands alone: target_modules='all-linear'\."),
        ({"target_modules": "q_proj"}, r"'q_proj', which matches no module"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["v_porj"]}, r"exclude_modules has 'v_porj'.*'v_proj'"),
        ({"target_modules": ["q_proj"], "exclude_modules": "x.*"}, r"exclude_modules has 'x\.\*'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, r"modules_to_save has 'lm_haed'.*'lm_head'"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_porj": 2}}, r"rank_pattern has 'q_porj'.*'q_proj'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, r"alpha_pattern has 'v_proj'"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2}, r"layers_to_transform has 2.*0, 1"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
            r"layers_to_transform has 0.*'blocks'",
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"leaves no module"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, r"leaves no module"),
    ],
    ids=str,
)
def test_what_matches_nothing_is_named_with_the_nearest(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        select(INDEXES["llama"], LoraConfig(**fields))


@pytest.mark.parametrize(
    ("kind", "target", "reason"),
    [
        ("llama", "self_attn", r"name the modules inside it instead: k_proj, o_proj, q_proj, v_proj"),
        ("llama", "layers", "name the modules inside it"),
        ("llama", "input_layernorm", r"kinds that can be adapted: .*\blinear\b"),
    ],
)
def test_what_cannot_be_adapted_says_why(kind: str, target: str, reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        select(INDEXES[kind], LoraConfig(target_modules=[target]))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(4, 2)
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.mha(x, x, x)[0])


def test_attention_whose_output_layer_is_never_called() -> None:
    index = ModuleIndex(Attention())
    with pytest.raises(TargetError, match="MultiheadAttention"):
        select(index, LoraConfig(target_modules=["out_proj"]))
    assert chosen(select(index, LoraConfig(target_modules=["mha"]))) == ["mha", "mha.out_proj"]
    assert chosen(select(index, LoraConfig(target_modules="all-linear"))) == ["out"]


@pytest.mark.parametrize("kind", ["ModuleList", "ModuleDict"])
def test_containers_are_not_saved_whole(kind: str) -> None:
    model = nn.Module()
    model.items_ = nn.ModuleList([nn.Linear(2, 2)]) if kind == "ModuleList" else nn.ModuleDict({"a": nn.Linear(2, 2)})
    model.layer = nn.Linear(2, 2)
    with pytest.raises(TargetError, match=f"{kind}, which is never called"):
        select(ModuleIndex(model), LoraConfig(target_modules=["layer"], modules_to_save=["items_"]))


def test_unknown_model_types_have_no_default() -> None:
    with pytest.raises(TargetError, match=r"no default for model type None.*all-linear.*out"):
        select(ModuleIndex(Attention()), LoraConfig())


def test_lora_bias_on_an_embedding_has_no_meaning() -> None:
    with pytest.raises(ConfigError, match="lora_bias"):
        select(INDEXES["bert"], LoraConfig(target_modules=["word_embeddings"], lora_bias=True))


def test_fan_in_fan_out_is_found_from_the_layers() -> None:
    assert select(INDEXES["gpt2"], LoraConfig(target_modules=["c_attn"])).config.fan_in_fan_out
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        selection = select(INDEXES["llama"], LoraConfig(target_modules=["q_proj"], fan_in_fan_out=True))
    assert not selection.config.fan_in_fan_out


HEADS = {
    "bert": (TaskType.SEQ_CLS, ["classifier"]),
    "bert-tokens": (TaskType.TOKEN_CLS, ["classifier"]),
    "bert-qa": (TaskType.QUESTION_ANSWERING, ["qa_outputs"]),
    "bert-choice": (TaskType.MULTIPLE_CHOICE, ["classifier"]),
    "distilbert": (TaskType.SEQ_CLS, ["pre_classifier", "classifier"]),
    "vit": (TaskType.IMAGE_CLASSIFICATION, ["classifier"]),
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_of_a_classification_task_is_saved(kind: str) -> None:
    task, heads = HEADS[kind]
    index = ModuleIndex(models.make(kind))
    assert [slot.path for slot in select(index, LoraConfig(task_type=task)).saved] == heads
    assert not select(index, LoraConfig(task_type="OTHER")).saved
    assert not select(index, LoraConfig()).saved


def test_a_task_model_without_a_head_warns() -> None:
    index = ModuleIndex(models.make("bert-body"))
    with pytest.warns(UserWarning, match="no head that could be recognised"):
        select(index, LoraConfig(task_type="SEQ_CLS"))


@pytest.mark.parametrize("kind", models.MODELS)
def test_every_family_has_a_default(kind: str) -> None:
    model = models.make(kind)
    expected = models.output(model, models.batch(kind))
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False)).eval()
    assert not torch.equal(models.output(adapted, models.batch(kind)), expected)


def test_report_counts_what_training_counts(kind: str) -> None:
    for fields in ({"target_modules": "all-linear"}, {"target_modules": "all-linear", "r": 2, "task_type": "OTHER"}):
        adapted = get_peft_model(models.make(kind), LoraConfig(**fields))
        assert (adapted.match_report.trainable, adapted.match_report.total) == adapted.get_nb_trainable_parameters()


def test_report_counts_biases_and_whole_modules() -> None:
    config = LoraConfig(target_modules=["query"], bias="all", lora_bias=True, task_type="SEQ_CLS")
    adapted = get_peft_model(models.make("bert"), config)
    assert (adapted.match_report.trainable, adapted.match_report.total) == adapted.get_nb_trainable_parameters()

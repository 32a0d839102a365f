"""A Trainer run on a tiny model, as a user writes it; prints what the test looks at as JSON.

Run as a script, so that it can be run with PEFT hidden: ``python trainer_run.py FOLDER [hide-peft]``.
"""

import json
import sys
from pathlib import Path

if "hide-peft" in sys.argv:
    sys.modules["peft"] = None

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from veneer import LoraConfig, PeftModel, get_peft_model

folder = Path(sys.argv[1])


def fresh_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


class Chats(torch.utils.data.Dataset):
    """Eight conversations: the first half of each is the prompt, and its labels are masked."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[:6] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "unused": index}


def arguments(**changes):
    defaults = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 2,
        "max_steps": 8,
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 4,
        "gradient_checkpointing": True,
    }
    return TrainingArguments(**{**defaults, **changes})


def make_trainer(**changes):
    set_seed(1)
    model = get_peft_model(fresh_model(), LoraConfig(r=4, task_type="CAUSAL_LM"))
    return Trainer(model=model, args=arguments(**changes), train_dataset=Chats(), eval_dataset=Chats())


trainer = make_trainer()
trainer.train()
evaluation = trainer.evaluate()
trainer.save_model(str(folder / "final"))

resumed = make_trainer(output_dir=str(folder / "again"))
resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-4"))

ids = torch.arange(10)[None]
reloaded = PeftModel.from_pretrained(fresh_model(), folder / "final")
with torch.no_grad():
    logits = trainer.model.eval()(ids).logits
    same_reloaded = torch.equal(reloaded(ids).logits, logits)
    same_resumed = torch.allclose(resumed.model.eval()(ids).logits, logits, atol=0, rtol=0)
    same_best = torch.equal(
        PeftModel.from_pretrained(fresh_model(), trainer.state.best_model_checkpoint)(ids).logits, logits
    )

print(
    json.dumps(
        {
            "peft": sys.modules.get("peft") is not None,
            "evaluation": evaluation,
            "log": trainer.state.log_history,
            "checkpoint": sorted(path.name for path in (folder / "run" / "checkpoint-8").iterdir()),
            "final": sorted(path.name for path in (folder / "final").iterdir()),
            "same_reloaded": same_reloaded,
            "same_resumed": same_resumed,
            "same_best": same_best,
        }
    )
)

"""A LoRA in TRL's SFTTrainer with ``padding_free``, on any device: what ``accelerated`` adds is one line.

    python examples/trl_sft.py ./model train.jsonl ./adapter

The file has one {"prompt": ..., "completion": ...} a line.
"""

import json
import sys
import warnings
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from veneer import LoraConfig, accelerated, get_peft_model


def main(model_name: str, data: str, output: str, steps: int = -1) -> float:
    """Train and save; returns the last loss."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = accelerated(model)
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    with warnings.catch_warnings():
        # TRL knows flash attention alone to keep packed examples apart; the accelerated model's does it too.
        warnings.filterwarnings("ignore", message=".*flash.*", category=UserWarning)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output,
                per_device_train_batch_size=8,
                learning_rate=2e-4,
                num_train_epochs=1,
                max_steps=steps,
                padding_free=True,
                max_length=None,
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    result = trainer.train()
    model.save_pretrained(output)
    return float(result.training_loss)


if __name__ == "__main__":
    main(*sys.argv[1:4])

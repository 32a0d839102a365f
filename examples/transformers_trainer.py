"""A LoRA in transformers' own Trainer, without padding or whole logits: what ``accelerated`` adds is one line.

    python examples/transformers_trainer.py ./model train.jsonl ./adapter

The file has one {"prompt": ..., "completion": ...} a line.
"""

import json
import sys
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from veneer import LoraConfig, accelerated, get_peft_model


def main(model_name: str, data: str, output: str, steps: int = -1) -> float:
    """Train and save; returns the last loss."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = accelerated(model)

    def encoded(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    rows = [encoded(json.loads(line)) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output,
            per_device_train_batch_size=8,
            learning_rate=2e-4,
            num_train_epochs=1,
            max_steps=steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        # Examples end to end in one row, their positions beginning anew.
        data_collator=DataCollatorWithFlattening(),
    )
    result = trainer.train()
    model.save_pretrained(output)
    return float(result.training_loss)


if __name__ == "__main__":
    main(*sys.argv[1:4])

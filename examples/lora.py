"""DuDi from Python: a LoRA student, rows from memory, a callback, evaluation.

    python examples/lora.py --steps 20 --output_dir runs/lora

Student and teacher are one model here, the package's: it teaches itself what it says when it reads
the item in English too (the rows' pivot_prompt). Give names of your own.
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from dudi import DuDiConfig, DuDiTrainer
from dudi.demo_data import data_path, translation_rows


class Watch(TrainerCallback):
    """Any callback of transformers works."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "off_policy_loss" in logs:
            print(state.global_step, {k: round(v, 4) for k, v in logs.items() if "loss" in k})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(data_path("teacher")))
    parser.add_argument("--teacher", default=str(data_path("teacher")))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output_dir", default="runs/lora")
    args = parser.parse_args()

    rows = translation_rows("train")[:64]
    trainer = DuDiTrainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32),
        args=DuDiConfig(
            output_dir=args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            max_completion_length=24,
            learning_rate=1e-3,
            on_policy_weight=0.5,
            preference_weight=0.1,
            reference="initial",  # the model with its adapter switched off: no copy
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(translation_rows("validation")[:32]),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[Watch()],
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)  # Watch tells less
    trainer.train()
    print({k: round(v, 4) for k, v in trainer.evaluate().items()})
    trainer.save_model(f"{args.output_dir}/adapter")


if __name__ == "__main__":
    main()
